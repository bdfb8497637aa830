"""Opens a model of transformers by name, and says in a sentence why it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvpolicy.errors import KVPolicyError, UnreachableError
from kvpolicy.inputs import expanded
from kvpolicy.runtimes.shapes import positions_of
from kvpolicy.runtimes.splitting import uses_template

DEMO_MODEL: Final = "smollm2"
"""The name of the demo model."""

REASONER: Final = "reasoner"
"""The name of the small reasoning model that ships with the package; examples/reasoning_model made it."""

_LONGEST_REASON: Final = 300
_UNREADABLE: Final = (OSError, ValueError, RuntimeError, ImportError, KeyError)


def locate(name: str, *, user: str, option: str = "--model", say: Callable[[str], None] | None = None) -> Path | str:
    """Return the folder of a model, or its id on the hub.

    Args:
        name: the demo model's name, the reasoning model's, a model folder or a hub id.
        user: what needs the model, for the error when transformers is missing.
        option: what errors begin with.
        say: called with one sentence when the demo model is being converted.

    Raises:
        KVPolicyError: transformers is missing, or the folder.
    """
    require_transformers(user)
    if name == DEMO_MODEL:
        from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

        return ensure_demo_model(say)
    if name == REASONER:
        return Path(__file__).with_name("models") / REASONER
    folder = expanded(name)
    if folder.is_dir():
        for file in folder.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):  # which transformers would wait for
                raise KVPolicyError(f"{option}: {name!r} holds {file.name!r}, which is no ordinary file; remove it.")
        return folder
    if name.startswith((".", "/", "~")):
        raise KVPolicyError(f"{option}: there is no folder {name!r}; give a model folder or a hub id.")
    return name


def require_transformers(user: str) -> None:
    """Raise KVPolicyError when transformers, which `user` needs, is missing; keep its libraries from writing notes."""
    try:
        import transformers
    except ImportError:
        raise KVPolicyError(f"{user} needs transformers; install it with: pip install 'kvpolicy[hf]'.") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    _silence(transformers)


def announce_hub(what: str, say: Callable[[str], None] | None) -> None:
    """Say that the hub is asked: without a network its client tries for a minute before it gives up.

    Args:
        what: what is not here.
        say: called with one sentence, unless the hub is not asked.
    """
    from huggingface_hub import constants

    if say is not None and not constants.HF_HUB_OFFLINE:
        say(
            f"{what}; asking the Hugging Face hub, which takes a minute where there is no network "
            "(HF_HUB_OFFLINE=1 takes only what was downloaded before)."
        )


def open_tokenizer(
    place: Path | str,
    name: str,
    *,
    option: str = "--model",
    revision: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    """Return the tokenizer of a model; raises KVPolicyError when the place holds no model.

    Args:
        place: what `locate` returned.
        name: what errors call the model.
        option: what errors begin with.
        revision: commit or tag on the hub.
        say: called with one sentence when the hub is asked.
    """
    import transformers

    _silence(transformers)
    if not Path(place).is_dir():
        announce_hub(f"{option}: there is no folder {name!r}", say)
    try:
        # What is no model at all fails here with the clearest words.
        transformers.AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        return transformers.AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except _UNREADABLE as error:
        # A folder that is mistyped is taken for an id of the hub, whose answer alone would mislead.
        here = Path(place).is_dir()
        where = "" if here else "there is no such folder, and as an id of the hub: "
        kind = KVPolicyError if here else UnreachableError
        raise kind(f"{option}: {name!r} cannot be loaded: {where}{first_line(error)}.") from error


def window_of(place: Path | str, revision: str | None = None) -> int | None:
    """Return the most tokens that a model takes, answer included, as its configuration says; None if it does not.

    Args:
        place: what `locate` returned, of which `open_tokenizer` has opened the tokenizer.
        revision: commit or tag on the hub.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        place, revision=revision, trust_remote_code=False
    ).get_text_config()
    return positions_of(config)


def open_model(
    place: Path | str, name: str, *, dtype: str, device: str, option: str = "--model", revision: str | None = None
) -> Any:
    """Return a model in evaluation mode on a device.

    Args:
        place: what `locate` returned.
        name: what errors call the model.
        dtype: "auto" (as stored) or the name of a dtype of torch.
        device: as torch names it.
        option: what errors begin with.
        revision: commit or tag on the hub.

    Raises:
        KVPolicyError: the weights cannot be loaded, or the device cannot be used.
    """
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, revision=revision, trust_remote_code=False
        )
    except _UNREADABLE as error:
        raise KVPolicyError(f"{option}: {name!r} cannot be loaded: {first_line(error)}.") from error
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KVPolicyError(f"--device: {device!r} cannot be used: {first_line(error)}.") from error


def check_device(device: str) -> None:
    """Raise KVPolicyError for a device on which nothing can be computed, before a model is loaded for it."""
    import torch

    try:
        usable = torch.zeros(1, device=device).device.type != "meta"  # which computes nothing
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise KVPolicyError(f"--device: {device!r} cannot be used: {first_line(error)}.") from None
    if not usable:
        raise KVPolicyError(f"--device: {device!r} cannot be used: it computes nothing; write cpu or cuda.")


def _silence(transformers: Any) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first words of an exception, at most a few lines, without a full stop."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:_LONGEST_REASON].rstrip(".:")


def encode(tokenizer: Any, prompt: str, chat: bool | None, *, option: str = "--chat") -> Any:
    """Return the prompt's tokens, through the chat template if asked for or, by default, if there is one.

    Raises:
        KVPolicyError: it is asked for and there is none; the sentence begins with `option`.
    """
    if uses_template(tokenizer, chat, option):
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(prompt, return_tensors="pt")
