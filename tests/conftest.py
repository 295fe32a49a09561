"""Shared fixtures: a corpus, its token store, tiny ladders, ways to run a verb, and model A."""

import gc
import os

# One thread, because on tiny models and with parallel jobs more threads only wait for each other.
# Set before the first import of torch, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, Triton's kernels run in its interpreter, which is selected at their definition.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.tokenizer import TokenizerConfig, train_tokenizer
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.model.transformer import TransformerConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.paths import data_root
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.trainer import fit

# A run collects garbage before each stage. Objects of the imports need not be visited.
gc.freeze()

TRAIN_MODULES = ("argparse", "ast", "calendar", "copy", "glob", "heapq", "shlex", "textwrap")
VALIDATION_MODULES = ("bisect", "fnmatch", "sched")
VOCAB_SIZE, CONTEXT = 512, 32


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Separate cache of this session, so that no test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENGROW_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    """Eleven modules of the standard library as text files, three of them for validation."""
    root, library = tmp_path_factory.mktemp("corpus"), Path(sysconfig.get_path("stdlib"))
    for split, modules in (("train", TRAIN_MODULES), ("validation", VALIDATION_MODULES)):
        (root / split).mkdir()
        for name in modules:
            text = (library / f"{name}.py").read_text(encoding="utf-8")
            (root / split / f"{name}.txt").write_text(text, encoding="utf-8")
    return TextCorpus(files=[str(root / "train")], validation_files=[str(root / "validation")])


