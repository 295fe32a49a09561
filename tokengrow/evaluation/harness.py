"""Model class of the lm-evaluation-harness (github.com/EleutherAI): `--model tokengrow`.

Every rank holds the complete model and answers its share of the requests. Ranks communicate only
when the harness gathers their responses.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lm_eval.models  # noqa: F401  # registers the harness's models, which needs an empty registry
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from rich.console import Console
from torch import Tensor

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.console.progress import Advance, count_progress
from tokengrow.distributed.collectives import all_gather_object, barrier, rank, world_size
from tokengrow.distributed.fabric import AcceleratorName, FabricConfig, build_fabric
from tokengrow.errors import UserError
from tokengrow.evaluation.loaded_model import LoadedModel
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.rolling_windows import rolling_windows
from tokengrow.evaluation.scoring import Window, WindowScore, parse_batch_size
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.generation.text_generation import complete
from tokengrow.parsing import parse_dataclass

GENERATION_BATCH_SIZE = 16
"""Texts generated together if the batch size is automatic."""

PROGRESS_LABELS = {
    "loglikelihood": "answers",
    "loglikelihood_rolling": "documents",
    "generate_until": "texts",
}
"""Kind of requests to their name in the progress display."""

LogLikelihood = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding gives the same tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Keys of `lm_eval --model_args`."""

    source: str
    """Checkpoint, or run whose newest checkpoint is used."""
    batch_size: str = "auto"
    """Rows per batch, or auto; auto:N, which other models of the harness accept, is auto."""
    device: str = "auto"
    """Device: cpu, cuda (or cuda:0), or auto for a GPU if there is one."""
    devices: int | None = None
    """Number of processes to start, one per device; null: those of the launcher, or one."""
    precision: str = "auto"
    """Precision, with the values of `fabric.precision` of `tokengrow eval`."""


