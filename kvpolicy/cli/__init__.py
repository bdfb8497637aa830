"""The command line. Heavy libraries are imported by the commands that use them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error that is reported in a sentence, 2 for wrong usage."""
    from kvpolicy.cli.app import app, options
    from kvpolicy.errors import KVPolicyError

    options.debug = False
    old_format = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kvpolicy")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KVPolicyError as error:
        if options.debug:
            raise
        from kvpolicy.spec.odd_text import harmless

        sys.stderr.write(f"error: {harmless(str(error))}\n")
        return 1
    finally:
        warnings.formatwarning = old_format
    return 0
