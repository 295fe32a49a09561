"""transformers, offline, with an exported model that it can load."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from exported import VOCAB_SIZE, checkpoint, written
from torch import nn

from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """transformers, offline, which copies the code of a folder where no other test sees it."""
    cache = tmp_path_factory.mktemp("hf_modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers
        from transformers import dynamic_module_utils

        # Not by its environment variable: another test may have imported transformers before.
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setattr(sys, "path", [*sys.path])
        yield transformers


@pytest.fixture(scope="session")
def load(hub: ModuleType) -> Callable[..., nn.Module]:
    """`load(folder, **options)`: the causal model, in eval mode."""

    def load(folder: Path, **options: Any) -> nn.Module:
        made = hub.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
        return made.eval()

    return load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer; not to be written to."""
    return written(tmp_path_factory.mktemp("hf") / "plain", checkpoint())


@pytest.fixture(scope="session")
def tokenizer(corpus: TextCorpus) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), corpus)
