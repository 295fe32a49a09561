"""The page of a report: that it needs nothing else, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from arms import make_arms

from tokengrow.data.store import TokenStore
from tokengrow.reports.page import breaks, duration, lasted
from tokengrow.reports.report import FACTS, FIGURES, PAGE, POINTS, Report
from tokengrow.training.config import TrainConfig

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

PHONE = """<!doctype html><title></title>
<iframe src="page.html" style="border: 0; width: 390px; height: 844px"></iframe>
<script>addEventListener("message", (told) => document.title = told.data)</script>"""
"""Chromium makes no window narrower than 500 pixels, but a frame in one."""

TELLS = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth,
  pictures: [...document.images].map((image) => [image.naturalWidth, image.clientWidth]),
  tables: [...document.querySelectorAll(".wide")].map((each) => each.scrollWidth),
  runs: document.querySelector(".runs").scrollWidth,
  text: document.body.innerText,
}), "*"))</script>"""


@pytest.fixture(scope="module")
def folder(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report on six runs, one of which has a name that would be a tag; not to be written to."""
    folder = tmp_path_factory.mktemp("page")
    make_arms(folder / "runs", tiny_run, store)
    (folder / "runs" / "scratch").rename(folder / "runs" / "<b>scratch")
    Report.of([folder / "runs"]).write(folder / "report")
    return folder / "report"


def test_the_report_has_every_file(folder: Path) -> None:
    figures = {f"{name}.png" for name in FIGURES}
    assert {path.name for path in folder.iterdir()} == {PAGE, FACTS, POINTS, *figures}


def test_the_page_asks_for_nothing_outside_of_itself(folder: Path) -> None:
    html = (folder / PAGE).read_text()
    for address in re.findall(r"""(?:src|href|srcset)\s*=\s*["']?([^"'\s>]{0,20})""", html):
        assert address.startswith("data:image/png;base64,"[:20])
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert html.count("data:image/png") == len(FIGURES)


def test_a_name_is_text_whatever_it_holds(folder: Path) -> None:
    html = (folder / PAGE).read_text()
    assert "&lt;b&gt;scratch" in html and "<b>scratch" not in html


def test_writing_it_again_replaces_it_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    again = shutil.copytree(folder, tmp_path / "report")
    (again / "notes.txt").write_text("mine")
    (again / PAGE).write_text("old")
    Report.of([folder.parent / "runs" / "small"]).write(again)
    assert "The run" in (again / PAGE).read_text()
    assert (again / "notes.txt").read_text() == "mine"
    assert not (again / "loss-vs-flops-end.png").exists(), "a single run has no such figure"


def test_a_name_breaks_between_its_parts_and_not_inside_of_them() -> None:
    assert breaks("lr=0.0003,layers=2") == "lr=0.0003,<wbr>layers=2"
    assert breaks("stages.large.steps") == "stages.<wbr>large.<wbr>steps"
    assert breaks("a/<b>") == "a/<wbr>&lt;b&gt;"


def test_how_long_something_took_is_said_in_few_characters() -> None:
    assert [duration(s) for s in (41.3, 99.6, 185, 3723, 10_000)] == [
        "41 s", "2 min", "3 min", "62 min", "2 h 47 min",
    ]  # fmt: skip
    session = {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T10:03:00+00:00"}
    assert lasted({**session, "outcome": "stopped"}) == "3 min, stopped"
    assert lasted({**session, "ended": None, "outcome": None}) == "running, or killed"


@browser
def test_on_a_phone_nothing_runs_over_the_edge_and_every_picture_shows(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text((folder / PAGE).read_text() + TELLS)
    (tmp_path / "phone.html").write_text(PHONE)
    seen = json.loads(title_of(tmp_path / "phone.html"))
    assert seen["width"] <= 390
    assert len(seen["pictures"]) == len(FIGURES)
    assert all(natural > 800 and 300 < shown <= 358 for natural, shown in seen["pictures"])
    assert max(seen["tables"]) > 390, "what is wider scrolls inside its own box"
    assert seen["runs"] <= 358, "the costs of all runs are seen without"
    assert "not reached" in seen["text"] and "from small, step 4" in seen["text"]


def title_of(page: Path) -> str:
    """A page's title once its scripts have run."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *words, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
