"""`kvpolicy calibrate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="headkv, duo-attention, qfilter, triattention, lu-kv, kvzap or trim-kv."),
    ],
    *,
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="What the model reads; may be given several times.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The table, a .safetensors file.")],
    model: Annotated[
        str, typer.Option(help="A model folder, an id on the Hugging Face hub, smollm2 (the demo model) or reasoner.")
    ] = "smollm2",
    runs: Annotated[int, typer.Option(min=1, max=1 << 20, metavar="N", help="Runs of the model at most.")] = 24,
    length: Annotated[int, typer.Option(min=1, max=1 << 20, metavar="N", help="Tokens of each run.")] = 640,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, metavar="N", help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
) -> None:
    """Measure on a model the table that a method needs, such as the scores of its heads; minutes on a CPU."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    from kvpolicy.cli.generating import GenerationRequest, load_model
    from kvpolicy.cli.terminal import messages, output, text_column
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.inputs import read_text
    from kvpolicy.runtimes.opening import require_transformers
    from kvpolicy.tables import SUFFIX, save_table

    if out.suffix != SUFFIX or not out.parent.is_dir():
        raise KVPolicyError(f"--out: {out} should end in {SUFFIX}, and its folder should exist.")
    require_transformers("calibrate")
    from kvpolicy.runtimes.hf.calibration import Settings, check_request
    from kvpolicy.runtimes.hf.calibration import calibrate as measured

    settings = Settings(length=length, runs=runs, seed=seed)
    check_request(method, settings)
    words = "\n\n".join(read_text(file, "text file", option="--text") for file in text)
    note = messages()
    with note.status(f"loading {model}"):
        loaded, tokenizer = load_model(
            GenerationRequest("", model, (), device=device, dtype=dtype), note, user="calibrate"
        )

    command = ["kvpolicy", "calibrate", method, "--model", model]
    command += [part for file in text for part in ("--text", file.as_posix())]
    command += ["--runs", str(runs), "--length", str(length), "--seed", str(seed), "--out", out.as_posix()]
    columns = (text_column("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=note, transient=True) as bar:
        task = bar.add_task(method, total=None)

        def show(left: int) -> None:
            total = bar.tasks[0].total or left
            bar.update(task, total=total, completed=total - left)

        table = measured(
            method,
            loaded,
            tokenizer,
            words,
            name=Path(str(loaded.config._name_or_path)).name,  # noqa: SLF001
            command=shlex.join(command),
            settings=settings,
            progress=show,
        )
    save_table(table, out)
    output().print(f"{out}: {table.kind} of {model}, {out.stat().st_size:,} bytes.", soft_wrap=True)
