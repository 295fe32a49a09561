"""A model as the lm-evaluation-harness asks it: `--model tokengrow` (github.com/EleutherAI).

Every rank holds the whole model and answers its share of the requests; they meet only when the
harness gathers what they found.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval.models  # noqa: F401  # its own models first: it looks for them in an empty list alone
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from rich.console import Console
from torch import Tensor

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.console.progress import Advance, counted
from tokengrow.distributed.collectives import all_gather_object, barrier, rank, world_size
from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.errors import UserError
from tokengrow.evaluation.loaded_model import LoadedModel
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.rolling_windows import rolling_windows
from tokengrow.evaluation.scoring import Window, WindowScore, parse_batch_size
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.generation.text_generation import complete
from tokengrow.parsing import parse_dataclass

ROWS_AT_ONCE = 16
"""Texts that are generated together where the batch size is automatic."""

ANSWERS = {
    "loglikelihood": "answers",
    "loglikelihood_rolling": "documents",
    "generate_until": "texts",
}
"""Kinds of requests to what they are in the progress."""

Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether it is what the model would have written."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What `lm_eval --model_args` may say."""

    source: str
    """Checkpoint, or run whose newest checkpoint is taken."""
    batch_size: str = "auto"
    """Rows of a batch, or auto; auto:N, as the harness has it for others, is auto."""
    device: str = "auto"
    """cpu, cuda (or cuda:0), or auto: a GPU if there is one."""
    devices: int | None = None
    """Processes to start, one for each device; null: those of the launcher, or one."""
    precision: str = "auto"
    """As `fabric.precision` of `tokengrow eval`."""


