"""tokengrow generate: generate text from a checkpoint, to the terminal or to a file."""

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokengrow.checkpoint.store import Checkpoint, load_source
from tokengrow.cli.config import plain_values
from tokengrow.cli.prompts import read_prompts
from tokengrow.cli.runner import new_file, run_command
from tokengrow.console.format import format_three_digits
from tokengrow.data.open_tokens import checkpoint_tokenizer
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.generation.text_generation import Continuation, write
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.parsing import parse_dataclass


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Keys of generate.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is used."""
    prompt: str
    """Start of the text; empty: the end-of-text token, which starts a document."""
    prompts: str | None
    """File of prompts: .txt with one per line, or .jsonl with the key "prompt" per line."""
    batch_size: int
    """Number of prompts of the file in a batch."""
    out: str | None
    """New .jsonl file for the texts; null: print them."""
    interactive: bool
    """Whether to read prompts from the terminal."""
    stop: list[str]
    """Strings that end a text before them; \\n is a line break."""
    sampling: SamplingConfig
    """Sampling settings."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompts is not None:
            raise UserError("prompt and prompts must not both be set. Remove one of them.")
        for key in ("prompt", "prompts", "out"):
            if self.interactive and getattr(self, key):
                raise UserError(
                    f"{key} must not be set with interactive=true, which reads prompts from the "
                    f"terminal and prints texts. Remove {key} or interactive."
                )
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}.")
        if "" in self.stop:
            raise UserError(
                "stop must not contain an empty string, which would end every text. Remove it."
            )


def main(config: DictConfig) -> None:
    """Print or write the continuation of each prompt, and print the speed."""
    arguments = parse_dataclass(GenerateArguments, plain_values(config))
    path = arguments.prompts
    prompts = [arguments.prompt] if path is None else read_prompts(path)
    out = None if arguments.out is None else new_file(arguments.out)
    # Neither the shell nor Hydra turns \n into a line break.
    stop = [text.replace("\\n", "\n") for text in arguments.stop]
    generator = TextGenerator.of(load_source(arguments.source), arguments.sampling, stop)
    generator.warn_long_prompts(prompts)
    if arguments.interactive:
        run_interactive(generator)
        return
    speed = SpeedMeter()
    size = arguments.batch_size
    batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    if out is None:
        print_texts(generator, batches, speed)
    else:
        save_texts(generator, batches, out, speed)
    _print_status(speed)


@dataclass(frozen=True)
class TextGenerator:
    """Model on a device, with its tokenizer and sampling settings."""

    model: LanguageModel
    """Model on its device."""
    tokenizer: Tokenizer
    """Tokenizer of the checkpoint."""
    sampling: SamplingConfig
    """Sampling settings."""
    stop: Sequence[str]
    """Strings that end a text."""

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, sampling: SamplingConfig, stop: Sequence[str] = ()
    ) -> "TextGenerator":
        """Put the model of a checkpoint on a GPU, or on the CPU if there is none.

        Raises:
            UserError: the checkpoint has no tokenizer.
        """
        tokenizer = checkpoint_tokenizer(checkpoint)
        # Half-precision weights are converted on a CPU, where they are slower than float32.
        device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
        return cls(checkpoint.model.to(device, dtype), tokenizer, sampling, stop)

    def warn_long_prompts(self, prompts: list[str]) -> None:
        """Print a warning on stderr about prompts longer than the context of the model."""
        limit = self.model.config.context_length
        lengths = [len(ids) for ids in self.tokenizer.encode_batch(prompts)]
        if long := [length for length in lengths if length > limit]:
            subject = "the prompt has" if len(prompts) == 1 else f"{len(long):,} prompts have up to"
            _print_status(
                f"{subject} {max(long):,} tokens; the model was trained on texts of up to {limit:,}"
            )

    def stream(self, prompts: list[str]) -> Iterator[list[Continuation]]:
        """Generate after the prompts; yield the current texts at every token."""
        start = [self.tokenizer.end_of_text]  # starts a document
        ids = [encoded or start for encoded in self.tokenizer.encode_batch(prompts)]
        return write(self.model, ids, self.tokenizer, self.sampling, self.stop)


