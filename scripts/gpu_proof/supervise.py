"""Running one command under a time limit; nothing of it is left when it is over, or the script is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GRACE = 3.0  # seconds between being asked to end and being ended


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status, below 0 for a signal; None if it could not be started.
        seconds: how long it ran.
        why: ``itself``, ``limit``, ``stopped`` (the script was), or why it could not be started.
    """

    code: int | None
    seconds: float
    why: str


class Supervisor:
    """Runs commands one at a time; a signal to stop ends the one that runs, and lets the script write its results.

    Attributes:
        stopped: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.stopped: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: object) -> None:
        self.stopped = signal.Signals(number).name

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], seconds: float, log: Path, folder: Path
    ) -> Ended:
        """Run a command until it ends, its time is up, or the script is told to stop.

        Args:
            command: and its arguments.
            environment: all of its environment variables.
            seconds: its limit.
            log: what it prints goes there.
            folder: where it runs.
        """
        begin = time.monotonic()
        with log.open("wb") as out:
            try:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(environment),
                    cwd=folder, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return Ended(None, 0.0, f"it cannot be started: {error.strerror} ({command[0]})")
            why = "itself"
            while child.poll() is None:
                if self.stopped is not None:
                    why = "stopped"
                elif time.monotonic() - begin > seconds:
                    why = "limit"
                if why != "itself":
                    break
                try:
                    child.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            _end(child)
        return Ended(child.returncode, time.monotonic() - begin, why)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a command and all that it has started, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break  # nobody is left of its group
        except PermissionError:  # what is left is dead and not yet collected (macOS)
            break
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and _alive(child):
            time.sleep(0.05)
    child.wait()


def _alive(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
