"""Tests of the HTML page of a report: it is self-contained, and a browser shows it correctly."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import train_runs

from tokengrow.data.store import TokenStore
from tokengrow.reports.page import add_line_breaks, session_length
from tokengrow.reports.report import JSON_FILE, PAGE_FILE, PLOTS, POINTS_FILE, Report
from tokengrow.training.config import TrainConfig

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

PHONE = """<!doctype html><title></title>
<iframe src="page.html" style="border: 0; width: 390px; height: 844px"></iframe>
<script>addEventListener("message", (message) => document.title = message.data)</script>"""
"""Page with a frame of the width of a phone; Chromium has no window narrower than 500 pixels."""

MEASURE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth,
  images: [...document.images].map((image) => [image.naturalWidth, image.clientWidth]),
  tables: [...document.querySelectorAll(".wide")].map((each) => each.scrollWidth),
  runs: document.querySelector(".runs").scrollWidth,
  text: document.body.innerText,
}), "*"))</script>"""
"""Script that sends the measured layout of a page to the page around its frame."""


@pytest.fixture(scope="module")
def report_folder(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a report on six runs, one of them named like a tag; tests must not change it."""
    folder = tmp_path_factory.mktemp("page")
    train_runs(folder / "runs", tiny_run, store)
    (folder / "runs" / "scratch").rename(folder / "runs" / "<b>scratch")
    Report.from_paths([folder / "runs"]).write(folder / "report")
    return folder / "report"


def test_report_has_every_file(report_folder: Path) -> None:
    plots = {f"{name}.png" for name in PLOTS}
    names = {path.name for path in report_folder.iterdir()}
    assert names == {PAGE_FILE, JSON_FILE, POINTS_FILE, *plots}


def test_page_is_self_contained(report_folder: Path) -> None:
    html = (report_folder / PAGE_FILE).read_text()
    for address in re.findall(r"""(?:src|href|srcset)\s*=\s*["']?([^"'\s>]{0,20})""", html):
        assert address.startswith("data:image/png;base64,"[:20])
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert html.count("data:image/png") == len(PLOTS)


def test_names_are_escaped(report_folder: Path) -> None:
    html = (report_folder / PAGE_FILE).read_text()
    assert "&lt;b&gt;scratch" in html and "<b>scratch" not in html


def test_second_report_replaces_only_the_first(report_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(report_folder, tmp_path / "report")
    (copy / "notes.txt").write_text("mine")
    (copy / PAGE_FILE).write_text("old")
    Report.from_paths([report_folder.parent / "runs" / "small"]).write(copy)
    assert "The run" in (copy / PAGE_FILE).read_text()
    assert (copy / "notes.txt").read_text() == "mine"
    assert not (copy / "loss-vs-flops-end.png").exists(), "a single run does not have this plot"


def test_name_wraps_only_between_its_parts() -> None:
    assert add_line_breaks("lr=0.0003,layers=2") == "lr=0.0003,<wbr>layers=2"
    assert add_line_breaks("stages.large.steps") == "stages.<wbr>large.<wbr>steps"
    assert add_line_breaks("a/<b>") == "a/<wbr>&lt;b&gt;"


def test_session_has_its_duration_and_outcome() -> None:
    session = {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T10:03:00+00:00"}
    assert session_length({**session, "outcome": "stopped"}) == "3 min, stopped"
    assert session_length({**session, "ended": None, "outcome": None}) == "running, or killed"


@browser
def test_page_fits_on_a_phone(report_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text((report_folder / PAGE_FILE).read_text() + MEASURE)
    (tmp_path / "phone.html").write_text(PHONE)
    layout = json.loads(rendered_title(tmp_path / "phone.html"))
    assert layout["width"] <= 390
    assert len(layout["images"]) == len(PLOTS)
    assert all(natural > 800 and 300 < shown <= 358 for natural, shown in layout["images"])
    assert max(layout["tables"]) > 390, "a wider table scrolls inside its own box"
    assert layout["runs"] <= 358, "the costs of all runs are visible without scrolling"
    assert "not reached" in layout["text"] and "from small, step 4" in layout["text"]


def rendered_title(page: Path) -> str:
    """Return the title of a page after its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    result = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    match = re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL)
    assert match, result.stderr
    return match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
