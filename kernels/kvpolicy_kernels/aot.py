"""Ahead-of-time compilation without a GPU: ``python -P -m kvpolicy_kernels.aot``.

Every variant calls a launcher, whose launches are recorded instead of run, and compiles what it would have launched:
signature, constants, warps and specialisation are the launcher's own. Registers, spills and shared memory are read from
what the compiler made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from kvpolicy_kernels import _variants
from kvpolicy_kernels._launch import Launch, kernel, recording

TARGETS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT: Final = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory (LDS) that one program may use."""
REGISTER_TOLERANCE: Final = 16

# Constants that a name leaves out.
_USUAL: Final = (
    ("PARTS", 1), ("CAPPED", False), ("WITH_SINKS", False), ("EACH", False), ("KIND", "max"), ("PEAK", True),
)  # fmt: skip
_MATRIX: Final = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma|\bmma\.sync",
    "gfx942": r"\bv_mfma",
}
_TYPES: Final = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one target.

    Attributes:
        registers: per thread.
        spills: bytes of stack and local memory (NVIDIA), or spilt vector registers (AMD).
        shared: bytes of shared memory per program.
        matrix: matrix instructions in the assembly.
        conversions: changes of layout in Triton's GPU dialect.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    conversions: int


def unique(*, full: bool) -> dict[str, Launch]:
    """Return the launches of all variants by a readable name, each only once."""
    found: dict[str, Launch] = {}
    for variant in _variants.variants(full=full).values():
        launches: list[Launch] = []
        with recording(launches.append):
            variant()
        for launch in launches:
            found.setdefault(_name(launch), launch)
    return found


def _name(launch: Launch) -> str:
    """Name a launch by its kernel, its data type and its constants, so that equal ones meet."""
    dtypes = [a.dtype for a in launch.arguments if isinstance(a, torch.Tensor)]
    dtype = _TYPES[next((d for d in dtypes if d in (torch.float16, torch.bfloat16)), dtypes[0])]
    of = {k: v for k, v in launch.constants.items() if k != "UPCAST" and (k, v) not in _USUAL}
    shown = {k: v if isinstance(v, str) else int(v) for k, v in of.items()}
    constants = " ".join(f"{k}={v}" for k, v in shown.items())
    return f"{launch.name} {dtype} {constants} warps={launch.warps} stages={launch.stages}"


def compile_for(target: str, launch: Launch) -> Resources:
    """Compile one launch for one target and read its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    function = kernel(launch.name)
    signature, constants, attributes = _specialised(function, launch)
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=gpu, options=options)
    text = built.asm["amdgcn" if amd else "ptx"]
    registers, spills = _amd(text) if amd else _nvidia(built.asm["cubin"])
    return Resources(
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        matrix=len(re.findall(_MATRIX[target], text)),
        conversions=built.asm["ttgir"].count("ttg.convert_layout"),
    )


def _specialised(function: Any, launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return signature, constants and attributes as the JIT would specialise the arguments."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    values = [*launch.arguments, *(launch.constants[p.name] for p in function.params[len(launch.arguments) :])]
    for i, (parameter, value) in enumerate(zip(function.params, values, strict=True)):
        free = parameter.do_not_specialize
        divisible = False
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = f"*{_TYPES[value.dtype]}", True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0 and not free
        if divisible:
            attributes[i,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _nvidia(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    found = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert match is not None, f"the assembly does not say {name}"
        return int(match[1])

    return field("vgpr_count"), field("vgpr_spill_count") + field("private_segment_fixed_size")


def failures(target: str, launch: Launch, found: Resources, known: int | None) -> Iterator[str]:
    """Say what is wrong with a compiled kernel; `known` is the recorded number of registers."""
    if found.spills:
        yield f"spills {found.spills}"
    if found.shared > SHARED_LIMIT[target]:
        yield f"needs {found.shared} bytes of shared memory and {target} has {SHARED_LIMIT[target]}"
    if _variants.multiplies(launch) and not found.matrix:
        yield "has no matrix instruction"
    if launch.name == "compaction.move_kept" and found.conversions:
        # A lane must keep its words: moving them between lanes would need a barrier.
        yield f"changes layouts {found.conversions} times"
    if known is None:
        yield "is not in the committed table"
    elif found.registers > known + REGISTER_TOLERANCE:
        yield f"needs {found.registers} registers and the committed table says {known}"


def main() -> int:
    """Compile, print a table, and write the registers when told to."""
    parser = argparse.ArgumentParser(prog="python -P -m kvpolicy_kernels.aot", description=main.__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target (may be repeated)")
    parser.add_argument("--full", action="store_true", help="the whole matrix instead of a representative set")
    parser.add_argument("--write", type=Path, help="write registers, spills and shared memory to this JSON file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        print("aot: unset TRITON_INTERPRET, because what is interpreted cannot be compiled.", file=sys.stderr)
        return 2
    table: dict[str, dict[str, dict[str, int]]] = {}
    wrong = 0
    for target in options.target or TARGETS:
        for name, launch in unique(full=options.full).items():
            found = compile_for(target, launch)
            table.setdefault(name, {})[target] = asdict(found)
            problems = list(failures(target, launch, found, found.registers))
            wrong += bool(problems)
            print(
                f"{target:7} {found.registers:4} regs {found.shared / 1024:6.1f} KiB {found.spills:4} spilt "
                f"{found.matrix:4} matrix  {name}  {'; '.join(problems)}",
                flush=True,
            )
    if options.write is not None:
        options.write.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{wrong} with problems")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
