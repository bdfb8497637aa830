"""One job in transformers: `model.generate` with its own cache, or with a policy's.

There is no scheduler here: in a pool of a given size, as many requests go together as fit, and the others wait.
"""

from __future__ import annotations

import torch
from job import BLOCK, Answer, Job, serve, timed
from transformers import AutoModelForCausalLM, DynamicCache

from kvpolicy import load
from kvpolicy.runtimes.hf import PolicyCache


@torch.no_grad()
def run(job: Job) -> Answer:
    """Generate, after four tokens that do not count."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    width = max(map(len, job.prompts))
    entries = min(job.budget + job.interval, job.most) if job.policy else job.most
    rows = len(job.prompts) if job.blocks is None else (job.blocks - 1) // -(-entries // BLOCK)
    assert rows, "not even one request fits into the pool"

    def together(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        spec = load(job.policy, budget=job.budget, trigger={"every": job.interval}) if job.policy else None
        cache = PolicyCache(spec, model) if spec else DynamicCache(config=model.config)
        given = {"attention_mask": mask, "past_key_values": cache, "do_sample": False}
        found = model.generate(ids, max_new_tokens=tokens, pad_token_id=0, **given)
        if spec:
            cache.close()
        return found[:, width:].tolist()

    def generate() -> list[list[int]]:
        parts = [job.prompts[i : i + rows] for i in range(0, len(job.prompts), rows)]
        return [out for part in parts for out in together(part, job.tokens)]

    together(job.prompts[:1], 4)
    answer = timed(generate, "transformers", "torch", "kvpolicy")
    answer.more = {"rows at once": min(rows, len(job.prompts))}
    return answer


if __name__ == "__main__":
    serve(run)
