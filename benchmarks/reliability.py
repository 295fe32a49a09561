"""What a run survives: the tests that break something on purpose, counted by what they break.

    python -m benchmarks.reliability               those of `make test` and of `make test-slow`
    python -m benchmarks.reliability -m fault ...  arguments for pytest in place of `-m fault tests`

A test says what it breaks with `@pytest.mark.fault(what, how, outcome)`; one that does so more than
once adds `record_property("times", {when: times})`. What it shows on the way goes to stderr, one
CSV row for each fault to stdout; the exit status is pytest's.
"""

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any

import pytest

Fault = tuple[str, str, str]
"""What, how, and what comes of it."""


class Counts:
    """A plugin of pytest that counts faults and how many of them were survived."""

    def __init__(self) -> None:
        self.injected, self.survived = Counter[Fault](), Counter[Fault]()
        self.skipped = Counter[Fault]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        mark = item.get_closest_marker("fault")
        if mark is not None and (report.when == "call" or not report.passed):
            what, how, outcome = mark.args
            for when, times in dict(report.user_properties).get("times", {"": 1}).items():
                fault = (what, how + when, outcome)
                self.injected[fault] += 0 if report.skipped else times
                self.survived[fault] += times if report.passed else 0
                self.skipped[fault] += report.skipped
        return report

    def rows(self) -> Iterator[dict[str, Any]]:
        for fault, times in self.injected.items():
            what, how, outcome = fault
            yield {
                "fault": what,
                "injected": how,
                "outcome": outcome,
                "times": times,
                "survived": self.survived[fault],
                "skipped": self.skipped[fault],
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "torch": version("torch"),
            }


def main() -> int:
    """Runs the tests; returns pytest's exit status."""
    counts = Counts()
    with redirect_stdout(sys.stderr):
        status = pytest.main(sys.argv[1:] or ["-m", "fault", "tests"], plugins=[counts])
    # Not before: it imports torch, whose number of threads tests/conftest.py sets.
    from tokengrow.bench.rows import print_rows

    print_rows(counts.rows())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
