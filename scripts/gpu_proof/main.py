"""Run all parts of the proof, one after the other; one JSON and one table, whatever happens to a part or to the script.

Exit status: 0 if all parts passed; 1 if one did not, or the machine lacks what they need; 3 if parts were skipped and
nothing failed; 2 for options that make no sense.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bare
import page
from parts import PARTS, Part, Setting, counted
from supervise import Ended, Supervisor

FORMAT = 1
WHOLE = {False: 480.0, True: 420.0}
"""Seconds of all parts together; the second for a dry run, where a part has as long as is left: it takes some two
minutes on two cores that are free."""
_PROBE = """
import json, platform, torch
from importlib.metadata import version
there = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if there else None,
    "capability": list(torch.cuda.get_device_capability()) if there else None,
    "bytes": torch.cuda.get_device_properties(0).total_memory if there else None,
    "cuda": torch.version.cuda or torch.version.hip, "python": platform.python_version(),
    **{name: version(name) for name in ("torch", "triton", "transformers")},
}))
"""


class Report:
    """The results, written to a file after each change of them.

    Args:
        out: folder of the file.
        parts: all of them; each is `not run` until it has been.
        dry: toy sizes on the CPU.
    """

    def __init__(self, out: Path, parts: Sequence[Part], *, dry: bool) -> None:
        self.file = out / "gpu_proof.json"
        self.data: dict[str, Any] = {
            "format": FORMAT, "dry": dry,
            "begun": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": 0.0, "machine": {}, "notes": [],
            "parts": [{"name": p.name, "outcome": "not run", "why": "", "seconds": 0.0} for p in parts],
        }  # fmt: skip
        self._begin = time.monotonic()
        self.write()

    @property
    def seconds(self) -> float:
        """Return how long the script has run."""
        return time.monotonic() - self._begin

    def set(self, index: int, outcome: str, why: str = "", **more: Any) -> None:
        """Say how a part ended."""
        self.data["parts"][index] |= {"outcome": outcome, "why": why, **more}
        self.write()

    def rest(self, outcome: str, why: str) -> None:
        """Say the same of all parts that have not been run."""
        for part in self.data["parts"]:
            if part["outcome"] == "not run" and not part["why"]:
                part |= {"outcome": outcome, "why": why}
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        self.data["seconds"] = round(self.seconds, 1)
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.file)

    @property
    def code(self) -> int:
        """Return the exit status."""
        outcomes = {part["outcome"] for part in self.data["parts"]}
        return 0 if outcomes == {"passed"} else 3 if outcomes <= {"passed", "skipped"} else 1


def judge(part: Part, ended: Ended, log: str, figures: dict[str, Any] | None, limit: float) -> tuple[str, str]:
    """Return outcome and sentence of a part that has ended."""
    tests = counted(log) if part.tests else None
    done = f"; {tests['passed']} tests had passed and {tests['failed']} failed" if tests else ""
    cut_off = {
        "limit": ("over its limit", f"it was ended after {limit:.0f} s{done}."),
        "stopped": ("stopped", f"the script was told to stop{done}."),
    }
    if ended.why in cut_off:
        return cut_off[ended.why]
    if ended.code is None:
        return "failed", f"{ended.why}."
    if ended.code < 0:
        return "failed", f"the process died of signal {-ended.code}{done}; its log says more."
    return _of_tests(ended.code, log, tests) if tests else _of_a_benchmark(ended.code, log, figures)


def _of_tests(code: int, log: str, tests: dict[str, Any]) -> tuple[str, str]:
    passed, failed, skipped = tests["passed"], tests["failed"], tests["skipped"]
    if failed:
        return "failed", f"{failed} of {passed + failed} tests failed: {tests['failures'][0]}"
    if code or not passed:
        return "failed", f"exit status {code}, {passed} tests passed, {skipped} skipped: {_last_line(log)}"
    return "passed", f"{passed} tests, {skipped} skipped"


def _of_a_benchmark(code: int, log: str, figures: dict[str, Any] | None) -> tuple[str, str]:
    lines = [row["outcome"] for row in (figures or {}).get("rows", [])]
    failed = next((line for line in lines if line.startswith("failed")), None)
    if code:
        return "failed", f"exit status {code}: {failed or _last_line(log)}"
    measured = lines.count("measured")
    return "passed" if measured else "failed", f"{measured} of {len(lines)} lines measured"


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing."


def run_parts(
    parts: Sequence[Part], setting: Setting, report: Report, supervisor: Supervisor, environment: dict[str, str],
    whole: float,
) -> None:  # fmt: skip
    """Run one part after the other; time that a part leaves over is the next ones'."""
    spare = 0.0
    for index, part in enumerate(parts):
        if supervisor.stopped is not None:
            report.rest("not run", f"the script was told to stop ({supervisor.stopped}).")
            return
        why = part.skip(setting)
        if why is not None:
            spare += part.seconds
            report.set(index, "skipped", why)
            print(f"{part.name}: skipped: {why}", flush=True)
            continue
        left = whole - report.seconds
        limit = left if setting.dry else min(part.seconds + spare, left)
        if limit < 10 and limit < part.seconds:
            report.set(index, "not run", f"the {whole:.0f} s of the whole were used up.")
            continue
        report.set(index, "not finished", "the script was ended from outside meanwhile.")
        print(f"{part.name}: {part.shows} (at most {limit:.0f} s)", flush=True)
        log = setting.out / "logs" / f"{part.name}.log"
        setting.figures(part.name).unlink(missing_ok=True)
        more = part.dry_environment if setting.dry else {}
        ended = supervisor.run(part.command(setting, limit), environment | dict(more), limit, log, bare.ROOT)
        spare = max(0.0, spare + part.seconds - ended.seconds)
        text = log.read_text(encoding="utf-8", errors="replace")
        figures = _figures(setting.figures(part.name))
        outcome, why = judge(part, ended, text, figures, limit)
        found = counted(text) if part.tests else figures
        report.set(index, outcome, why, seconds=round(ended.seconds, 1), limit=round(limit), figures=found)
        print(f"{part.name}: {outcome} after {ended.seconds:.0f} s{': ' if why else ''}{why}", flush=True)