@pytest.fixture(scope="session")
def store(corpus: TextCorpus, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Token store of the corpus with a vocabulary of 512; tests must not modify it."""
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), corpus)
    return build_store(corpus, tokenizer, tmp_path_factory.mktemp("data") / "store", progress=False)


def _tokens(n: int) -> ParameterTokens:
    return ParameterTokens(query=n, key=n, value=n, output=n, ffn=2 * n)


def _tiny_model(n: int = 8, **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "context_length": CONTEXT, "layers": 2, "width": 32}
    return ModelConfig(**{**sizes, "heads": 2, "tokens": _tokens(n), **changes})


def _tiny_run(
    out: Path, rungs: tuple[int, ...] = (8, 12, 16), steps: int = 6, **changes: Any
) -> TrainConfig:
    optim = OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2)
    models = [_tiny_model(n) for n in rungs]
    taus = models[0].tau  # every rung keeps that of the first
    stages = tuple(
        StageConfig(name=f"n{n}", steps=steps, model=replace(model, tau=taus), optim=optim)
        for n, model in zip(rungs, models, strict=True)
    )
    settings: dict[str, Any] = {
        "out": str(out),
        "stages": stages,
        "batch_size": 4,
        "micro_batch_size": 4,
        "validation_every": 3,
        "validation_sequences": 8,
        "checkpoint_every": 4,
        "log_every": 2,
        "fabric": FabricConfig(accelerator="cpu", precision="32-true"),
        "logger": LoggerConfig(kinds=[]),
    }
    return TrainConfig(**{**settings, **changes})


def _tiny_transformer(**changes: Any) -> TransformerConfig:
    return TransformerConfig.matching(replace(_tiny_model(), **changes))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., ModelConfig]:
    """`tiny_model(n, **changes)`: about 25,000 parameters, n parameter tokens per role."""
    return _tiny_model


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., TrainConfig]:
    """`tiny_run(out, rungs, steps, **changes)`: a ladder of tiny models, six updates per stage."""
    return _tiny_run


@pytest.fixture(scope="session")
def tiny_transformer() -> Callable[..., TransformerConfig]:
    """`tiny_transformer(**changes)`: same vocabulary, layers, width and heads as a tiny model."""
    return _tiny_transformer


@pytest.fixture(scope="session")
def transformer_run() -> Callable[..., TrainConfig]:
    """`transformer_run(out, steps, **changes)`: one stage that trains a tiny Transformer."""

    def run(out: Path, steps: int = 6, **changes: Any) -> TrainConfig:
        optim = OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2)
        stage = StageConfig(name="only", steps=steps, model=_tiny_transformer(), optim=optim)
        return _tiny_run(out, **{"stages": (stage,), **changes})

    return run


@pytest.fixture(scope="session")
def source(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Last checkpoint of a run of one rung, n8, after two updates; tests must not modify it."""
    sections = {"data": {"source": "stdlib", "validation_fraction": 0.05}, "tokenizer": {}}
    tokens_from = {**sections, "store": str(store.folder)}
    out = tmp_path_factory.mktemp("source") / "run"
    run = _tiny_run(out, rungs=(8,), steps=2, tokens_from=tokens_from)
    folder = fit(run, store).checkpoint.folder
    assert folder is not None
    return folder


@pytest.fixture
def composed() -> Callable[..., dict[str, Any]]:
    """`composed(verb, *overrides)`: plain values of the config of a command line."""

    def values(verb: str, *overrides: str) -> dict[str, Any]:
        from tokengrow.cli.config import plain_values

        GlobalHydra.instance().clear()
        with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
            return plain_values(compose(verb, list(overrides)))

    return values


TINY_RECIPE = """\
# @package _global_
name: climb
batch_size: 4
validation_every: 10
validation_sequences: 8
log_every: 1
optim: {lr: 3e-3, min_lr: 3e-4, warmup_steps: 5}
model:
  vocab_size: 512
  context_length: 32
  layers: 2
  width: 32
  heads: 2
  tokens: {query: 8, key: 8, value: 8, output: 8, ffn: 16}
"""


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[[Path, str], None]:
    """`tiny_recipe(folder, more)`: write recipes/climb.yaml into a folder.

    Use it with `--config-dir FOLDER recipes=climb`. `more` holds the stages and further keys.
    """

    def write(folder: Path, more: str) -> None:
        (folder / "recipes").mkdir(parents=True)
        (folder / "recipes" / "climb.yaml").write_text(TINY_RECIPE + more)

    return write


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`command(verb, *arguments)`: run a command in this process."""

    def call(verb: str, *arguments: str) -> Outcome:
        from tokengrow.cli.runner import run_command

        module = import_module(f"tokengrow.cli.{verb}")
        monkeypatch.setattr(sys, "argv", [f"tokengrow {verb}", *arguments])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        status = 0
        try:
            run_command(verb, module.main)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exiting process ignores it
        GlobalHydra.instance().clear()
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Outcome]:
    """`program(*arguments)`: run `python -m tokengrow ...` in a new process and folder."""

    def run(
        *arguments: str, module: str = "tokengrow", cwd: Path = tmp_path, timeout: float = 120
    ) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env=os.environ | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


GOLDEN = Path(__file__).parent / "golden"


def our_name(official: str) -> str:
    """Map `sequential.2.attention.proj.key_...` to `blocks.0.attention.output.key_...`."""
    _, index, rest = official.split(".", 2)
    if rest.startswith("word_embeddings."):
        return rest.replace("word_embeddings", "embedding")
    if rest.startswith("norm."):
        return f"final_{rest}"
    rest = rest.replace("attention.proj", "attention.output").replace("mlp", "ffn")
    return f"blocks.{int(index) - 2}.{rest}"


@pytest.fixture(scope="session", name="our_name")
def our_name_fixture() -> Callable[[str], str]:
    """`our_name(official)`: name in tokengrow of a tensor of the published code."""
    return our_name


@pytest.fixture(scope="session")
def published_config() -> ModelConfig:
    """Config of the published model A; see tests/golden/A_tiny_init/config.json."""
    return ModelConfig(
        vocab_size=512,
        context_length=32,
        layers=3,
        width=64,
        heads=4,
        tokens=ParameterTokens(query=48, key=48, value=48, output=40, ffn=160),
        init="published",
    )


@pytest.fixture(scope="session")
def published_weights() -> dict[str, Tensor]:
    """Weights of the published model A, by their names in tokengrow."""
    official = load_file(GOLDEN / "A_tiny_init" / "model.safetensors")
    return {our_name(name): tensor for name, tensor in official.items()}


@pytest.fixture(scope="session")
def published_figures() -> dict[str, Tensor]:
    """Results of model A; `grad.*` by names in tokengrow, all others as in the file."""
    figures = load_file(GOLDEN / "A_tiny_init" / "l2_norm_gelu.safetensors")
    return {
        f"grad.{our_name(name.removeprefix('grad.'))}" if name.startswith("grad.") else name: value
        for name, value in figures.items()
    }


@pytest.fixture(scope="session")
def published_decoding() -> dict[str, Tensor]:
    """Results of model A with its KV cache."""
    return load_file(GOLDEN / "D_decode_l2_norm_gelu.safetensors")


@pytest.fixture
def published_model(
    published_config: ModelConfig, published_weights: dict[str, Tensor]
) -> TokenFormer:
    """Model A in float32."""
    return TokenFormer.from_weights(published_config, published_weights)
