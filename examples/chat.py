"""A chat whose memory never grows: turn after turn, the cache holds at most budget + interval entries.

python -P examples/chat.py                      # SmolLM2; an empty line ends it
python -P examples/chat.py --budget 128 --model PATH_OR_ID
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.opening import locate, open_model, open_tokenizer


def main(argv: Sequence[str] | None = None, read: Callable[[str], str] = input) -> PolicyCache:
    """Talk until an empty line is read; returns the cache, whose numbers can still be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args(argv)
    place = locate(options.model, user="this example")
    tokenizer = open_tokenizer(place, options.model)
    model = open_model(place, options.model, dtype="float32", device="cpu")

    # What is asked is compacted as well as what is answered, so that long questions do not stay for ever.
    spec = kvpolicy.load(options.policy, budget=options.budget, phase="both")
    messages: list[dict[str, str]] = []
    ids = torch.empty(1, 0, dtype=torch.long)
    with PolicyCache(spec, model) as cache:
        while said := read("you: ").strip():
            # The cache goes on where it stopped: only what is new is tokenised, and generate() reads the rest of it.
            before = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
            messages.append({"role": "user", "content": said})
            whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            new = tokenizer(whole[len(before) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, new], 1)
            asked = ids.shape[1]
            ids = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
                max_new_tokens=options.max_new_tokens, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            answer = tokenizer.decode(ids[0, asked:], skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": answer})
            stats = cache.stats()
            print(f"model: {answer}\n[{stats.resident} of {stats.seen} tokens held, {stats.compactions} compactions]")
    return cache


if __name__ == "__main__":
    main()
