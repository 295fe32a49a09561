"""tokengrow generate: text from a checkpoint, printed as it comes, or written into a file."""

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
from tokengrow.console.format import three_digits
from tokengrow.data.open_tokens import checkpoint_tokenizer
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.errors import UserError
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.generation.text_generation import Continuation, write
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.parsing import parse_dataclass


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """The keys of generate.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is taken."""
    prompt: str
    """Start of the text; empty: end-of-text, the start of a document."""
    prompts: str | None
    """File of many prompts: .txt, a line each, or .jsonl, the key "prompt" of each line."""
    batch_size: int
    """Prompts of the file that are continued at the same time."""
    out: str | None
    """New .jsonl file for the texts; null: they are printed."""
    interactive: bool
    """Prompts are typed, one after the other."""
    stop: list[str]
    """Strings that end a text, which holds what is in front of the first; \\n is a line's end."""
    sampling: SamplingConfig
    """How tokens are chosen."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompts is not None:
            raise UserError("prompt and prompts are both given: leave one of them out")
        for key in ("prompt", "prompts", "out"):
            if self.interactive and getattr(self, key):
                raise UserError(
                    f"{key} is given, but with interactive=true prompts are typed and texts are "
                    f"printed: leave out {key} or interactive"
                )
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1: {self.batch_size}")
        if "" in self.stop:
            raise UserError("stop has an empty string, which would end every text: leave it out")


def main(config: DictConfig) -> None:
    """Prints or writes what the model makes of each prompt, and says how fast."""
    arguments = parse_dataclass(GenerateArguments, plain_values(config))
    path = arguments.prompts
    prompts = [arguments.prompt] if path is None else read_prompts(path)
    out = None if arguments.out is None else new_file(arguments.out)
    # Neither the shell nor Hydra makes a line's end of \n, where most texts are to end.
    stop = [each.replace("\\n", "\n") for each in arguments.stop]
    author = Author.of(load_source(arguments.source), arguments.sampling, stop)
    author.note_long(prompts)
    if arguments.interactive:
        converse(author)
        return
    speed = Speed()
    size = arguments.batch_size
    batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    if out is None:
        print_texts(author, batches, speed)
    else:
        save_texts(author, batches, out, speed)
    _note(speed)


@dataclass(frozen=True)
class Author:
    """A model that writes, on the device where it does."""

    model: LanguageModel
    tokenizer: Tokenizer
    sampling: SamplingConfig
    """How it chooses tokens."""
    stop: Sequence[str]
    """Strings that end a text."""

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, sampling: SamplingConfig, stop: Sequence[str] = ()
    ) -> "Author":
        """The model of a checkpoint, on a GPU if there is one.

        Raises:
            UserError: a checkpoint without a tokenizer.
        """
        tokenizer = checkpoint_tokenizer(checkpoint)
        # Half-precision weights stay so on a GPU alone: a CPU computes slower in them, not faster.
        device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
        return cls(checkpoint.model.to(device, dtype), tokenizer, sampling, stop)

    def note_long(self, prompts: list[str]) -> None:
        """Says on stderr which prompts are beyond what the model has learned to read."""
        most = self.model.config.context_length
        lengths = [len(ids) for ids in self.tokenizer.encode_batch(prompts)]
        if long := [length for length in lengths if length > most]:
            which = "the prompt has" if len(prompts) == 1 else f"{len(long):,} prompts have up to"
            _note(f"{which} {max(long):,} tokens; the model was trained on texts of up to {most:,}")

    def write(self, prompts: list[str]) -> Iterator[list[Continuation]]:
        """Writes behind the prompts; yields all texts, as far as they are, at every token."""
        document = [self.tokenizer.end_of_text]  # what it starts with
        ids = [each or document for each in self.tokenizer.encode_batch(prompts)]
        return write(self.model, ids, self.tokenizer, self.sampling, self.stop)


def sample_text(checkpoint: Checkpoint, prompt: str, sampling: SamplingConfig) -> str:
    """A prompt and what the model of a checkpoint writes behind it."""
    [written] = deque(Author.of(checkpoint, sampling).write([prompt]), maxlen=1).pop()
    return prompt + written.text


class Speed:
    """Counts tokens, and times those behind the first of each text.

    The first comes after the prompt has been read and, on a GPU, kernels are compiled and a graph
    is captured. Loading the checkpoint is in neither.
    """

    def __init__(self) -> None:
        self.tokens = self.batches = self._timed = 0
        self._waited = self._seconds = 0.0

    def watch(self, steps: Iterator[list[Continuation]]) -> Iterator[list[Continuation]]:
        """Yields the steps of a batch as they come."""
        begun, marks = perf_counter(), []  # when, and how many tokens there are by then
        for texts in steps:
            marks.append((perf_counter(), sum(text.tokens for text in texts)))
            yield texts
        (first, of_first), (last, tokens) = marks[0], marks[-1]
        self.batches += 1
        self.tokens += tokens
        self._waited += first - begun
        self._seconds += last - first
        self._timed += tokens - of_first

    def __str__(self) -> str:
        """In words."""
        told = f"{self.tokens:,} token{'s' * (self.tokens != 1)}: the first"
        if self.batches > 1:
            told += f" of each of {self.batches:,} batches"
        told += f" after {self._waited / self.batches:.2f} s"
        if self._timed:
            told += f", then {three_digits(self._timed / self._seconds)} tokens/s"
        return told


def print_texts(author: Author, batches: list[list[str]], speed: Speed, echo: bool = True) -> None:
    """Prints all texts in order, a blank line between each two.

    The first of a batch that has not ended is printed while it is written.

    Args:
        author: of the texts.
        batches: the prompts.
        speed: learns how fast they come.
        echo: prints the prompts in front of them.
    """
    console = Console(highlight=False)

    def begin(prompt: str) -> None:
        if echo:
            console.out(prompt, style="bold", end="")

    for number, prompts in enumerate(batches):
        if number:
            console.out("")
        begin(prompts[0])
        row, shown = 0, 0  # the text in print, and how much of it is
        for texts in speed.watch(author.write(prompts)):
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


def save_texts(author: Author, batches: list[list[str]], out: Path, speed: Speed) -> None:
    """Writes a line of JSON for every prompt, in order, as soon as its batch is done."""
    columns = TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="utf-8") as file, shown as progress:
        bar = progress.add_task("", total=sum(map(len, batches)))
        for prompts in batches:
            texts = deque(speed.watch(author.write(prompts)), maxlen=1).pop()
            for prompt, text in zip(prompts, texts, strict=True):
                record = {"prompt": prompt, **vars(text)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            progress.advance(bar, len(prompts))
    print(f"texts  {out}")


def converse(author: Author) -> None:
    """Prints what follows each line that is typed, until the input ends.

    Ctrl-C ends a text; where a prompt is awaited it ends the conversation, as Ctrl-D does.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and a history while a line is typed
    console = Console(highlight=False)
    typed_by_hand = sys.stdin.isatty()
    if typed_by_hand:
        _note("a line is a prompt; Ctrl-C ends a text, Ctrl-D leaves")
    while True:
        try:
            prompt = input("> " if typed_by_hand else "")
        except (EOFError, KeyboardInterrupt):
            console.out("")
            return
        if not prompt:
            continue
        author.note_long([prompt])
        speed = Speed()
        try:
            print_texts(author, [[prompt]], speed, echo=False)
        except KeyboardInterrupt:
            console.out("")
        else:
            _note(speed)


def _note(what: object) -> None:
    """Beside the text, which is all that stdout holds."""
    Console(stderr=True, highlight=False).print(str(what), style="dim", soft_wrap=True)


if __name__ == "__main__":
    run_command("generate", main)
