"""Ahead-of-time compilation without a GPU: ``python -P -m kvpolicy_kernels.aot``, for plugins with ``--calls``.

Every call of a launcher is recorded instead of run, and what it would have launched is compiled: signature, constants,
warps and specialisation are the launcher's own. Registers, spills and shared memory are read from what comes out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from kvpolicy_kernels.launching import Launch, kernel, recording

TARGETS: Final = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SHARED_LIMIT: Final = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip
"""Bytes of shared memory (LDS) that one program may use."""
REGISTER_TOLERANCE: Final = 16
LANES_STAY: Final = ("kvpolicy_kernels._triton", "compaction.move_kept")
"""Package and name of the kernel whose lanes must keep their words: moving them between lanes would need a barrier."""
Table = dict[str, dict[str, dict[str, int]]]
"""Numbers of `Resources` by launch and target."""

# Constants that a name leaves out.
_USUAL: Final = (
    ("PARTS", 1), ("CAPPED", False), ("WITH_SINKS", False), ("EACH", False), ("KIND", "max"), ("PEAK", True),
    ("ITSELF", False),
)  # fmt: skip
_MATRIX: Final = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma|\bmma\.sync",
    "sm_120": r"\bmma\.sync",
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
        products: matrix products in Triton's own dialect, which matrix instructions must come of.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    conversions: int
    products: int


def unique(calls: Mapping[str, Callable[[], object]]) -> dict[str, Launch]:
    """Return what the calls launch by a readable name, each only once. Nothing runs, on any device."""
    found: dict[str, Launch] = {}
    for call in calls.values():
        launches: list[Launch] = []
        with recording(launches.append):
            call()
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
    function = kernel(launch.package, launch.name)
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
        products=len(re.findall(r"\btt\.dot\b", built.asm["ttir"])),
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
    if found.products and not found.matrix:
        yield "has no matrix instruction"
    if (launch.package, launch.name) == LANES_STAY and found.conversions:
        yield f"changes layouts {found.conversions} times"
    if known is None:
        yield "is not in the committed table"
    elif found.registers > known + REGISTER_TOLERANCE:
        yield f"needs {found.registers} registers and the committed table says {known}"


def read_table(path: Path, launches: Mapping[str, Launch]) -> Table:
    """Return the rows of a table that are still launched; no rows where there is no file."""
    rows: Table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: row for name, row in rows.items() if name in launches}


def main() -> int:
    """Compile, print a table, and write it when told to."""
    parser = argparse.ArgumentParser(prog="python -P -m kvpolicy_kernels.aot", description=main.__doc__)
    parser.add_argument("--calls", default="kvpolicy_kernels.variants:variants", metavar="MODULE:FUNCTION",
                        help="a function that takes full= and returns calls of launchers by label")  # fmt: skip
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target (may be repeated)")
    parser.add_argument("--kernel", action="append", help="only launches whose names begin so (may be repeated)")
    parser.add_argument("--full", action="store_true", help="the whole matrix instead of a representative set")
    parser.add_argument("--missing", action="store_true", help="only what the file of --write does not have")
    parser.add_argument("--write", type=Path, metavar="FILE",
                        help="write the numbers to this JSON file; those of other launches stay in it")  # fmt: skip
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        return _refused("unset TRITON_INTERPRET, because what is interpreted cannot be compiled")
    if options.missing and options.write is None:
        return _refused("--missing says what to leave out by the file of --write; name one")
    module, _, function = options.calls.partition(":")
    try:
        calls = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        return _refused(f"--calls {options.calls} is no function ({error}); write MODULE:FUNCTION")
    try:
        table = read_table(options.write, unique(calls(full=True))) if options.write is not None else {}
    except (OSError, ValueError, AttributeError) as error:
        return _refused(f"{options.write} is no table of this program ({error}); write another file, or remove it")
    launches = unique(calls(full=options.full))
    if options.kernel:
        launches = {name: of for name, of in launches.items() if name.startswith(tuple(options.kernel))}
    if not launches:
        return _refused("nothing is launched; --kernel takes the beginnings of the names that a run without it prints")
    wrong = 0
    for target in options.target or TARGETS:
        for name, launch in launches.items():
            if options.missing and target in table.get(name, {}):
                continue
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


def _refused(why: str) -> int:
    print(f"aot: {why}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