def _figures(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def probe(supervisor: Supervisor, setting: Setting, report: Report, environment: dict[str, str]) -> str | None:
    """Ask a process of its own what machine this is, as a broken driver may hang; return why there is no GPU."""
    log = setting.out / "logs" / "machine.log"
    ended = supervisor.run([setting.python, "-P", "-c", _PROBE], environment, 60.0, log, bare.ROOT)
    said = log.read_text(encoding="utf-8", errors="replace")
    try:
        report.data["machine"] = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        how = "did not answer within 60 s" if ended.why == "limit" else f"cannot be imported: {_last_line(said)}"
        return f"torch {how}"
    if report.data["machine"]["device"] is None and not setting.dry:
        return "torch sees no CUDA or HIP device here; --dry runs every part on the CPU at toy sizes"
    return None


def parsed(argv: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_proof.sh", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="every part on the CPU, at toy sizes")
    parser.add_argument("--out", type=Path, default=bare.ROOT / "gpu-proof", help="folder of results (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in parts], metavar="PART", help="some parts")
    parser.add_argument("--seconds", type=float, help="limit of the whole (480, for a dry run 420)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what is missing")
    parser.add_argument("--collect-wheels", type=Path, metavar="DIR", help="only fetch these wheels, with a network")
    parser.add_argument("--python", metavar="3.12", help="with --collect-wheels: for this Python, on Linux x86-64")
    options = parser.parse_args(argv)
    if options.python and not options.collect_wheels:
        parser.error("--python goes with --collect-wheels; set KVPOLICY_PYTHON to choose who runs the parts.")
    return options


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts; return the exit status."""
    options = parsed(argv, parts)
    if options.collect_wheels is not None:
        return collect(options)
    parts = [p for p in parts if options.only is None or p.name in options.only]
    out = options.out.resolve()
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        report, supervisor = Report(out, parts, dry=options.dry), Supervisor()
    except OSError as error:
        print(f"gpu_proof: --out {out} cannot be written ({error.strerror}); name another folder.", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="kvpolicy-gpu-proof-") as own:
            run(parts, options, report, supervisor, Path(own))
    except Exception as error:  # noqa: BLE001 - what the parts left is still to be printed
        report.rest("not run", f"the script itself failed: {type(error).__name__}: {error}.")
    report.write()
    print(page.closing(report.data))
    print(f"All of it: {report.file}")
    return report.code


def run(parts: Sequence[Part], options: argparse.Namespace, report: Report, supervisor: Supervisor, own: Path) -> None:
    """Make the checkout usable in a folder that is thrown away behind it, and run the parts."""
    site, target = own / "site", own / "packages"
    try:
        report.data["notes"] = bare.take(options.wheels, target)
        bare.make_site(site)
    except bare.UnusableError as error:
        report.rest("not run", str(error))
    else:
        out = report.file.parent
        setting = Setting(
            sys.executable, out, options.dry, workers(target, dry=options.dry), bare.without_model(target)
        )
        environment = surroundings(site, target, own)
        why = probe(supervisor, setting, report, environment)
        if why is not None:
            report.rest("not run", f"{why}.")
        run_parts(
            parts if why is None else [], setting, report, supervisor, environment,
            options.seconds or WHOLE[options.dry],
        )  # fmt: skip
        if supervisor.stopped is not None:
            report.rest("not run", f"the script was told to stop ({supervisor.stopped}).")


def collect(options: argparse.Namespace) -> int:
    """Fetch wheels."""
    try:
        bare.collect(options.collect_wheels, options.python)
    except bare.UnusableError as error:
        print(f"gpu_proof: {error}", file=sys.stderr)
        return 1
    print(f"The wheels are in {options.collect_wheels}; carry them along, and give --wheels.")
    return 0


def workers(target: Path, *, dry: bool) -> int:
    """Return how many processes tests may have: compiling kernels takes processors, not the device."""
    there = not bare.missing(bare.FASTER[:1]) or (target / "xdist").exists()
    return min(8, os.cpu_count() or 1) if there and not dry else 1


def surroundings(site: Path, target: Path, own: Path) -> dict[str, str]:
    """Return the environment of the parts: the checkout's packages first, then wheels, then what the machine has."""
    path = [str(site), str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(own / "hypothesis"),
    }  # fmt: skip
    default = Path.home() / ".cache" / "kvpolicy"
    if "KVPOLICY_HOME" not in found and not default.exists():
        found["KVPOLICY_HOME"] = str(own / "home")
    for name in ("KVPOLICY_BACKEND", "TRITON_INTERPRET", "KVPOLICY_DISABLED_PLUGINS", "PYTEST_ADDOPTS"):
        found.pop(name, None)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
