"""Fault-injection tests, counted by fault.

    python -m benchmarks.reliability               tests of `make test` and `make test-slow`
    python -m benchmarks.reliability -m fault ...  arguments of pytest instead of `-m fault tests`

A test declares its fault with `@pytest.mark.fault(what, how, outcome)`. A test that injects it
several times adds `record_property("times", {when: times})`. The output of pytest goes to stderr,
one CSV row per fault to stdout. The exit status is that of pytest.
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
"""Fault, method of injection, and expected outcome."""


class FaultCounter:
    """Plugin of pytest that counts injected and survived faults."""

    def __init__(self) -> None:
        self.injected, self.survived = Counter[Fault](), Counter[Fault]()
        self.skipped = Counter[Fault]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Count the fault of a test from its report."""
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
        """Yield one row per fault."""
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
    """Run the tests; return pytest's exit status."""
    counter = FaultCounter()
    with redirect_stdout(sys.stderr):
        status = pytest.main(sys.argv[1:] or ["-m", "fault", "tests"], plugins=[counter])
    # Imported late, because it imports torch, and tests/conftest.py sets the number of threads.
    from tokengrow.bench.rows import print_rows

    print_rows(counter.rows())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
