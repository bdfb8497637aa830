"""Which entries every registered policy keeps of one text on the demo model: write it down, or compare two records.

python -P scripts/kept_sets.py record [--tiny] [--threads 1] [--follow OTHER] FILE [POLICY ...]
python -P scripts/kept_sets.py compare FILE OTHER [--first]
python -P scripts/kept_sets.py processors [--demo] [POLICY ...]

A prompt of some 280 tokens, 40 forced steps, a second turn of 24 tokens and 24 more steps; 88 entries and an interval
of 24 unless a policy needs other numbers. A record is a zip of arrays (`numpy.load`): positions that each head kept at
each compaction, and the retention scores that it was decided by. With ``--follow`` every decision is written down and
then the other record's is carried out, so that a near tie that falls the other way does not change what comes after.

`compare` names policy, compaction, layer and head where sets differ, how many positions do, and by how much the scores
of `FILE` differ there, as a share of the head's largest; its exit code is 1 when sets differ. Without ``--follow``,
what comes after a policy's first difference is its consequence; ``--first`` leaves it out.

`processors` records on a tiny model (``--demo``: on the demo model) with one and two threads and with the instruction
sets that PyTorch can be told to use (`ATEN_CPU_CAPABILITY`), all following the first of them, and compares.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import kvpolicy
from kvpolicy import KVPolicyError, Policy, Selector
from kvpolicy.testing.tables import stand_in_tables
from kvpolicy.types import KeepIndices

BUDGET, INTERVAL = 88, 24
PROMPT, FORCED, TURN = 280, 40, 24
THEMES = ("the river", "a lantern", "the old mill", "her brother", "the winter road", "a map of the coast", "the bell")
SENTENCES = (
    "On the {n}th day they came to {a}, and nobody could say whether {b} had been there before.",
    "“Count again,” said the owl: {n} steps to {a}, {m} steps back, and {b} in between.",
    "def walk(steps={n}):\n    return [step * {m} for step in range(steps) if step % 3 == 0]",
    "- {a}: {n}\n- {b}: {m}\n- the rest: {n}, {m}, {n}, {m}",
)


def text() -> str:
    """Return the text: prose, lists and code, with words that come again."""
    lines = []
    for n in range(24):
        a, b = THEMES[n % len(THEMES)], THEMES[(3 * n + 1) % len(THEMES)]
        lines.append(SENTENCES[n % len(SENTENCES)].format(n=n + 4, m=(7 * n) % 23, a=a, b=b))
    return "\n".join(lines)


class Watching(Selector):
    """Notes what another selector decides, and carries out what a record says where it is given one.

    A selector is asked for every layer and compaction in every version of kvpolicy, so this script runs on all of them.
    """

    inner: Selector
    notes: ClassVar[dict[str, np.ndarray]]
    other: ClassVar[dict[str, np.ndarray] | None]
    calls: ClassVar[list[int]]

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Any) -> KeepIndices:
        """Ask the other selector, note, and follow."""
        kept = self.inner.select(scores, counts, protected, valid, slots)
        number = int(slots.compaction[0])
        # With the scope `model` all layers bear the number of the first one; they are asked in order.
        layer = sum(1 for call in self.calls if call == number)
        self.calls.append(number)
        key = f"{number:03d}/{layer:02d}"
        known = valid[0]
        positions, mask = slots.positions[0].long(), kept.mask(scores.shape[2])[0]
        width = int(positions[known].max()) + 1
        by_position = [torch.full((len(known), width), fill) for fill in (float("nan"), 0.0)]
        for h in range(len(known)):
            at = positions[h][known[h]]
            by_position[0][h, at] = scores[0, h][known[h]].masked_fill(protected[0, h][known[h]], float("inf"))
            by_position[1][h, at] = mask[h][known[h]].float()
        self.notes[f"{key}/scores"] = by_position[0].numpy()
        self.notes[f"{key}/kept"] = by_position[1].bool().numpy()
        if self.other is None or f"{key}/kept" not in self.other:
            return kept
        theirs = torch.from_numpy(self.other[f"{key}/kept"])
        at = positions.clamp(max=theirs.shape[1] - 1)
        return _indices((theirs.gather(1, at) & known)[None])


def _indices(kept: Tensor) -> KeepIndices:
    lengths = kept.sum(-1)
    order = (~kept).long().sort(dim=-1, stable=True).indices[..., : int(lengths.max())]
    last = order.gather(-1, (lengths - 1).clamp(min=0)[..., None])
    return KeepIndices(torch.where(torch.arange(order.shape[-1]) < lengths[..., None], order, last), lengths)


def small(name: str) -> Policy:
    """Return a registered policy that evicts from a text of this length."""
    spec = kvpolicy.load(name)
    data = spec.to_data()
    if data["importance"]["use"] == "none" and not data["protect"]:  # keeps everything
        return spec.build()
    changes: dict[str, Any] = {"budget": 0.25 if spec.budget.fraction else BUDGET}
    if data["trigger"]["use"] == "every":
        changes["trigger.interval"] = INTERVAL
    if "prompt" in data["protect"]:
        changes["budget"] = PROMPT + INTERVAL
    limits = (("protect", "recent", 2), ("protect", "sinks", 8), ("importance", "lag", 4), ("importance", "chunk", 4))
    for part, field, share in limits:
        value = data[part].get(field)
        value = value.get("count") if isinstance(value, dict) else value
        if value is not None and value > BUDGET // share:
            changes[f"{part}.{field}"] = BUDGET // share
    return spec.replace(changes).build()


@torch.no_grad()
def run(policy: Policy, model: Any, tokens: list[int]) -> None:
    """Take the text through the model under a policy."""
    from kvpolicy.runtimes.hf import PolicyCache

    ids = torch.tensor([tokens])
    start, stop = PROMPT, PROMPT + FORCED
    with PolicyCache(policy, model) as cache:
        cache.prefill_chunks(ids[:, :start])
        model(ids[:, cache.get_seq_length() : start], past_key_values=cache)
        for n in range(start, stop):
            model(ids[:, n : n + 1], past_key_values=cache)
        if not any(part.whole_prompt for part in policy.components):
            model(ids[:, stop : stop + TURN], past_key_values=cache)
            stop += TURN
        for n in range(stop, stop + TURN):
            model(ids[:, n : n + 1], past_key_values=cache)
        cache.kept(0, 0)  # what is due runs


def subject(tiny: bool) -> tuple[Any, list[int]]:
    """Return a model and the text as its tokens; the tiny one knows letters only, and many come again."""
    if tiny:
        from kvpolicy.testing.tiny import tiny_model

        return tiny_model("llama"), [3 + ord(letter) % 200 for letter in text()]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

    folder = ensure_demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)(text())["input_ids"]


def record(file: Path, names: list[str], follow: Path | None, tiny: bool = False) -> None:
    """Write the record of all policies, or of those that are named."""
    model, tokens = subject(tiny)
    assert len(tokens) >= PROMPT + FORCED + 2 * TURN, len(tokens)
    other = None if follow is None else dict(np.load(follow))
    found: dict[str, np.ndarray] = {}
    for name in names or [entry.name for entry in kvpolicy.catalog().policies()]:
        notes: dict[str, np.ndarray] = {}
        try:
            policy = small(name)
            theirs = other and {k[len(name) + 1 :]: v for k, v in other.items() if k.startswith(f"{name}/")}
            members = {"exact": policy.selector.exact, "notes": notes, "other": theirs, "calls": []}
            watching = type("Watching", (Watching,), {**members, "__annotations__": {}})
            selector = policy.selector
            watched = replace(
                policy, selector=watching(inner=selector, scope=selector.scope, reduce=selector.reduce), backend="torch"
            )
            run(watched, model, tokens)
        except KVPolicyError as error:
            notes = {"error": np.array(str(error))}
        if not notes:
            notes = {"error": np.array("nothing was evicted")}
        found |= {f"{name}/{key}": value for key, value in notes.items()}
        what = notes.get("error", f"{len({key[:3] for key in notes})} compactions")
        print(f"{name}: {what}", flush=True)
    with file.open("wb") as stream:
        np.savez_compressed(stream, **found)


def processors(names: list[str], demo: bool) -> int:
    """Record under all instruction sets and with one and two threads; return how many decisions differ."""
    plain = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.npz"
        for capability in (None, "avx2", "default"):
            for threads in ("1", "2"):
                file = Path(folder) / "next.npz" if first.exists() else first
                follow = [] if file == first else ["--follow", str(first)]
                model = [] if demo else ["--tiny"]
                told = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
                command = [sys.executable, "-P", __file__, "record", "--threads", threads, *model, *follow]
                subprocess.run([*command, str(file), *names], env=plain | told, check=True, stdout=subprocess.DEVNULL)
                print(f"instruction set {capability or 'as it is'}, threads {threads}:", flush=True)
                differ += compare(first, file, first=False, quiet=True)
    return differ


def compare(file: Path, other: Path, first: bool, quiet: bool = False) -> int:
    """Print where two records differ; return how many heads of all compactions do."""
    ours, theirs = np.load(file), np.load(other)
    names = sorted({key.split("/")[0] for key in (*ours, *theirs)})
    total = 0
    for name in names:
        mine, yours = ({k[len(name) + 1 :] for k in each if k.startswith(f"{name}/")} for each in (ours, theirs))
        if mine != yours:
            print(f"{name}: {_said(ours, name, mine)}; other: {_said(theirs, name, yours)}")
            total += 1
            continue
        heads = lines = 0
        worst, stop = 0.0, None
        for key in sorted(k for k in mine if k.endswith("/kept")):
            number, layer, _ = key.split("/")
            if stop is not None and number != stop:
                break
            a, b = ours[f"{name}/{key}"], theirs[f"{name}/{key}"]
            scores = ours[f"{name}/{number}/{layer}/scores"]
            heads += len(a)
            for h in np.flatnonzero((a != b).any(1)):
                lost, won = a[h] & ~b[h], b[h] & ~a[h]
                gap = _gap(scores[h], lost, won)
                worst = max(worst, abs(gap))
                lines += 1
                stop = number if first else None
                print(
                    f"{name}: compaction {int(number)}, layer {int(layer)}, head {h}: {np.flatnonzero(lost).tolist()} "
                    f"for {np.flatnonzero(won).tolist()}, scores differ by {gap:.1e}"
                )
        total += lines
        if quiet and not lines:
            continue
        print(f"{name}: {lines} of {heads} decisions differ" + (f", scores by at most {worst:.1e}" if lines else ""))
    return total


def _said(record: Any, name: str, keys: set[str]) -> str:
    return str(record[f"{name}/error"]) if "error" in keys else f"{len(keys) // 2} decisions of layers"


def _gap(scores: np.ndarray, lost: np.ndarray, won: np.ndarray) -> float:
    """Return how far apart the scores of exchanged entries are, as a share of the largest score of the head."""
    finite = np.abs(scores[np.isfinite(scores)])
    if not lost.any() or not won.any() or not finite.any():
        return float("nan")
    return float((scores[lost].max() - scores[won].min()) / max(finite.max(), 1e-30))


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("policies", nargs="*")
    recording.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    recording.add_argument("--threads", type=int, default=1)
    recording.add_argument("--follow", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("file", type=Path)
    comparing.add_argument("other", type=Path)
    comparing.add_argument("--first", action="store_true", help="leave out what comes after a first difference")
    both = commands.add_parser("processors")
    both.add_argument("policies", nargs="*")
    both.add_argument("--demo", action="store_true", help="the demo model")
    options = parser.parse_args()
    if options.command == "processors":
        return 1 if processors(options.policies, options.demo) else 0
    if options.command == "compare":
        return 1 if compare(options.file, options.other, options.first) else 0
    torch.set_num_threads(options.threads)
    with stand_in_tables() if options.tiny else nullcontext():  # the bundled tables are of the demo model
        record(options.file, options.policies, options.follow, options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