@register_model("tokengrow")
class TokengrowLM(TemplateLM):
    """The harness's door to a checkpoint.

    Args:
        model: on this rank's device.
        responses: what is known already, and where answers are kept.
        console: where progress is shown; by default nowhere.
    """

    def __init__(
        self,
        model: LoadedModel,
        responses: ResponseCache | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = rank(), world_size()
        self._device = model.scorer.device
        self._model, self._tokenizer, self._scorer = model.model, model.tokenizer, model.scorer
        self._responses = responses or ResponseCache()
        self._console = console or Console(quiet=True)
        self._advance: Advance = lambda: None

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "TokengrowLM":
        """The model of `--model_args source=DIR,...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "TokengrowLM":
        """The same from a mapping.

        Args:
            arg_dict: as `ModelArguments`.
            additional_config: options of the command line, which always gives a batch size.

        Raises:
            UserError: an unknown argument, or no such checkpoint.
        """
        options = {key: value for key, value in (additional_config or {}).items() if value}
        given = parse_dataclass(ModelArguments, {**options, **arg_dict}, "model_args")
        measured = given.batch_size.startswith("auto:")
        rows = parse_batch_size("auto" if measured else given.batch_size)
        device = given.device.removesuffix(":0")
        if ":" in device:
            raise UserError(
                f"device={device}: choose a GPU by CUDA_VISIBLE_DEVICES, and give device=cuda"
            )
        config = FabricConfig(
            accelerator=device,
            strategy="ddp" if given.devices else "auto",
            devices=given.devices,
            precision=given.precision,
        )
        checkpoint = load_checkpoint(given.source)
        fabric = build_fabric(config)
        precision, autocast = config.chosen_precision, fabric.autocast
        model = LoadedModel.from_checkpoint(checkpoint, fabric.device, precision, autocast, rows)
        return cls(model, console=Console(stderr=True, quiet=rank() > 0))

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and that stands before an empty context."""
        return self._tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """The most tokens that the model takes."""
        return self._model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from another one."""
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; no special token is ever added, as in training."""
        return self._tokenizer.encode(string)

    # Ranks

    def all_gather(self, tensor: Tensor) -> Tensor:
        """What every rank has, one behind the other."""
        return torch.cat([part.reshape(-1) for part in all_gather_object(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What every rank has, on one of them."""
        found = all_gather_object(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Waits for all ranks."""
        barrier()

    # Requests

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """How likely each continuation is in its context."""
        answer = super().loglikelihood
        return [
            (log_likelihood, greedy)
            for log_likelihood, greedy in self._asked_once(
                "loglikelihood", requests, lambda rest: answer(rest, disable_tqdm=True)
            )
        ]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._windows(context, after) for _, context, after in requests]

        def done(index: int, answer: Answer) -> None:
            self._keep("loglikelihood", requests[index][0], answer)

        return self._scored(windows, done)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """How likely each text is as a document, every token with as much context as fits."""

        def answer(rest: list[Instance]) -> list[float]:
            texts = [instance.args for instance in rest]
            windows = [
                self._windows([self.prefix_token_id], self.tok_encode(text)) for (text,) in texts
            ]

            def done(index: int, answer: Answer) -> None:
                self._keep("loglikelihood_rolling", texts[index], answer[0])

            return [log_likelihood for log_likelihood, _ in self._scored(windows, done)]

        return list(self._asked_once("loglikelihood_rolling", requests, answer))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string."""

        def answer(rest: list[Instance]) -> list[str]:
            return self._generated([instance.args for instance in rest])

        return list(self._asked_once("generate_until", requests, answer))

    # How they are answered

    def _asked_once(
        self,
        kind: str,
        requests: Sequence[Instance],
        answer: Callable[[list[Instance]], Iterable[Any]],
    ) -> Iterator[Any]:
        """Answers in the order of the requests, known ones as they were."""
        known = [self._responses.get(kind, instance.args) for instance in requests]
        rest = [one for one, there in zip(requests, known, strict=True) if there is None]
        share = f" (rank 0 of {self.world_size})" if self.world_size > 1 else ""
        counts = len(requests) - len(rest), len(requests)
        with counted(self._console, f"{ANSWERS[kind]}{share}", *counts) as self._advance:
            new = iter(answer(rest) if rest else [])
        return (next(new) if there is None else there for there in known)

    def _keep(self, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
        self._responses.add(kind, arguments, answer)
        self.cache_hook.add_partial(kind, arguments, answer)
        self._advance()

    def _windows(self, context: list[int], after: list[int]) -> list[Window]:
        """Windows that score each token once: one, or several where it is too long for that.

        Those are the windows that the harness itself makes of long texts (rolling).
        """
        if len(after) <= self.max_length:
            return [Window(context, after)] if after else []
        return list(rolling_windows([context[-1], *after], self.max_length, self.max_length))

    def _scored(
        self, requests: Sequence[Sequence[Window]], done: Callable[[int, Answer], None]
    ) -> list[Answer]:
        """Scores what may be several windows each; what has none is certain.

        Args:
            requests: windows of each.
            done: called with the number and the answer of a request that is done.
        """
        flat = [(number, window) for number, own in enumerate(requests) for window in own]
        parts: dict[int, list[WindowScore]] = defaultdict(list)
        answers: dict[int, Answer] = {}

        def note(index: int, scored: WindowScore) -> None:
            number = flat[index][0]
            parts[number].append(scored)
            if len(parts[number]) == len(requests[number]):
                finish(number)

        def finish(number: int) -> None:
            likely = math.fsum(part.log_likelihood for part in parts[number])
            answers[number] = likely, all(part.greedy for part in parts[number])
            done(number, answers[number])

        for number, own in enumerate(requests):
            if not own:
                finish(number)
        self._scorer.score([window for _, window in flat], note)
        return [answers[number] for number in range(len(requests))]

    def _generated(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Texts that follow contexts; those of one wish are written together, the longest first."""
        asked: Counter[str] = Counter()
        wishes = []
        for request in requests:
            # Asked again, what is drawn is drawn anew.
            wishes.append(_Wish.of(request[1], self.max_length, seed=asked[repr(request)]))
            asked[repr(request)] += 1
        prompts = [
            (self.tok_encode(context) or [self.prefix_token_id])[-wish.room(self.max_length) :]
            for (context, _), wish in zip(requests, wishes, strict=True)
        ]
        alike: dict[_Wish, list[int]] = defaultdict(list)
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            alike[wishes[index]].append(index)
        texts: dict[int, str] = {}
        rows = self._scorer.batch_size or ROWS_AT_ONCE
        for wish, members in alike.items():
            for batch in (members[n : n + rows] for n in range(0, len(members), rows)):
                ids = [prompts[index] for index in batch]
                # Greedily, or each with the noise of one seed: the rest of a batch changes no text.
                written = complete(self._model, ids, self._tokenizer, wish.sampling, wish.until)
                for index, continuation in zip(batch, written, strict=True):
                    texts[index] = continuation.text
                    if wish.sampling.temperature == 0:
                        self._keep("generate_until", requests[index], continuation.text)
                    else:
                        self._advance()
        return [texts[index] for index in range(len(requests))]


@dataclass(frozen=True)
class _Wish:
    """How a text is to be written."""

    sampling: SamplingConfig
    """How tokens are chosen."""
    until: tuple[str, ...]
    """What ends it, beside end-of-text."""

    def room(self, context_length: int) -> int:
        """Tokens of a context that the model takes beside what it is to write."""
        return context_length - self.sampling.max_tokens

    @classmethod
    def of(cls, arguments: Mapping[str, Any], context_length: int, seed: int) -> "_Wish":
        """From the harness's generation arguments.

        Args:
            arguments: the harness's.
            context_length: the most tokens that the model takes.
            seed: of what is drawn; greedily nothing is.

        Raises:
            UserError: more tokens than the model takes, or an argument that nothing here knows.
        """
        given = dict(normalize_gen_kwargs(dict(arguments)))
        until, most = given.pop("until", []), given.pop("max_gen_toks")
        temperature = float(given.pop("temperature", 1.0))
        temperature = temperature if given.pop("do_sample") else 0.0
        known = {key: given.pop(key) for key in ("top_k", "top_p") if key in given}
        if given:
            raise UserError(f"the task asks for {', '.join(given)}, which generation here has not")
        if most >= context_length:
            raise UserError(
                f"the task asks for {most} tokens of text, and the model takes {context_length} "
                "with the question: leave the task out, or evaluate a model of longer context"
            )
        seed = seed if temperature else 0
        sampling = SamplingConfig(max_tokens=most, temperature=temperature, seed=seed, **known)
        return cls(sampling, tuple(filter(None, [until] if isinstance(until, str) else until)))
