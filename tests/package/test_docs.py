"""Tests of the documentation: commands compose, code parses, and links have targets."""

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.cli.sweep import SWEEPS
from tokengrow.distributed.launch import CLUSTER_GUIDE

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?tokengrow (\w+) (.*)$", re.MULTILINE)
READER_RECIPE = "--config-dir"  # marks a command with a recipe of the reader


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def commands() -> list[Any]:
    """Return (verb, arguments) of each documented command."""
    return [
        pytest.param(verb, shlex.split(rest), id=f"{page.stem}: {verb} {rest}")
        for page in PAGES
        for block in blocks(page, "")
        for verb, rest in COMMAND.findall(block)
        if READER_RECIPE not in rest
    ]


@pytest.mark.parametrize(("verb", "arguments"), commands())
def test_documented_command_composes(
    verb: str, arguments: list[str], composed: Callable[..., dict[str, Any]]
) -> None:
    overrides = [word for word in arguments if not word.startswith("--")]
    if "--multirun" in arguments:  # keep one value of each sweep
        overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", word) for word in overrides]
    values = composed(verb, *overrides)
    for word in overrides:
        key, _, value = word.partition("=")
        if key in values and not isinstance(values[key], dict) and not value.startswith("["):
            expected = float(value) if isinstance(values[key], float) else value
            text = str(values[key])
            assert (text.lower() if isinstance(values[key], bool) else text) == str(expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documented_python_parses_and_names_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokengrow"):
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("page", [CLUSTER_GUIDE, SWEEPS])
def test_page_named_in_error_message_exists(page: str) -> None:
    assert (ROOT / page).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_readme_lists_the_packages() -> None:
    tree = blocks(ROOT / "README.md", "")[-1]
    listed = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    package = ROOT / "tokengrow"
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert listed == packages
