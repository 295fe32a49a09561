"""`tokengrow generate`: text from a checkpoint, printed or in a file, from one prompt or many."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.generate import SpeedMeter, sample_text
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.generation.text_generation import Continuation

Command = Callable[..., Any]
Records = list[dict[str, Any]]

PROMPTS = ("import ", "def f(x):", "class A:\n    def __init__(self", "x")
SPEED = re.compile(r"(\d+) tokens?: first token.* after \d+\.\d\d s(, then [\d,.]+ tokens/s)?\n")


@pytest.fixture
def generated(command: Command, source: Path) -> Callable[..., str]:
    """`generated(*arguments)` returns the output of the command for at most 8 tokens."""

    def run(*arguments: str) -> str:
        outcome = command("generate", f"source={source}", "sampling.max_tokens=8", *arguments)
        assert outcome.status == 0, outcome.err
        return outcome.out

    return run


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Four prompts of different lengths."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


def records(file: Path) -> Records:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class TestOnePrompt:
    def test_the_prompt_and_its_continuation_are_printed(
        self, generated: Callable[..., str]
    ) -> None:
        printed = generated("prompt=def f(x):")
        assert printed.startswith("def f(x):")
        assert len(printed) > len("def f(x):\n")

    def test_the_speed_is_printed_on_stderr(self, command: Command, source: Path) -> None:
        outcome = command("generate", f"source={source}", "sampling.max_tokens=8")
        match = SPEED.fullmatch(outcome.err)
        assert match is not None, outcome.err
        assert match[1] == "8" and match[2]

    def test_an_empty_one_begins_a_document(self, generated: Callable[..., str]) -> None:
        printed = generated()
        assert printed.strip()
        assert "<|endoftext|>" not in printed

    @pytest.mark.parametrize("prompt", ["2024", "3.5"])
    def test_one_that_looks_like_a_number_is_text(
        self, generated: Callable[..., str], prompt: str
    ) -> None:
        assert generated(f"prompt={prompt}").startswith(prompt)

    def test_a_run_stands_for_its_newest_checkpoint(
        self, generated: Callable[..., str], source: Path
    ) -> None:
        assert generated(f"source={source.parent}") == generated()

    def test_a_stop_string_ends_the_text(self, generated: Callable[..., str]) -> None:
        whole = generated("sampling.temperature=0", "prompt=import ")
        text = whole.removeprefix("import ").removesuffix("\n")
        stop = text[3:5]
        found = generated("sampling.temperature=0", "prompt=import ", f'stop=["~~~~", "{stop}"]')
        assert found == f"import {text[: text.index(stop)]}\n"

    @pytest.mark.parametrize("stop", [r'stop=["\n"]', 'stop=["\n"]'], ids=["typed", "itself"])
    def test_a_line_end_can_be_typed(self, generated: Callable[..., str], stop: str) -> None:
        settings = ["prompt=def f(x):", "sampling.seed=1", "sampling.max_tokens=40"]
        text, found = generated(*settings), generated(*settings, stop)
        first, *others = text.rstrip().split("\n")
        assert others and found == f"{first}\n"

    def test_every_setting_of_sampling_reaches_the_draw(
        self, generated: Callable[..., str]
    ) -> None:
        settings = ["seed=0", "seed=1", "temperature=3", "top_k=3", "top_p=0.05"]
        settings += ["repetition_penalty=50", "max_tokens=50"]
        texts = [generated("sampling.max_tokens=60", f"sampling.{each}") for each in settings]
        assert len(set(texts)) == len(settings)


def test_a_seed_decides_the_text(source: Path) -> None:
    checkpoint = load_checkpoint(source)

    def text(seed: int) -> str:
        return sample_text(checkpoint, "import ", SamplingConfig(max_tokens=16, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_likeliest_text_does_not_depend_on_the_seed(source: Path) -> None:
    checkpoint = load_checkpoint(source)
    texts = {
        sample_text(checkpoint, "import ", SamplingConfig(temperature=0, seed=seed))
        for seed in (1, 2)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    "growth",
    [
        ["model.tokens.ffn=40"],
        ["model.layers=3", "model.width=48", "model.heads=3", "model.tokens.query=12"],
    ],
    ids=["tokens", "everywhere"],
)
def test_a_grown_rung_generates_the_text_of_its_source(
    command: Command,
    generated: Callable[..., str],
    source: Path,
    tmp_path: Path,
    growth: list[str],
) -> None:
    arguments = ["prompt=def f(x):", "sampling.max_tokens=60", "sampling.temperature=1"]
    before = generated(*arguments)
    out = tmp_path / "grown"
    assert command("grow", f"source={source}", *growth, f"out={out}").status == 0
    assert generated(*arguments, f"source={out}") == before
    assert generated(*arguments, f"source={out}", "sampling.seed=1") != before


class TestManyPrompts:
    def test_texts_are_printed_in_order_behind_their_prompts(
        self, generated: Callable[..., str], prompt_file: Path
    ) -> None:
        alone = [generated(f"prompt={prompt}") for prompt in PROMPTS]
        for size in (1, 2, 16):
            assert generated(f"prompts={prompt_file}", f"batch_size={size}") == "\n".join(alone)

    def test_into_a_file_they_come_a_line_each(
        self, generated: Callable[..., str], prompt_file: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "new" / "texts.jsonl"
        assert generated(f"prompts={prompt_file}", f"out={out}", "batch_size=3") == (
            f"texts  {out}\n"
        )
        found = records(out)
        assert [list(record) for record in found] == [
            ["prompt", "text", "tokens", "finish_reason"]
        ] * 4
        for record, prompt in zip(found, PROMPTS, strict=True):
            assert record["prompt"] == prompt
            assert generated(f"prompt={prompt}") == f"{prompt}{record['text']}\n"
            assert (record["tokens"], record["finish_reason"]) == (8, "max_tokens")

    def test_a_line_of_a_text_file_is_a_prompt(
        self, generated: Callable[..., str], tmp_path: Path
    ) -> None:
        file, out = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
        file.write_bytes("\ufeffimport \r\n\n    def é(x):\n".encode())
        generated(f"prompts={file}", f"out={out}")
        assert [record["prompt"] for record in records(out)] == ["import ", "    def é(x):"]

    def test_prompts_may_come_through_a_pipe(self, source: Path) -> None:
        words = f"source={source}", "sampling.max_tokens=8", "prompts=/dev/stdin"
        command = [sys.executable, "-m", "tokengrow", "generate", *words]
        done = subprocess.run(
            command, input="import \n\ndef f(x):\n", capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("import ")
        assert "\n\ndef f(x):" in done.stdout

    def test_a_prompt_longer_than_the_context_is_warned_about(
        self, command: Command, source: Path
    ) -> None:
        words = "generate", f"source={source}", "sampling.max_tokens=1"
        [said, speed] = command(*words, f"prompt={'x = 1; ' * 30}").err.splitlines()
        assert re.fullmatch(
            r"the prompt has \d+ tokens; the model was trained on texts of up to 32", said
        )
        assert SPEED.fullmatch(speed + "\n")

    def test_one_prompt_may_go_into_a_file_too(
        self, generated: Callable[..., str], tmp_path: Path
    ) -> None:
        out = tmp_path / "texts.jsonl"
        generated("prompt=import ", f"out={out}", "stop=[e]")
        [record] = records(out)
        assert record["prompt"] == "import "

    def test_the_speed_counts_every_text(
        self, command: Command, source: Path, prompt_file: Path
    ) -> None:
        outcome = command(
            "generate", f"source={source}", f"prompts={prompt_file}", "sampling.max_tokens=3"
        )
        match = SPEED.fullmatch(outcome.err)
        assert match is not None and match[1] == "12"


class TestInteractive:
    def test_each_line_is_a_prompt(
        self, generated: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = "import ", "def f(x):"
        alone = [generated(f"prompt={line}").removeprefix(line) for line in lines]
        monkeypatch.setattr(sys, "stdin", io.StringIO("import \n\ndef f(x):\n"))
        assert generated("interactive=true") == "".join(alone) + "\n"

    def test_ctrl_c_ends_a_text_and_exits_at_the_prompt(
        self, source: Path, terminal: Callable[..., "Terminal"]
    ) -> None:
        # The most likely text repeats itself without end, so only Ctrl-C ends it.
        words = "sampling.temperature=0", "sampling.max_tokens=20000"
        there = terminal(f"source={source}", "interactive=true", *words)
        there.wait_for("Ctrl-D exits")
        there.wait_for("> ")
        there.type("import \n")
        there.wait_for("import ")
        there.wait_for("u")  # the text has begun
        there.type("\x03")
        assert "tokens/s" not in there.wait_for("> ")
        assert there.exit_status_after("\x03") == 0
        assert "Traceback" not in there.rest()


SPAWN = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""


class Terminal:
    """`tokengrow generate` in a pseudo-terminal, with methods to type and to read."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        command = [sys.executable, "-c", SPAWN, sys.executable, "-m", "tokengrow", "generate"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*command, *arguments], stdin=pipe, stdout=pipe)
        self._read = ""

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def exit_status_after(self, keys: str) -> int:
        """Type `keys`, repeatedly if necessary, and return the exit status."""
        while True:
            self.type(keys)
            # Readline misses a signal between its prompt and its wait for a key. Only a test types
            # so early, so it types again.
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(10)

    def wait_for(self, words: str) -> str:
        """Return the output before `words`, and remove both from the buffer."""
        assert self.process.stdout is not None
        while words not in self._read:
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, f"it ended without {words!r}: {self._read}"
            self._read += more.decode(errors="replace")
        shown, _, self._read = self._read.partition(words)
        return shown

    def rest(self) -> str:
        """Return the remaining output."""
        assert self.process.stdout is not None
        return self._read + self.process.stdout.read().decode(errors="replace")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """`terminal(*arguments)` starts the command in a pseudo-terminal."""
    opened: list[Terminal] = []

    def open_one(*arguments: str) -> Terminal:
        opened.append(Terminal(arguments))
        return opened[-1]

    yield open_one
    for each in opened:
        each.process.kill()
        each.process.communicate()


class TestSpeed:
    """With a fake clock: the rate excludes loading and the first token of a batch."""

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([10.0, 12.0, 12.5, 13.0, 20.0, 21.0, 21.0])
        monkeypatch.setattr("tokengrow.cli.generate.perf_counter", lambda: next(times))

    def watch(self, speed: SpeedMeter, *tokens: tuple[int, ...]) -> None:
        for _ in speed.watch(iter([[Continuation(tokens=n) for n in each] for each in tokens])):
            pass

    def test_of_one_text(self) -> None:
        speed = SpeedMeter()
        self.watch(speed, (1,), (2,), (3,))
        assert str(speed) == "3 tokens: first token after 2.00 s, then 2 tokens/s"

    def test_of_several_batches(self) -> None:
        speed = SpeedMeter()
        self.watch(speed, (1, 1), (2, 2), (3, 2))  # the second text has ended
        self.watch(speed, (0, 1))  # one ends with its first token
        assert str(speed) == (
            "6 tokens: first token of each of 2 batches after 1.50 s, then 3 tokens/s"
        )

    def test_of_a_single_token(self) -> None:
        speed = SpeedMeter()
        self.watch(speed, (1,))
        assert str(speed) == "1 token: first token after 2.00 s"
