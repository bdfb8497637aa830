"""GRPO in TRL with a policy in the generate step, and what that changes in the log-probabilities.

Answers are sampled under a policy, but trained as if the whole cache had sampled them. The gap is printed, and the
trainer gets the log-probabilities of what really was sampled as the old ones, so that its ratio corrects for the gap.

    python -P examples/rollouts.py --policy rkv --budget 48         # needs the extra `trl`
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.opening import locate, open_model, open_tokenizer

PROMPTS = ["a = 3, b = a + 4, c = b + b, what is c?", "x = 9, y = x - 2, z = y + x, what is z?"]


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train for some steps; returns the mean distance of the two log-probabilities at each of them."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reasoner")
    parser.add_argument("--policy", default="rkv")
    for name, default in {"budget": 48, "interval": 16, "tokens": 120, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    place, gaps = locate(options.model, user="this example"), []
    tokenizer = open_tokenizer(place, options.model)
    few = {} if options.policy == "full" else {"budget": options.budget, "trigger__every": options.interval}
    spec = kvpolicy.load(options.policy, **few)

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        with torch.no_grad(), PolicyCache(spec, model) as cache:
            made = model.generate(
                **inputs, past_key_values=cache, do_sample=True, max_new_tokens=options.tokens,
                min_new_tokens=options.tokens, top_k=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        answers = made.sequences[:, inputs["input_ids"].shape[1] :]
        logs = torch.stack(made.logits, 1).float().log_softmax(-1).gather(2, answers[:, :, None]).squeeze(2)
        asked = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
        return {"prompt_ids": asked, "completion_ids": answers.tolist(), "logprobs": logs.tolist()}

    class Corrected(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            sampled = batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
            ids, mask = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], 1) for n in ("ids", "mask"))
            with torch.no_grad():
                whole = self._get_per_token_logps_and_entropies(self.model, ids, mask, sampled.shape[1])[0]
            gap = (whole - sampled).abs()
            gaps.append(float(gap.mean()))
            print(
                f"{spec.policy}: |log p - log p of the whole cache|: mean {gaps[-1]:.4f}, most {float(gap.max()):.3f}"
            )
            return batch

    settings = GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=4, num_generations=4, max_steps=options.steps, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", max_completion_length=options.tokens,
    )  # fmt: skip
    model = open_model(place, options.model, dtype="float32", device="cpu")
    data, reward = Dataset.from_dict({"prompt": PROMPTS}), lambda completions, **_: [len(set(c)) for c in completions]
    Corrected(model, reward, settings, train_dataset=data, processing_class=tokenizer, rollout_func=rollouts).train()
    return gaps


if __name__ == "__main__":
    main()
