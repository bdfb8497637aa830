"""One context and many questions: the context is read and compressed once, and each question starts from a copy.

python -P examples/many_questions.py
python -P examples/many_questions.py --text FILE --question "Who wrote it?" --question "When?"
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import kvpolicy
from kvpolicy.runtimes.hf import ContextCache
from kvpolicy.runtimes.opening import locate, open_model, open_tokenizer

TEXT = Path(__file__).resolve().parents[1] / "docs" / "concepts.md"
QUESTIONS = ["What is a policy?", "What is a compaction?", "What does a protection do?"]


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Ask; returns the answers, which do not hang on the order of the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--policy", default="snapkv-prefill")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--question", action="append")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    options = parser.parse_args(argv)
    place = locate(options.model, user="this example")
    tokenizer = open_tokenizer(place, options.model)
    model = open_model(place, options.model, dtype="float32", device="cpu")
    text = options.text.read_text(encoding="utf-8")

    start, answers = time.perf_counter(), []
    with ContextCache(kvpolicy.load(options.policy, budget=options.budget), model, tokenizer, text) as context:
        held = context.stats()
        print(f"read in {time.perf_counter() - start:.1f} s: {held.resident} of {held.seen} tokens held")
        for question in options.question or QUESTIONS:
            start = time.perf_counter()
            answers.append(context.ask(question, max_new_tokens=options.max_new_tokens))
            print(f"\n{question} ({time.perf_counter() - start:.1f} s)\n{answers[-1].strip()}")
    return answers


if __name__ == "__main__":
    main()