@register_model("tokengrow")
class TokengrowLM(TemplateLM):
    """Adapter from the requests of the harness to a model of tokengrow.

    Args:
        model: model on the device of this rank.
        responses: cache of responses; by default none is stored.
        console: receives progress; by default nothing is shown.
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
        """Build the model from `--model_args source=DIR,...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "TokengrowLM":
        """Build the model from a mapping.

        Args:
            arg_dict: keys of `ModelArguments`.
            additional_config: options of the command line, which always include a batch size.

        Raises:
            UserError: an argument is unknown, or the checkpoint does not exist.
        """
        options = {key: value for key, value in (additional_config or {}).items() if value}
        arguments = parse_dataclass(ModelArguments, {**options, **arg_dict}, "model_args")
        automatic = arguments.batch_size.startswith("auto:")
        batch_size = parse_batch_size("auto" if automatic else arguments.batch_size)
        device = arguments.device.removesuffix(":0")
        if ":" in device:
            raise UserError(
                f"device must be cpu, cuda or auto, got {device}. Choose a GPU with "
                "CUDA_VISIBLE_DEVICES, and set device=cuda."
            )
        config = FabricConfig(
            accelerator=cast(AcceleratorName, device),  # FabricConfig checks it
            strategy="ddp" if arguments.devices else "auto",
            devices=arguments.devices,
            precision=arguments.precision,
        )
        checkpoint = load_checkpoint(arguments.source)
        fabric = build_fabric(config)
        model = LoadedModel.from_checkpoint(
            checkpoint, fabric.device, config.chosen_precision, fabric.autocast, batch_size
        )
        return cls(model, console=Console(stderr=True, quiet=rank() > 0))

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document and replaces an empty context."""
        return self._tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """Maximum tokens that the model reads."""
        return self._model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer."""
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text; no special token is added, as in training."""
        return self._tokenizer.encode(string)

    # Ranks

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the flattened tensors of all ranks, concatenated."""
        return torch.cat([part.reshape(-1) for part in all_gather_object(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on rank `dst`, and None on the others."""
        gathered = all_gather_object(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        barrier()

    # Requests

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation in its context."""
        compute = super().loglikelihood
        responses = self._run_uncached(
            "loglikelihood", requests, lambda uncached: compute(uncached, disable_tqdm=True)
        )
        return [(log_likelihood, greedy) for log_likelihood, greedy in responses]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[LogLikelihood]:
        windows = [self._windows(context, continuation) for _, context, continuation in requests]

        def on_response(index: int, response: LogLikelihood) -> None:
            self._store("loglikelihood", requests[index][0], response)

        return self._score_windows(windows, on_response)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text as a document, with rolling windows."""

        def compute(uncached: list[Instance]) -> list[float]:
            arguments = [instance.args for instance in uncached]
            windows = [
                self._windows([self.prefix_token_id], self.tok_encode(text))
                for (text,) in arguments
            ]

            def on_response(index: int, response: LogLikelihood) -> None:
                self._store("loglikelihood_rolling", arguments[index], response[0])

            return [total for total, _ in self._score_windows(windows, on_response)]

        return list(self._run_uncached("loglikelihood_rolling", requests, compute))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates after each context, up to a stop string."""

        def compute(uncached: list[Instance]) -> list[str]:
            return self._generate([instance.args for instance in uncached])

        return list(self._run_uncached("generate_until", requests, compute))

    # Computation of responses

    def _run_uncached(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[list[Instance]], Iterable[Any]],
    ) -> Iterator[Any]:
        """Return the responses in the order of the requests; compute those not in the cache."""
        cached = [self._responses.get(kind, instance.args) for instance in requests]
        pairs = zip(requests, cached, strict=True)
        uncached = [request for request, response in pairs if response is None]
        share = f" (rank 0 of {self.world_size})" if self.world_size > 1 else ""
        counts = len(requests) - len(uncached), len(requests)
        label = f"{PROGRESS_LABELS[kind]}{share}"
        with count_progress(self._console, label, *counts) as self._advance:
            computed = iter(compute(uncached) if uncached else [])
        return (next(computed) if response is None else response for response in cached)

    def _store(self, kind: str, arguments: tuple[Any, ...], response: Any) -> None:
        """Write a response to the caches, and advance the progress."""
        self._responses.add(kind, arguments, response)
        self.cache_hook.add_partial(kind, arguments, response)
        self._advance()

    def _windows(self, context: list[int], continuation: list[int]) -> list[Window]:
        """Return windows that score each token once: several if the continuation is too long.

        These are the rolling windows that the harness builds for long texts.
        """
        if len(continuation) <= self.max_length:
            return [Window(context, continuation)] if continuation else []
        ids = [context[-1], *continuation]
        return list(rolling_windows(ids, self.max_length, self.max_length))

    def _score_windows(
        self,
        requests: Sequence[Sequence[Window]],
        on_response: Callable[[int, LogLikelihood], None],
    ) -> list[LogLikelihood]:
        """Return the log-likelihood of each request; without windows it is 0 and greedy.

        Args:
            requests: windows of each request.
            on_response: called with the index and the response of each finished request.
        """
        windows = [(n, window) for n, request in enumerate(requests) for window in request]
        scores: dict[int, list[WindowScore]] = defaultdict(list)
        responses: dict[int, LogLikelihood] = {}

        def finish(number: int) -> None:
            total = math.fsum(score.log_likelihood for score in scores[number])
            responses[number] = total, all(score.greedy for score in scores[number])
            on_response(number, responses[number])

        def on_score(index: int, score: WindowScore) -> None:
            number = windows[index][0]
            scores[number].append(score)
            if len(scores[number]) == len(requests[number]):
                finish(number)

        for number, request in enumerate(requests):
            if not request:
                finish(number)
        self._scorer.score([window for _, window in windows], on_score)
        return [responses[number] for number in range(len(requests))]

    def _generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Generate texts after contexts, in batches of equal settings, the longest context first.

        A repeated request is sampled with another seed.
        """
        repeats: Counter[str] = Counter()
        settings = []
        for request in requests:
            seed = repeats[repr(request)]
            settings.append(_GenerationSettings.from_gen_kwargs(request[1], self.max_length, seed))
            repeats[repr(request)] += 1
        prompts = []
        for (context, _), setting in zip(requests, settings, strict=True):
            max_context = self.max_length - setting.sampling.max_tokens
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-max_context:])
        groups: dict[_GenerationSettings, list[int]] = defaultdict(list)
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            groups[settings[index]].append(index)
        texts: dict[int, str] = {}
        rows = self._scorer.batch_size or GENERATION_BATCH_SIZE
        for group, members in groups.items():
            for batch in (members[n : n + rows] for n in range(0, len(members), rows)):
                ids = [prompts[index] for index in batch]
                # Greedy, or one seed per text: the other texts of a batch do not change a text.
                written = complete(self._model, ids, self._tokenizer, group.sampling, group.stop)
                for index, continuation in zip(batch, written, strict=True):
                    texts[index] = continuation.text
                    if group.sampling.temperature == 0:
                        self._store("generate_until", requests[index], continuation.text)
                    else:
                        self._advance()
        return [texts[index] for index in range(len(requests))]


@dataclass(frozen=True)
class _GenerationSettings:
    """Settings of a generation request."""

    sampling: SamplingConfig
    """Choice of the next token, and maximum tokens."""
    stop: tuple[str, ...]
    """Strings that end a text, besides end-of-text."""

    @classmethod
    def from_gen_kwargs(
        cls, gen_kwargs: Mapping[str, Any], context_length: int, seed: int
    ) -> "_GenerationSettings":
        """Convert the generation arguments of the harness.

        Args:
            gen_kwargs: arguments of the request.
            context_length: maximum tokens that the model reads.
            seed: seed of sampling; unused by greedy decoding.

        Raises:
            UserError: the request needs more tokens than the model reads, or sets an argument that
                is not supported.
        """
        remaining = dict(normalize_gen_kwargs(dict(gen_kwargs)))
        until, max_tokens = remaining.pop("until", []), remaining.pop("max_gen_toks")
        temperature = float(remaining.pop("temperature", 1.0))
        temperature = temperature if remaining.pop("do_sample") else 0.0
        filters = {key: remaining.pop(key) for key in ("top_k", "top_p") if key in remaining}
        if remaining:
            raise UserError(
                f"The task sets {', '.join(remaining)}, which generation does not support. "
                "Leave the task out of tasks."
            )
        if max_tokens >= context_length:
            raise UserError(
                f"The task's max_gen_toks must be below the model's context_length of "
                f"{context_length}, got {max_tokens}. Leave the task out of tasks, or evaluate a "
                "model with a longer context."
            )
        sampling = SamplingConfig(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed if temperature else 0,
            **filters,
        )
        stop = [until] if isinstance(until, str) else until
        return cls(sampling, tuple(filter(None, stop)))
