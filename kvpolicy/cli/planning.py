"""`kvpolicy plan`: what fits into a memory with the whole cache and under a policy, and what is gained at most."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from kvpolicy.cli.capacity import Machine
    from kvpolicy.cli.memory import ModelShape
    from kvpolicy.cli.modelsize import ModelSize

_MOST_RANKS: Final = 1024
_MOST_BLOCK: Final = 1 << 12


def plan(
    spec: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy's name or file.")] = "rkv",
    *,
    model_config: Annotated[
        str | None, typer.Option(metavar="PLACE", help="A model folder, a config.json, or an id on the hub.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Instead: full-attention layers of the model,")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="its KV heads per layer")] = None,
    head_dim: Annotated[int | None, typer.Option(help="and the size of a head.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; as configured by default.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of the weights, as 5GB, where they are quantised.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="N", help="Entries per head (256), or a share (0.1).")] = None,
    length: Annotated[int, typer.Option("--length", "--context", help="Tokens of a row, its prompt included.")] = 8192,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of its prompt; 128, or all but the last 256 where only prompts compact.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A GPU, as `plan --gpus` lists them.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Instead: the device's memory, as 24GiB.")] = None,
    cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Instead: what is left for caches, behind weights.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s from that memory; without it, speeds are ratios.")
    ] = None,
    use: Annotated[float, typer.Option(help="Share of the memory for weights and caches; the rest computes.")] = 0.9,
    tensor_parallel: Annotated[int, typer.Option(help="Such devices, which split heads and weights.")] = 1,
    block_size: Annotated[int, typer.Option(help="Slots per block of vLLM.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    gpus: Annotated[bool, typer.Option("--gpus", help="List the GPUs that are known, with their sources.")] = False,
) -> None:
    """Plan the memory of a model: bytes per token, the largest batch, full and under a policy, and the most it gains.

    This is arithmetic, and nothing is run; `kvpolicy study plan` is about studies.
    """
    import kvpolicy
    from kvpolicy.cli.explaining import LONGEST, check_lengths, default_prompt, shape_of
    from kvpolicy.cli.generating import budget_of
    from kvpolicy.cli.plan_answer import PlanQuestion, answer_of

    if gpus:
        _print_gpus()
        return
    check_lengths({"--length": length, "--prompt": prompt}, prompt, length)
    for option, value, most in (
        ("--tensor-parallel", tensor_parallel, _MOST_RANKS), ("--block-size", block_size, _MOST_BLOCK),
        ("--length", length, LONGEST),
    ):  # fmt: skip
        _check(option, value, 1 <= value <= most, f"a whole number from 1 to {most:,}")
    _check("--use", use, 0 < use <= 1, "a share above 0 and up to 1")
    if bandwidth is not None:
        _check("--bandwidth", bandwidth, 0 < bandwidth < 1e6, "GB/s, such as 900")
    found = kvpolicy.load(spec, budget=budget_of(budget))
    policy = found.build()
    shape = shape_of(model_config, layers, kv_heads, head_dim, dtype)
    size = _size(model_config, shape, layers is not None, weights)
    shape, size = _split(shape, size, tensor_parallel)
    machine = _machine(gpu, memory, cache_memory, bandwidth, use, size)
    asked = PlanQuestion(found.policy, policy, shape, size, machine, length, default_prompt(policy, length, prompt))
    answer = answer_of(asked, block_size)
    if as_json:
        typer.echo(json.dumps(answer.as_json(), indent=2))
    else:
        from kvpolicy.cli.plan_text import print_plan

        print_plan(answer, tensor_parallel)


def _check(option: str, value: float, fine: bool, wanted: str) -> None:
    from kvpolicy.errors import KVPolicyError

    if not fine:
        raise KVPolicyError(f"{option}: {value} makes no sense; write {wanted}.")


def _size(place: str | None, shape: ModelShape, by_hand: bool, weights: str | None) -> ModelSize:
    """Return the rest of the model: as its configuration says, or as given."""
    from kvpolicy.cli.memory import DTYPES, read_config
    from kvpolicy.cli.modelsize import EXAMPLE, ModelSize, bytes_of, size_from_config
    from kvpolicy.errors import KVPolicyError

    given = None if weights is None else bytes_of(weights, "--weights")
    if place is not None:
        return size_from_config(place, read_config(place), shape.dtype, given)
    if by_hand:
        if given is None:
            raise KVPolicyError("--weights: is missing; --layers, --kv-heads and --head-dim say nothing of it.")
        return ModelSize(given)
    return replace(EXAMPLE, weights=given or EXAMPLE.parameters * DTYPES[shape.dtype][1])


def _split(shape: ModelShape, size: ModelSize, ranks: int) -> tuple[ModelShape, ModelSize]:
    """Return what one rank has."""
    from kvpolicy.errors import KVPolicyError

    if ranks == 1:
        return shape, size
    if uneven := [heads for _, heads, _ in shape.groups if heads % ranks]:
        raise KVPolicyError(
            f"--tensor-parallel: {ranks} does not divide the {uneven[0]} KV heads of a layer; write a divisor."
        )
    unlike = tuple((layers, heads // ranks, dim) for layers, heads, dim in shape.unlike)
    return replace(shape, kv_heads=shape.kv_heads // ranks, unlike=unlike), size.split(ranks)


def _machine(
    gpu: str | None, memory: str | None, cache: str | None, bandwidth: float | None, use: float, size: ModelSize
) -> Machine:
    """Return the device, with what it has left for caches."""
    from kvpolicy.cli.capacity import Machine
    from kvpolicy.cli.devices import gpu_of
    from kvpolicy.cli.modelsize import bytes_of
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.html_text import size as short

    given = {"--gpu": gpu, "--memory": memory, "--cache-memory": cache}
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        wrong = "is missing" if not named else f"and {named[-1]} say both"
        raise KVPolicyError(f"{(named or ['--gpu'])[0]}: {wrong}; give one of --gpu, --memory and --cache-memory.")
    fast = None if bandwidth is None else bandwidth * 1e9
    if cache is not None:
        return Machine("as given", bytes_of(cache, "--cache-memory"), fast)
    device = None if gpu is None else gpu_of(gpu)
    if device is not None and fast is not None:
        raise KVPolicyError("--bandwidth: --gpu says it already; give one of them.")
    whole = device.memory if device is not None else bytes_of(memory or "", "--memory")
    left = int(whole * use) - size.weights
    if left <= 0:
        raise KVPolicyError(
            f"{named[0]}: {size.weights:,} bytes of weights do not fit into {use:g} of {whole:,} bytes; give more "
            "memory, --tensor-parallel, or the --weights of a quantised model."
        )
    if device is None:
        return Machine(short(whole), left, fast)
    return Machine(device.name, left, device.bandwidth, device.arithmetic)


def _print_gpus() -> None:
    from rich.table import Table

    from kvpolicy.cli.devices import GPUS
    from kvpolicy.cli.terminal import output, widen

    table = Table("GPU", "GB", "GB/s", "TFLOP/s, dense bf16", "from", box=None, pad_edge=False)
    for each in GPUS:
        numbers = (each.memory / 1e9, each.bandwidth / 1e9, each.arithmetic / 1e12)
        table.add_row(each.name, *(f"{number:,.0f}" for number in numbers), each.source)
    console = output()
    widen(console, [table])
    console.print(table)
