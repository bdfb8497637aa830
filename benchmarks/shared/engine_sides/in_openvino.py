r"""One job in OpenVINO GenAI: its pipeline for continuous batching, full or with its own eviction.

python -m venv .openvino && .openvino/bin/pip install "optimum-intel[openvino]" openvino-genai
.openvino/bin/pip uninstall -y torchvision                      # where it is of another torch, the next command fails
.openvino/bin/optimum-cli export openvino --task text-generation-with-past --weight-format fp32 \
        --model MODEL_FOLDER EXPORTED_FOLDER
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai as genai
from job import BLOCK, Answer, Job, serve, timed


def run(job: Job) -> Answer:
    """Generate, after four tokens that do not count; everything in fp32, keys and values too."""
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = job.wanted_blocks
    scheduler.max_num_seqs = len(job.prompts)
    scheduler.max_num_batched_tokens = 2048
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    if job.policy:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            BLOCK, job.interval, job.budget + job.interval, genai.AggregationMode.NORM_SUM
        )
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    one = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    pipeline = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", exact | one)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        ids = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [found.m_generation_ids[0] for found in pipeline.generate(ids, [config] * len(ids))]

    generate(job.prompts[:1], 4)
    answer = timed(lambda: generate(job.prompts, job.tokens), "openvino", "openvino-genai")
    metrics = pipeline.get_metrics()
    answer.more = {name: getattr(metrics, name) for name in ("max_cache_usage",) if hasattr(metrics, name)}
    return answer


if __name__ == "__main__":
    serve(run)
