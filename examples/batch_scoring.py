"""How likely are the ends of many texts, given what a policy keeps of their beginnings? One batch, left-padded.

python -P examples/batch_scoring.py                              # each section of a page, its last 32 tokens
python -P examples/batch_scoring.py --policy knorm --budget 64
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import kvpolicy
from kvpolicy import PolicySpec
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.opening import locate, open_model, open_tokenizer

TEXT = Path(__file__).resolve().parents[1] / "docs" / "concepts.md"


@torch.no_grad()
def scores(model: torch.nn.Module, rows: Sequence[list[int]], spec: PolicySpec, last: int) -> torch.Tensor:
    """Return the mean log-probability of the last tokens of each row, fp32 `[B]`: each row as if it were alone."""
    begins = [row[:-last] for row in rows]
    width = max(map(len, begins))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in begins])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in begins])
    ends = torch.tensor([row[-last:] for row in rows])
    with PolicyCache(spec, model) as cache:
        first = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
        mask = torch.cat([mask, torch.ones_like(ends[:, 1:])], 1)
        cache.expect("verify")  # an answer that is read, not a prompt: it is all attended to, and compacted afterwards
        rest = model(ends[:, :-1], attention_mask=mask, past_key_values=cache).logits
        stats = cache.stats()
        print(f"{spec.policy}: {stats.resident} entries held of {stats.seen} tokens, {len(rows)} rows")
    logs = torch.cat([first, rest], 1).float().log_softmax(-1)
    return logs.gather(2, ends[:, :, None]).squeeze(2).mean(1)


def main(argv: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Compare a policy with the whole cache; returns both scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--policy", default="snapkv-prefill")
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--last", type=int, default=32)
    options = parser.parse_args(argv)
    place = locate(options.model, user="this example")
    tokenizer = open_tokenizer(place, options.model)
    model = open_model(place, options.model, dtype="float32", device="cpu")
    sections = options.text.read_text(encoding="utf-8").split("\n## ")
    rows = [ids for ids in (tokenizer(part)["input_ids"] for part in sections) if len(ids) > 2 * options.last]
    specs = (kvpolicy.load(options.policy, budget=options.budget), kvpolicy.load("full"))
    found = {spec.policy: scores(model, rows, spec, options.last) for spec in specs}
    print("\nmean log-probability of the last tokens of each section\n" + " ".join(f"{name:>14}" for name in found))
    for row in zip(*found.values(), strict=True):
        print(" ".join(f"{float(each):14.4f}" for each in row))
    return found


if __name__ == "__main__":
    main()
