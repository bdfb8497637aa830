"""Specifications as text, a long one and a short one."""

from __future__ import annotations

# The file of the design document.
RKV = """\
# yaml-language-server: $schema=policy.schema.json
schema_version: 1
policy: my-rkv
paper: "arXiv:2505.24133"
budget: {tokens: 1024}
phase: decode
trigger: {every: 128}
protect: {sinks: 4, recent: 8, prompt: false}
importance: {use: window_attention, observe: 8, group: max, softmax_over: candidates, smooth: 7}
redundancy: {use: key_cosine, threshold: 0.5, spare: newest, beta: 1}
mixer: {use: linear, weight: 0.1}
allocator: uniform
selector: {use: top_k, scope: head}
"""


SHORT = """\
schema_version: 1
policy: short
budget: {tokens: 64}
trigger: each_step
importance: key_norm
"""
