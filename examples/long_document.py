"""A text that is longer than the model was trained for: keys are turned to contiguous positions, so no position is new.

Reads a text chunk by chunk and prints the loss of each, under StreamingLLM with and without re-rotation.

    python -P examples/long_document.py                                 # 9,000 tokens; SmolLM2 was trained for 8,192
    python -P examples/long_document.py --text FILE --tokens 12000
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

TEXT = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


@torch.no_grad()
def losses(model: torch.nn.Module, ids: torch.Tensor, spec: PolicySpec, chunk: int) -> list[float]:
    """Return the mean loss of each chunk, nats per token, and print how much was held."""
    found = []
    with PolicyCache(spec, model) as cache:
        for start in range(0, ids.shape[1] - 1, chunk):
            part = ids[:, start : start + chunk + 1]
            logits = model(part[:, :-1], past_key_values=cache).logits
            found.append(float(torch.nn.functional.cross_entropy(logits[0].float(), part[0, 1:])))
        held = cache.stats()
        print(f"{spec.policy}: {held.resident} of {held.seen} tokens held, at most {held.peak_resident} at a time")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Compare; returns the losses of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--budget", type=int, default=512)
    options = parser.parse_args(argv)
    place = locate(options.model, user="this example")
    tokenizer = open_tokenizer(place, options.model)
    model = open_model(place, options.model, dtype="float32", device="cpu")
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    ids = ids.repeat(1, -(-options.tokens // ids.shape[1]))[:, : options.tokens]

    turned = kvpolicy.load("streaming-llm", budget=options.budget)
    stays = turned.replace({"policy": "positions-stay", "post": []})
    found = {spec.policy: losses(model, ids, spec, options.chunk) for spec in (turned, stays)}
    trained = getattr(model.config, "max_position_embeddings", None)
    print(f"\nloss by chunk; the model was trained for {trained} positions\n{'tokens':>8} " + " ".join(map(str, found)))
    for i, row in enumerate(zip(*found.values(), strict=True)):
        print(f"{min((i + 1) * options.chunk, options.tokens):8} " + " ".join(f"{each:14.3f}" for each in row))
    return found


if __name__ == "__main__":
    main()
