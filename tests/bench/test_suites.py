"""What the suites measure, on small shapes on the CPU; what is wrong gets no time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.bench import data, decode, pattention, step
from tokengrow.data import store_writer as build
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.errors import UserError
from tokengrow.kernels import dispatch as op
from tokengrow.model.config import ModelConfig
from tokengrow.model.transformer import TransformerConfig

CPU = torch.device("cpu")
FABRIC = FabricConfig(accelerator="cpu", precision="32-true")


@pytest.fixture(autouse=True)
def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls, and no compiler: what is measured is another test's."""
    monkeypatch.setattr(step, "REPEATS", 2)
    monkeypatch.setattr(decode, "REPEATS", 2)
    monkeypatch.setattr(decode, "STEPS", 2)
    for name, value in {"ROUNDS": 2, "RUNS": 2, "MICRO_BATCHES": 2, "CONTEXT": 64}.items():
        monkeypatch.setattr(data, name, value)
    peers = {
        "formula": ("reference", False),
        "tokengrow": ("auto", False),
        "Transformer": (None, False),
    }
    monkeypatch.setattr(step, "PEERS", peers)


def test_a_layer_is_measured_in_units_of_its_six_products(monkeypatch: pytest.MonkeyPatch) -> None:
    named = pattention.peers(24)
    chosen = {name: named[name] for name in ("formula", "tokengrow")}
    monkeypatch.setattr(pattention, "peers", lambda n: chosen)
    rows = list(pattention.measure([(16, 24)], 32, torch.float32, CPU))
    assert [row.peer for row in rows] == ["six products", "formula", "tokengrow"]
    assert rows[0].against_limit == 1
    for row in rows:
        assert row.case == "D 16, N 24, 32 tokens" and row.dtype == "float32"
        ratio = row.median_ms / rows[0].median_ms
        assert row.against_limit == pytest.approx(ratio, rel=0.05)
        assert row.error < 1e-6


def test_a_layer_that_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = pattention.peers(24)["formula"]
    wrong = {"formula": formula, "wrong": lambda x, k, v: F.relu(x @ k.T) @ v}
    monkeypatch.setattr(pattention, "peers", lambda n: wrong)
    with pytest.raises(UserError, match=r"D 16, N 24: a relative error of .*: no time is given"):
        list(pattention.measure([(16, 24)], 32, torch.float32, CPU))


def test_a_step_is_a_share_of_what_the_device_can_do(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    rows = list(step.measure([("tiny", tiny_model(), 2)], FABRIC, list(step.PEERS)))
    assert [row.peer for row in rows] == ["formula", "tokengrow", "Transformer"]
    for row in rows:
        assert row.case == "tiny, 2 x 32 tokens" and row.dtype == "32-true"
        assert 0 < row.against_limit < 1 and row.error < 1e-5


@pytest.mark.parametrize("factor", [-1.0, 0.0, math.nan])
def test_a_step_that_computes_something_else_gets_no_time(
    factor: float, tiny_model: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = op.grouped_pattention

    def wrong(x: Tensor, layers: Any, activation: str, kernel: str = "auto") -> list[Tensor]:
        outs = right(x, layers, activation, "reference")
        return outs if kernel == "reference" else [out * factor for out in outs]

    monkeypatch.setattr(op, "grouped_pattention", wrong)
    with pytest.raises(UserError, match=r"tiny, tokengrow: its first loss .*: no time is given"):
        model = tiny_model(init="published")
        list(step.measure([("tiny", model, 2)], FABRIC, ["formula", "tokengrow"]))


def test_a_step_that_memory_is_too_small_for_is_a_row_without_a_time(
    tiny_model: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> step.Trained:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "_train", full)
    monkeypatch.setattr(step, "_reference", lambda *_: None)
    (row,) = step.measure([("tiny", tiny_model(), 2)], FABRIC, ["formula"])
    assert math.isnan(row.median_ms)


def test_the_peer_is_a_transformer_of_the_same_sizes(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    model = tiny_model()
    peer = TransformerConfig.matching(model)
    # Four D x D projections and a feed-forward layer of 4 D in each of 2 layers, D = 32, all with
    # biases, and three norms with affine.
    blocks = 2 * (4 * (32 * 32 + 32) + 2 * 32 * 128 + 128 + 32 + 2 * 2 * 32)
    assert peer.num_parameters() == 512 * 32 + blocks + 2 * 32
    assert peer.flops_per_token() == 6 * peer.num_parameters() + 6 * 2 * 32 * 32
    for key in ("context_length", "heads", "head_dim", "rotary_channels", "norm_eps", "init"):
        assert getattr(peer, key) == getattr(model, key)


def test_decoding_is_a_share_of_reading_the_weights(tiny_model: Callable[..., ModelConfig]) -> None:
    rows = list(decode.measure([("tiny", tiny_model())], torch.float32, CPU))
    assert [row.peer for row in rows] == [
        "weights read once",
        "forward pass with a cache",
        "tokengrow",
    ]
    assert rows[0].against_limit == 1
    for row in rows[1:]:
        assert 0 < row.against_limit < 1 and row.error < 1e-5


def test_decoding_that_is_off_gets_no_time(
    tiny_model: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: object) -> dict[str, decode.Decode]:
        def start(prompt: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda token: torch.ones(1, 512)

        return {"wrong": start}

    monkeypatch.setattr(decode, "_ways", wrong)
    with pytest.raises(UserError, match=r"tiny, wrong: a relative error of .*: no time is given"):
        list(decode.measure([("tiny", tiny_model())], torch.float32, CPU))


def test_tokenising_and_loading_are_shares_of_their_limits(
    corpus: TextCorpus, store: TokenStore, tmp_path: Path
) -> None:
    rows = list(data.measure(corpus, store.tokenizer(), tmp_path))
    assert [row.peer for row in rows[1:]] == [
        "text to token store",
        "read in sequence",
        "loader",
        "loader, 1 worker",
    ]
    limits = {"tokenise": rows[0], "load": rows[2]}
    texts = [text for split in ("train", "validation") for text in corpus.documents(split)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for row in rows:
        what, _, case = row.case.partition(": ")
        amount, unit = (megabytes, "MB/s") if what == "tokenise" else (16 * 64e-6, "M tokens/s")
        assert case.startswith(
            f"{megabytes:.1f} MB of text, 11 documents" if what == "tokenise" else "T 64, micro"
        )
        assert row.rate == pytest.approx(amount / row.median_ms * 1e3, rel=1e-2)
        assert row.unit == unit and row.dtype == "uint16"
        ratio = limits[what].median_ms / row.median_ms
        assert row.against_limit == pytest.approx(ratio, rel=0.01, abs=1e-3)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_store_that_holds_something_else_gets_no_time(
    corpus: TextCorpus, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = build._ShardWriter.append
    monkeypatch.setattr(
        build._ShardWriter, "append", lambda self, ids, end: append(self, ids[:-1], end)
    )
    with pytest.raises(UserError, match=r"the store of 11 documents has .*: no time is given"):
        list(data.measure(corpus, store.tokenizer(), tmp_path))
    assert not list(tmp_path.iterdir())
