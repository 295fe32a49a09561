"""From prompts to texts: tokens are drawn, decoded, and end where a text is to end.

A text ends with the first of three: end-of-text, a stop string, `max_tokens`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.model.tokenformer import LanguageModel

END_OF_TEXT, STOP, MAX_TOKENS = "end_of_text", "stop", "max_tokens"
"""Why a text ended."""


class Decodes(Protocol):
    """What is asked of a tokenizer."""

    end_of_text: int
    """Id of the token that ends a text."""

    def decoder(self, behind: Sequence[int]) -> Callable[[int], str]:
        """From the ids behind these, one after the other, to what each adds to the text."""


@dataclass
class Continuation:
    """What a model has written behind a prompt."""

    text: str = ""
    """Without the prompt, end-of-text or the stop string; it only ever becomes longer."""
    tokens: int = 0
    """Tokens drawn, those of a stop string included, end-of-text not."""
    finish_reason: str | None = None
    """end_of_text, stop or max_tokens; None while it goes on."""


def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: Decodes,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
) -> list[Continuation]:
    """What a model writes behind each prompt of a batch; the arguments are those of `write`."""
    last = deque(write(model, prompts, tokenizer, sampling, stop), maxlen=1)
    return last.pop() if last else []


def write(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: Decodes,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
) -> Iterator[list[Continuation]]:
    """Writes behind the prompts of a batch; yields all texts, as far as they are, at every token.

    A text is what it would be in a batch of its own. What may yet turn out to be the beginning of a
    stop string is not in it before that is decided.

    Args:
        model: in eval mode, on the device where it is to compute.
        prompts: token ids of each, at least one.
        tokenizer: of the model.
        sampling: how tokens are chosen.
        stop: strings that end a text; of several the one that is complete first.

    Yields:
        The same objects every time.
    """
    writers = [_Writer(tokenizer, prompt, sampling.max_tokens, stop) for prompt in prompts]
    if not writers:
        return
    ids = [torch.tensor(prompt) for prompt in prompts]
    for tokens in generate(model, ids, sampling, tokenizer.end_of_text):
        for writer, token in zip(writers, tokens.tolist(), strict=True):
            if writer.written.finish_reason is None:
                writer.take(token)
        yield [writer.written for writer in writers]
        if all(writer.written.finish_reason for writer in writers):
            return


class _Writer:
    """Writes one text from its tokens.

    Args:
        tokenizer: of the tokens.
        prompt: token ids in front of the text.
        max_tokens: after so many the text ends.
        stop: strings that end it, none of them empty.
    """

    def __init__(
        self, tokenizer: Decodes, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]
    ) -> None:
        assert all(stop), "an empty string would end every text"
        self.written = Continuation()
        self._decode = tokenizer.decoder(prompt)
        self._end_of_text, self._max_tokens, self._stop = tokenizer.end_of_text, max_tokens, stop
        self._held = ""  # behind what is written: a stop string may have begun

    def take(self, token: int) -> None:
        """Goes on by a token."""
        if token == self._end_of_text:
            self._finish(END_OF_TEXT)
            return
        self.written.tokens += 1
        self._held += self._decode(token)
        if (place := first_stop(self._held, self._stop)) is not None:
            self._held = self._held[:place]
            self._finish(STOP)
        elif self.written.tokens == self._max_tokens:
            self._finish(MAX_TOKENS)
        else:
            self._release(len(self._held) - begun_stop(self._held, self._stop))

    def _finish(self, reason: str) -> None:
        self._release(len(self._held))
        self.written.finish_reason = reason

    def _release(self, length: int) -> None:
        self.written.text += self._held[:length]
        self._held = self._held[length:]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string starts that is complete first; the longest of several; None: none is.

    So a text ends at the same place whatever pieces it comes in.
    """
    ends = ((place + len(s), place) for s in stop if (place := text.find(s)) >= 0)
    return min(ends, default=(0, None))[1]


def begun_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)
