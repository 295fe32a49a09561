"""Fixtures: transformers without a network, and an exported model."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from exported import VOCAB_SIZE, export, random_checkpoint
from torch import nn

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Import transformers, offline, with its own cache for the code of exported folders."""
    cache = tmp_path_factory.mktemp("hf_modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers
        from transformers import dynamic_module_utils

        # The environment variable has no effect if another test has imported transformers before.
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setattr(sys, "path", [*sys.path])
        yield transformers


@pytest.fixture(scope="session")
def load(hub: ModuleType) -> Callable[..., nn.Module]:
    """`load(folder, **options)`: the causal model of a folder, in eval mode."""

    def load(folder: Path, **options: Any) -> nn.Module:
        model = hub.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
        return model.eval()

    return load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a model without a tokenizer; tests must not write to the folder."""
    return export(tmp_path_factory.mktemp("hf") / "plain", random_checkpoint())


@pytest.fixture(scope="session")
def tokenizer(corpus: TextCorpus) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), corpus)