def sample_text(checkpoint: Checkpoint, prompt: str, sampling: SamplingConfig) -> str:
    """Return a prompt with its continuation by the model of a checkpoint."""
    [text] = deque(TextGenerator.of(checkpoint, sampling).stream([prompt]), maxlen=1).pop()
    return prompt + text.text


class SpeedMeter:
    """Counter and timer of generated tokens, with the first token of each text timed separately.

    The first token includes the prompt and, on a GPU, compilation and graph capture. Loading the
    checkpoint is not included.
    """

    def __init__(self) -> None:
        self.tokens = self.batches = self._timed = 0
        self._waited = self._seconds = 0.0

    def watch(self, steps: Iterator[list[Continuation]]) -> Iterator[list[Continuation]]:
        """Yield the steps of a batch, and time them."""
        begun, marks = perf_counter(), []  # time and number of tokens at each step
        for texts in steps:
            marks.append((perf_counter(), sum(text.tokens for text in texts)))
            yield texts
        (first, first_tokens), (last, tokens) = marks[0], marks[-1]
        self.batches += 1
        self.tokens += tokens
        self._waited += first - begun
        self._seconds += last - first
        self._timed += tokens - first_tokens

    def __str__(self) -> str:
        text = f"{self.tokens:,} token{'s' * (self.tokens != 1)}: first token"
        if self.batches > 1:
            text += f" of each of {self.batches:,} batches"
        text += f" after {self._waited / self.batches:.2f} s"
        if self._timed:
            text += f", then {format_three_digits(self._timed / self._seconds)} tokens/s"
        return text


def print_texts(
    generator: TextGenerator, batches: list[list[str]], speed: SpeedMeter, echo: bool = True
) -> None:
    """Print all texts in order, separated by blank lines.

    The first unfinished text of a batch is printed while it is generated.

    Args:
        generator: model and settings.
        batches: the prompts.
        speed: measures the generation.
        echo: whether to print each prompt before its text.
    """
    console = Console(highlight=False)

    def begin(prompt: str) -> None:
        if echo:
            console.out(prompt, style="bold", end="")

    for number, prompts in enumerate(batches):
        if number:
            console.out("")
        begin(prompts[0])
        row, shown = 0, 0  # current text, and number of its characters printed
        for texts in speed.watch(generator.stream(prompts)):
            for text in texts[row:]:
                console.out(text.text[shown:], end="")
                shown = len(text.text)
                if text.finish_reason is None:
                    break
                row, shown = row + 1, 0
                console.out("")
                if row < len(prompts):
                    console.out("")
                    begin(prompts[row])


def save_texts(
    generator: TextGenerator, batches: list[list[str]], out: Path, speed: SpeedMeter
) -> None:
    """Write one line of JSON per prompt, in order, as soon as its batch is done."""
    columns = TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="utf-8") as file, shown as progress:
        bar = progress.add_task("", total=sum(map(len, batches)))
        for prompts in batches:
            texts = deque(speed.watch(generator.stream(prompts)), maxlen=1).pop()
            for prompt, text in zip(prompts, texts, strict=True):
                record = {"prompt": prompt, **vars(text)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            progress.advance(bar, len(prompts))
    print(f"texts  {out}")


def run_interactive(generator: TextGenerator) -> None:
    """Print the continuation of each typed line until the input ends.

    Ctrl-C ends a text. At the prompt, Ctrl-C and Ctrl-D exit.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # enables arrow keys and a history
    console = Console(highlight=False)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _print_status("type a prompt; Ctrl-C ends a text, Ctrl-D exits")
    while True:
        try:
            prompt = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            console.out("")
            return
        if not prompt:
            continue
        generator.warn_long_prompts([prompt])
        speed = SpeedMeter()
        try:
            print_texts(generator, [[prompt]], speed, echo=False)
        except KeyboardInterrupt:
            console.out("")
        else:
            _print_status(speed)


def _print_status(text: object) -> None:
    """Print on stderr, because stdout holds only the generated text."""
    Console(stderr=True, highlight=False).print(str(text), style="dim", soft_wrap=True)


if __name__ == "__main__":
    run_command("generate", main)
