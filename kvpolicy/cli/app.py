"""The commands and their options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvpolicy.cli.calibrating import calibrate
from kvpolicy.cli.checking import check
from kvpolicy.cli.explaining import explain
from kvpolicy.cli.planning import plan
from kvpolicy.cli.scaffolding import new
from kvpolicy.cli.studying import study
from kvpolicy.cli.tracing import trace


class _Words(TyperGroup):
    """The commands; what is wrong with the words is said harmlessly, for they may hold what a terminal obeys."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _harmlessly():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _harmlessly():
            return super().invoke(ctx)


@contextmanager
def _harmlessly() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # a ClickException, wherever this typer has that
            from kvpolicy.odd_text import harmless

            error.message = harmless(error.message) + _commands(error)  # type: ignore[attr-defined]
        raise


def _commands(error: Any) -> str:
    """Name the commands that there are, where one was asked for that is not."""
    context = getattr(error, "ctx", None)
    if context is None or not error.message.startswith("No such command") or "Did you mean" in error.message:
        return ""
    return f" Commands: {', '.join(context.command.list_commands(context))}."


app = typer.Typer(
    name="kvpolicy",
    cls=_Words,
    help="KV-cache eviction policies: list, inspect, check and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class Options:
    """Options that hold for all commands."""

    debug: bool = False


options = Options()


def _version(asked: bool) -> None:
    if asked:
        import kvpolicy

        typer.echo(f"kvpolicy {kvpolicy.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="KVPOLICY_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    options.debug = debug


@app.command("list")
def list_(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORD", help="Only what has all these words in its line.")
    ] = None,
    *,
    kind: Annotated[
        str | None,
        typer.Option(help="Only this kind: policy, importance, redundancy, mixer, ..., study, table, backend."),
    ] = None,
    runs: Annotated[
        str | None, typer.Option(metavar="prefill|decode", help="Only policies that compact then, or at both times.")
    ] = None,
    package: Annotated[str | None, typer.Option(help="Only what this package brings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the policies as in docs/methods.md.")] = False,
) -> None:
    """List policies, components, studies, tables and backends, when a policy runs, and what package brings each."""
    from kvpolicy.errors import KVPolicyError

    if markdown:
        from kvpolicy.cli.methods import methods_markdown

        if json or words or kind is not None or runs is not None:
            raise KVPolicyError("list: --markdown is a table of all policies (of a --package); leave the others out.")
        typer.echo(methods_markdown(package), nl=False)
        return
    from kvpolicy.cli.listing import Filter, print_list

    print_list(Filter(tuple(words or ()), kind, runs, package), as_json=json)


@app.command()
def show(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE",
            help="A policy, component, study, table or backend, as `kvpolicy list` names it (rkv, key_cosine, "
            "importance.none, study.rkv-density), or the file of a policy or study.",
        ),
    ],
    *,
    diff: Annotated[bool, typer.Option("--diff", help="Show where two policies differ: --diff A B.")] = False,
) -> None:
    """Show a policy or another thing in full: paper, departures, parameters with their meaning, what uses it."""
    from kvpolicy.errors import KVPolicyError

    if len(names) != 1 + diff:
        wanted = "two policies, as in: show --diff rkv rkv-code" if diff else "one, or two policies with --diff"
        given = "one name was" if len(names) == 1 else f"{len(names)} names were"
        raise KVPolicyError(f"show: {given} given; name {wanted}.")
    if diff:
        from kvpolicy.cli.diffing import print_difference

        print_difference(*names)
    else:
        from kvpolicy.cli.showing_parts import print_named

        print_named(names[0])


@app.command()
def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE|NAME", help="Files of policies and studies, or registered names.")
    ],
) -> None:
    """Check files of policies and studies: a line for each that is valid, and one for every mistake (exit code 1)."""
    from kvpolicy.cli.validating import found_valid, sentences
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.odd_text import harmless

    bad = 0
    for file in files:
        try:
            lines = found_valid(file)
        except KVPolicyError as error:
            if options.debug:
                raise
            bad += 1
            typer.echo(harmless("\n".join(sentences(error))), err=True)
        else:
            typer.echo(harmless("\n".join(lines)))
    raise typer.Exit(1 if bad else 0)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Print the JSON schema of policy and study files, with all installed components, for editors."""
    from json import dumps

    from kvpolicy.outputs import replace_file
    from kvpolicy.study.schema import files_schema

    text = dumps(files_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    replace_file(out, text, "--out")


@app.command()
def generate(
    prompt: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT", help="The prompt, or questions about a --context; - reads one from standard input."
        ),
    ],
    *,
    context: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read and compress this text once; each PROMPT asks about it.")
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of the context that are read, and compressed, at once."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A model folder, an id on the Hugging Face hub, smollm2 (the demo model) or reasoner.")
    ] = "smollm2",
    policy: Annotated[str, typer.Option(metavar="NAME|FILE", help="The policy.")] = "rkv",
    budget: Annotated[
        str | None, typer.Option(metavar="N", help="KV entries per head (256), or a share of the tokens seen (0.1).")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Generate again under this policy and its own budget.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after so many tokens; 256 by default.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens with this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed. Without these three: greedy.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Apply the chat template; by default if there is one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
) -> None:
    """Generate text under a policy, and show what the cache held and how fast it was."""
    from kvpolicy.cli.generating import GenerationRequest, run
    from kvpolicy.errors import KVPolicyError

    if context is None and (len(prompt) != 1 or chunk is not None):
        what = f"{len(prompt)} prompts" if len(prompt) != 1 else "--chunk"
        raise KVPolicyError(f"generate: {what} without a context; give one PROMPT, or name a text with --context FILE.")
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    request = GenerationRequest(
        prompt=prompt[0],
        model=model,
        policies=(policy, *([compare] if compare is not None else [])),
        budget=budget,
        max_new_tokens=max_new_tokens,
        sampling={name: value for name, value in sampling.items() if value is not None},
        chat=chat,
        device=device,
        dtype=dtype,
    )
    if context is None:
        run(request)
        return
    from kvpolicy.cli import asking

    asking.run(request, context, prompt, chunk=chunk, most=max_new_tokens)


app.command()(calibrate)
app.command()(check)
app.command()(explain)
app.command()(plan)
app.command()(trace)
app.add_typer(new, name="new")
app.add_typer(study, name="study")
