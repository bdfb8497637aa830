"""GPUs by name: memory, bandwidth and arithmetic as their makers give them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvpolicy.errors import KVPolicyError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its maker's data sheet.

    Attributes:
        name: as people call it.
        memory: bytes; a sheet's GB are 10^9 here, so that a plan errs on the safe side.
        bandwidth: bytes per second from that memory.
        arithmetic: floating-point operations per second of dense bf16 matrix products, summed in fp32.
        source: the data sheet.
    """

    name: str
    memory: int
    bandwidth: float
    arithmetic: float
    source: str


def _gpu(name: str, memory: int, bandwidth: float, arithmetic: float, source: str) -> Gpu:
    return Gpu(name, memory * 10**9, bandwidth * 1e9, arithmetic * 1e12, source)


_AMPERE: Final = "NVIDIA A100 Tensor Core GPU datasheet"
_HOPPER: Final = "NVIDIA H100 Tensor Core GPU datasheet, half of its figures with sparsity"
_ADA: Final = "NVIDIA Ada GPU architecture whitepaper"

GPUS: Final = (
    _gpu("A10", 24, 600, 125, "NVIDIA A10 datasheet"),
    _gpu("A100 40GB", 40, 1555, 312, _AMPERE),
    _gpu("A100 80GB PCIe", 80, 1935, 312, _AMPERE),
    _gpu("A100 80GB SXM", 80, 2039, 312, _AMPERE),
    _gpu("L4", 24, 300, 121, "NVIDIA L4 datasheet, half of its figure with sparsity"),
    _gpu("L40S", 48, 864, 362, "NVIDIA L40S datasheet"),
    _gpu("H100 PCIe", 80, 2000, 756, _HOPPER),
    _gpu("H100 NVL", 94, 3900, 835, _HOPPER),
    _gpu("H100 SXM", 80, 3350, 989, _HOPPER),
    _gpu("H200 SXM", 141, 4800, 989, "NVIDIA H200 datasheet, half of its figure with sparsity"),
    _gpu("B200", 180, 8000, 2250, "NVIDIA DGX B200 datasheet, an eighth, half of its figure with sparsity"),
    _gpu("RTX 3090", 24, 936, 71, "NVIDIA GA102 GPU architecture whitepaper"),
    _gpu("RTX 4090", 24, 1008, 165, _ADA),
    _gpu("RTX 5090", 32, 1792, 209, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    _gpu("MI250X", 128, 3277, 383, "AMD Instinct MI250X data sheet"),
    _gpu("MI300X", 192, 5300, 1307, "AMD Instinct MI300X data sheet"),
    _gpu("MI325X", 256, 6000, 1307, "AMD Instinct MI325X data sheet"),
)
"""Only what a data sheet says; nothing here was measured."""


def gpu_of(name: str) -> Gpu:
    """Return the GPU of a name, or of a part of one; raises KVPolicyError when none, or several, fit."""
    asked = _plain(name)
    known = {_plain(each.name): each for each in GPUS}
    found = [each for plain, each in known.items() if plain == asked] or [
        each for plain, each in known.items() if asked and asked in plain
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(repr(each.name) for each in found)
        raise KVPolicyError(f"--gpu: {name[:40]!r} may be one of {names}; write which.")
    near = did_you_mean(name, [each.name for each in GPUS])
    raise KVPolicyError(
        f"--gpu: {name[:40]!r} is not known.{near} `kvpolicy plan --gpus` lists those that are; for another one give "
        "--memory, and --bandwidth in GB/s."
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(nvidia|amd|geforce|instinct)\s+", "", name.strip().lower()))
