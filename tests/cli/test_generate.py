"""`tokengrow generate`: text from a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.generate import stream_text
from tokengrow.model.generate import SamplingConfig

Command = Callable[..., Any]


def test_it_prints_the_prompt_and_goes_on(command: Command, source: Path) -> None:
    outcome = command("generate", f"source={source}", "prompt=def f(x):", "sampling.max_tokens=8")
    assert outcome.status == 0
    assert outcome.err == ""
    assert outcome.out.startswith("def f(x):")
    assert len(outcome.out) > len("def f(x):\n")


def test_a_seed_decides_the_text(source: Path) -> None:
    checkpoint = load_checkpoint(source)

    def text(seed: int) -> str:
        return "".join(stream_text(checkpoint, "import ", SamplingConfig(max_tokens=16, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_likeliest_text_does_not_depend_on_the_seed(source: Path) -> None:
    checkpoint = load_checkpoint(source)
    texts = {
        "".join(stream_text(checkpoint, "import ", SamplingConfig(temperature=0, seed=seed)))
        for seed in (1, 2)
    }
    assert len(texts) == 1


def test_an_empty_prompt_begins_a_document(command: Command, source: Path) -> None:
    outcome = command("generate", f"source={source}", "sampling.max_tokens=8")
    assert outcome.status == 0
    assert outcome.out.strip()
    assert "<|endoftext|>" not in outcome.out


def test_a_text_ends_where_the_model_ends_it(source: Path) -> None:
    checkpoint = load_checkpoint(source)
    endless = SamplingConfig(max_tokens=3, temperature=0)
    assert "<|endoftext|>" not in "".join(stream_text(checkpoint, "", endless))


@pytest.mark.parametrize("prompt", ["2024", "3.5"])
def test_a_prompt_that_looks_like_a_number_is_text(
    command: Command, source: Path, prompt: str
) -> None:
    outcome = command("generate", f"source={source}", f"prompt={prompt}", "sampling.max_tokens=2")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(prompt)


def test_a_run_stands_for_its_newest_checkpoint(command: Command, source: Path) -> None:
    texts = [
        command("generate", f"source={folder}", "sampling.max_tokens=8").out
        for folder in (source, source.parent)
    ]
    assert texts[0] == texts[1]
