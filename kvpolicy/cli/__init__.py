"""The command line. Heavy libraries are imported by the commands that use them."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Final

_LONGEST_NAME: Final = 200
_SHORT: Final = frozenset({"explain", "list", "schema", "show", "validate"})
"""Commands that are over before garbage matters; most of their time are imports, which make a lot that stays."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error that is reported in a sentence, 2 for wrong usage."""
    short = arguments is None and bool(_SHORT.intersection(sys.argv[1:2]))  # the process is this command alone
    collects = gc.isenabled()
    if short:
        gc.disable()
    from kvpolicy.cli.app import app, options
    from kvpolicy.errors import KVPolicyError, SpecError

    options.debug = False
    old_format = warnings.formatwarning
    warnings.formatwarning = _warned
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kvpolicy")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KVPolicyError as error:
        if options.debug:
            raise
        from kvpolicy.odd_text import harmless

        said = error.problems if isinstance(error, SpecError) and len(error.problems) > 1 else (str(error),)
        sys.stderr.writelines(f"error: {harmless(each)}\n" for each in said)
        return 1
    except OSError as error:
        if options.debug:
            raise
        return _system_error(error)
    finally:
        warnings.formatwarning = old_format
        if short:
            # So that the interpreter, as it ends, does not look through all of torch for cycles. Others may have loaded
            # what complains of every object that is still there at the end, as Triton does.
            gc.freeze()
            if collects:
                gc.enable()
    return 0


def _warned(message: object, *_args: object, **_kwargs: object) -> str:
    from kvpolicy.odd_text import harmless

    return f"warning: {harmless(str(message))}\n"


def _system_error(error: OSError) -> int:
    """Say in a sentence what the system complains of: a path it does not take, or output that cannot be written."""
    from kvpolicy.odd_text import harmless

    if error.filename is None:
        where = "standard output"
        # What is left in the buffers would be tried again at the end, and complained of once more.
        with contextlib.suppress(OSError, ValueError):  # a stream of Python alone has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        name = os.fsdecode(error.filename)
        where = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {harmless(where)}: cannot be used ({error.strerror}); name another one.\n")
    return 1
