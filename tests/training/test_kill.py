"""The command itself, killed with SIGKILL at random moments: it always ends with the same bits."""

import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from victim import Watched

AT_MOST = {"step": 8, "save": 4, "growth": 1, "between": 3}
"""Activity of a run to the maximum number of times it started before the kill."""

FAULT = pytest.mark.fault("SIGKILL", "at a random moment", "the same final bits")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")


def killed_while(kinds: list[str], climb: Any, folder: Path, seed: int) -> Counter[str]:
    """Kill runs during these activities; each resumes where the previous one was killed.

    Returns:
        What they did when they died, which is a little after the kill was sent.
    """
    died, watched, chance, number = Counter[str](), Watched(), Random(seed), 1
    for kind in kinds:
        status = 0
        while not status:
            out = folder / str(number)
            times, delay = chance.randint(1, AT_MOST[kind]), chance.random() * watched.usually(kind)
            status = watched.run(climb.arguments(out), folder / "log", kind, times, delay)
            if status == 0:  # it ended before that: the next one is killed
                assert climb.ended_as_whole(out)
                number += 1
        assert status == -signal.SIGKILL, (folder / "log").read_text()
        died[watched.now] += 1
    assert watched.run(climb.arguments(out), folder / "log") == 0, (folder / "log").read_text()
    assert climb.ended_as_whole(out)
    return died


@FAULT
def test_killed_in_any_activity_resumes_bit_identically(
    climb: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    died = killed_while(["step", "save", "growth", "between"], climb, tmp_path, seed=1)
    record_property("times", {f": {kind}": times for kind, times in died.items()})
    assert died.total() == 4


@pytest.mark.slow
@FAULT
def test_killed_at_25_random_moments_it_ends_with_the_same_bits(
    climb: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kinds = [*AT_MOST] * 6 + ["step"]
    Random(2).shuffle(kinds)
    died = killed_while(kinds, climb, tmp_path, seed=2)
    record_property("times", {f": {kind}": times for kind, times in died.items()})
    assert died.total() == 25
    assert all(died[kind] >= 2 for kind in AT_MOST), died
