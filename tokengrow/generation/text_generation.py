"""Text generation: sampled tokens are decoded until each text ends.

A text ends at the first of three: the end-of-text token, a stop string, `max_tokens`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokengrow.generation.sampling import SamplingConfig, generate
from tokengrow.model.tokenformer import LanguageModel

END_OF_TEXT, STOP, MAX_TOKENS = "end_of_text", "stop", "max_tokens"
"""Reasons for the end of a text."""


class Decodes(Protocol):
    """Tokenizer that decodes one token at a time."""

    end_of_text: int
    """Id of the token that ends a text."""

    def decoder(self, behind: Sequence[int]) -> Callable[[int], str]:
        """Return a function from each id after a prefix to the text that it adds."""


@dataclass
class Continuation:
    """Generated text after a prompt."""

    text: str = ""
    """Text without the prompt, end-of-text token and stop string; it only grows."""
    tokens: int = 0
    """Number of sampled tokens, with those of a stop string, without end-of-text."""
    finish_reason: str | None = None
    """end_of_text, stop or max_tokens; None: the text has not ended."""


def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: Decodes,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
) -> list[Continuation]:
    """Return the text after each prompt of a batch; the arguments are those of `write`."""
    last = deque(write(model, prompts, tokenizer, sampling, stop), maxlen=1)
    return last.pop() if last else []


def write(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: Decodes,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
) -> Iterator[list[Continuation]]:
    """Generate after the prompts of a batch; yield all texts so far at every token.

    A text does not depend on its batch. Characters that may start a stop string are held back until
    that is decided.

    Args:
        model: model in eval mode, on its device.
        prompts: token ids of each prompt, at least one.
        tokenizer: tokenizer of the model.
        sampling: sampling settings.
        stop: strings that end a text; the one that is complete first ends it.

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
    """Builder of one text from its tokens.

    Args:
        tokenizer: tokenizer of the tokens.
        prompt: token ids before the text.
        max_tokens: maximum number of tokens.
        stop: strings that end the text, none of them empty.
    """

    def __init__(
        self, tokenizer: Decodes, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]
    ) -> None:
        assert all(stop), "an empty string would end every text"
        self.written = Continuation()
        self._decode = tokenizer.decoder(prompt)
        self._end_of_text, self._max_tokens, self._stop = tokenizer.end_of_text, max_tokens, stop
        self._held = ""  # decoded but held back: it may start a stop string

    def take(self, token: int) -> None:
        """Add a token."""
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
    """Return the start of the stop string that is complete first; None: there is none.

    Of several that end together, the longest counts. The result does not depend on how the text is
    split into tokens.
    """
    ends = ((place + len(s), place) for s in stop if (place := text.find(s)) >= 0)
    return min(ends, default=(0, None))[1]


def begun_stop(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of a text that may start a stop string."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)
