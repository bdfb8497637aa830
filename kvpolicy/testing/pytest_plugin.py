"""pytest plugin: the laws as tests, the option --kvpolicy-profile, and the fixture `poisoned_memory`.

``test_laws = laws_of(MyScorer)`` in a test file makes one test for each law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

_profile = "quick"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --kvpolicy-profile."""
    parser.getgroup("kvpolicy").addoption(
        "--kvpolicy-profile",
        choices=("brief", "quick", "thorough"),
        default="quick",
        help="examples per law of kvpolicy: brief (5) or quick (20), always the same; thorough (1000, other ones)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Remember the profile."""
    global _profile  # noqa: PLW0603
    _profile = config.getoption("--kvpolicy-profile", default="quick")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its relatives hand out NaN during the test."""
    from kvpolicy.testing.poison import poisoned_memory as poisoned

    with poisoned():
        yield


def laws_of(*subjects: Any, profile: str | None = None) -> Callable[..., None]:
    """Return a test function with one case for each law and subject.

    Args:
        subjects: component classes or instances, policies, specifications, or policies' names or files.
        profile: ``brief``, ``quick`` or ``thorough``; what --kvpolicy-profile says if None.
    """
    from kvpolicy.testing.checking import BAD, Subject, check, subject_of
    from kvpolicy.testing.laws import Law

    pairs = [(subject, law) for subject in map(subject_of, subjects) for law in (None, *subject.laws)]
    several = len(subjects) > 1

    def name(subject: Subject, law: Law | None) -> str:
        which = law.name if law is not None else "declared_exceptions"
        return f"{subject.name}-{which}" if several else which

    @pytest.mark.parametrize(("subject", "law"), pairs, ids=[name(*pair) for pair in pairs])
    def test_laws(subject: Subject, law: Law | None) -> None:
        __tracebackhide__ = True
        chosen: Any = profile or _profile
        results = check(subject, chosen, laws=[] if law is None else [law])
        for result in results if law is None else results[-1:]:
            if result.status in BAD:
                pytest.fail(str(result), pytrace=False)
            if result.status == "not applicable":
                pytest.skip(result.reason)

    return test_laws
