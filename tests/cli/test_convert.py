"""`tokengrow convert`: published weights are read and written completely and exactly."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.interop.hf import is_hf
from tokengrow.interop.neox import EMBEDDING, published_names
from tokengrow.model.config import ModelConfig, Taus
from tokengrow.model.presets import PRESETS
from tokengrow.model.tokenformer import TokenFormer

Command = Callable[..., Any]
Preset = Callable[[int], ModelConfig]

pytestmark = pytest.mark.usefixtures("somewhere")

GOLDEN = Path(__file__).parents[1] / "golden" / "A_tiny_init"
OFFICIAL = GOLDEN / "config.json"
"""The configuration of model A in the published code; JSON is YAML."""


@pytest.fixture
def official() -> dict[str, Tensor]:
    """Model A by the published names."""
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture
def download(official: dict[str, Tensor]) -> Path:
    """Download of model A: `hub/pytorch_model.bin` without a config."""
    folder = Path("hub")
    folder.mkdir()
    torch.save(official, folder / "pytorch_model.bin")
    (folder / "README.md").touch()
    return folder


@pytest.fixture
def convert(command: Command) -> Callable[..., str]:
    """`convert(*arguments)` succeeds and returns its output without line breaks."""

    def call(*arguments: str) -> str:
        outcome = command("convert", *arguments)
        assert (outcome.status, outcome.err) == (0, "")
        return " ".join(outcome.out.split())

    return call


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """`refused(*arguments)` exits with status 2, writes no file and returns its one-line error."""

    def call(*arguments: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        outcome = command("convert", *arguments)
        assert outcome.status == 2
        assert outcome.out == ""
        assert len(outcome.err.splitlines()) == 1, outcome.err
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
        return str(outcome.err.removeprefix("tokengrow convert: "))

    return call


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """`preset(rows)` writes `a.bin`: zeros of a tiny preset=small with `rows` vocabulary rows."""
    monkeypatch.setitem(PRESETS, "small", (1, 8, 1, 4, 8, 16))

    def save(rows: int) -> ModelConfig:
        sizes = ModelConfig.preset("small")
        model = TokenFormer(replace(sizes, vocab_size=rows)).half()
        names = published_names(sizes)
        torch.save({names[ours]: zero for ours, zero in model.to_weights().items()}, "a.bin")
        return sizes

    return save


def files(folder: Path | str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


NO_SOURCE = "source is missing. Give weights or a GPT-NeoX YAML (source=PATH)."
TWO_SIZES = "config and preset must not both be set, because both define the sizes. Remove one."
FROM_A = (f"config={OFFICIAL}", "to=tokengrow", "out=ours")


class TestWeightsIn:
    def test_the_logits_are_those_of_the_published_code(
        self,
        convert: Command,
        download: Path,
        published_config: ModelConfig,
        published_figures: dict[str, Tensor],
    ) -> None:
        convert(f"source={download}", *FROM_A)
        found = load_checkpoint("ours")
        assert found.config == published_config
        with torch.no_grad():
            logits = found.model(published_figures["input_ids"])
        assert (logits - published_figures["logits"]).abs().max() < 5e-6

    def test_the_checkpoint_has_no_history(self, convert: Command, download: Path) -> None:
        convert(f"source={download}", *FROM_A)
        found = load_checkpoint("ours")
        assert found.folder == Path("ours/step_00000000")
        assert (found.step, found.run, found.lineage) == (0, None, ())
        assert (found.optimizer, found.tokenizer) == ({}, None)

    @pytest.mark.parametrize("source", ["hub", "hub/pytorch_model.bin", "a.safetensors", "old.pt"])
    def test_a_folder_and_every_kind_of_file_hold_the_same(
        self, convert: Command, download: Path, official: dict[str, Tensor], source: str
    ) -> None:
        save_file(official, "a.safetensors")
        torch.save(official, "old.pt", _use_new_zipfile_serialization=False)
        convert(f"source={source}", *FROM_A)
        found = load_checkpoint("ours").weights
        assert torch.equal(found["embedding.weight"], official[EMBEDDING])
        assert len(found) == len(official)

    def test_the_yaml_and_the_tokenizer_of_the_folder_are_used(
        self, convert: Command, download: Path, store: TokenStore
    ) -> None:
        shutil.copy(OFFICIAL, "hub/150M.yml")
        shutil.copy(store.folder / "tokenizer.json", download)
        output = convert("source=hub", "to=tokengrow", "out=ours")
        assert "sizes of hub/150M.yml" in output
        assert "documents end with <|endoftext|>" in output
        found = load_checkpoint("ours")
        assert found.tokenizer == store.tokenizer().to_json()
        assert found.end_of_text == "<|endoftext|>"

    def test_a_preset_gives_the_sizes(self, convert: Command, preset: Preset) -> None:
        sizes = preset(50304)
        output = convert("source=a.bin", "preset=small", "to=tokengrow", "out=ours")
        assert "sizes of preset=small" in output and "13 of float16" in output
        assert load_checkpoint("ours").config == sizes

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_precisions_are_kept(
        self, convert: Command, official: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        torch.save(official | {EMBEDDING: official[EMBEDDING].to(dtype)}, "mixed.bin")
        name = str(dtype).removeprefix("torch.")
        assert f"{name} (1) and float32 (32)" in convert("source=mixed.bin", *FROM_A)
        found = load_checkpoint("ours").weights
        assert found["embedding.weight"].dtype == dtype
        assert found["final_norm.weight"].dtype == torch.float32

    def test_the_output_lists_input_result_and_next_command(
        self, convert: Command, download: Path, store: TokenStore
    ) -> None:
        output = convert(f"source={download}", *FROM_A)
        assert "hub/pytorch_model.bin: published weights" in output
        assert "33 of float32, 164,992 parameters" in output
        assert "tokenizer none; add one with tokenizer.file=FILE" in output
        assert "ours/step_00000000" in output
        file = f"tokenizer.file={store.folder / 'tokenizer.json'}"
        assert "tokengrow generate source=o2" in convert(
            f"source={download}", *FROM_A[:2], "out=o2", file
        )

    def test_the_result_can_generate_grow_and_train(
        self, convert: Command, command: Command, download: Path, store: TokenStore
    ) -> None:
        convert("source=hub", *FROM_A, f"tokenizer.file={store.folder / 'tokenizer.json'}")
        assert command("generate", "source=ours", "sampling.max_tokens=2").status == 0
        assert command("grow", "source=ours", "model.tokens.ffn=170", "out=grown").status == 0
        run = ("+stages.on.steps=1", "batch_size=2", "micro_batch_size=2", "fabric=cpu")
        places = ("source=grown", f"store={store.folder}", "out=run")
        trained = command("train", *places, *run, "validation_sequences=2")
        assert trained.status == 0, trained.err
        assert load_checkpoint("run").config.tokens.ffn == 170


class TestRoundTrip:
    def test_the_published_layout_comes_back_bit_for_bit(
        self, convert: Command, download: Path, official: dict[str, Tensor], store: TokenStore
    ) -> None:
        shutil.copy(store.folder / "tokenizer.json", download)
        convert("source=hub", *FROM_A)
        convert("source=ours", "to=neox", "out=neox")
        convert("source=neox", "to=tokengrow", "out=again")
        convert("source=again", "to=neox", "out=neox2")
        assert files("ours") == files("again")
        assert files("neox") == files("neox2")
        assert set(files("neox")) == {"pytorch_model.bin", "config.yml", "tokenizer.json"}
        written = torch.load("neox/pytorch_model.bin")
        assert written.keys() == official.keys()
        assert all(torch.equal(written[name], official[name]) for name in official)

    def test_every_format_converts_to_every_other(
        self, convert: Command, download: Path, store: TokenStore
    ) -> None:
        shutil.copy(store.folder / "tokenizer.json", download)
        convert("source=hub", *FROM_A)
        expected = files("ours")
        convert("source=hub", f"config={OFFICIAL}", "to=hf", "out=hf")
        assert is_hf(Path("hf"))
        for source, to, out in (
            ("hf", "neox", "n1"),
            ("n1", "hf", "h1"),
            ("h1", "tokengrow", "t1"),
            ("n1", "neox", "n2"),
            ("n2", "tokengrow", "t2"),
            ("t2", "hf", "h2"),
            ("h2", "hf", "h3"),
            ("h3", "tokengrow", "t3"),
        ):
            convert(f"source={source}", f"to={to}", f"out={out}")
        for out in ("t1", "t2", "t3"):
            assert files(out) == expected

    def test_a_run_converts_its_newest_checkpoint_with_its_history(
        self, convert: Command, source: Path
    ) -> None:
        convert(f"source={source.parent}", "to=tokengrow", "out=copy")
        assert files("copy/step_00000002") == files(source)

    def test_another_end_of_text_is_named_on_the_way_back(
        self, convert: Command, refused: Command, download: Path, store: TokenStore
    ) -> None:
        file = store.folder / "tokenizer.json"
        Path("t.json").write_text(file.read_text().replace("<|endoftext|>", "<|end|>"))
        end = "tokenizer.end_of_text='<|end|>'"
        convert("source=hub", *FROM_A, "tokenizer.file=t.json", end)
        output = convert("source=ours", "to=neox", "out=neox")
        assert "<|end|> (not stored there" in output
        assert "tokenizer.end_of_text" in refused("source=neox", "to=tokengrow", "out=again")
        convert("source=neox", "to=tokengrow", "out=again", end)
        assert files("again") == files("ours")


class TestRefusal:
    def test_a_tau_kept_by_growth_cannot_be_published(
        self, refused: Command, tiny_model: Callable[..., ModelConfig]
    ) -> None:
        model = replace(tiny_model(8), tau=Taus(ffn=3.0))
        save_checkpoint("kept", Checkpoint(model, {}))
        Path("empty").mkdir()
        message = refused("source=kept", "to=neox", "out=empty")
        assert message == refused("source=kept", "to=neox", "out=deep/neox")
        assert "model.tau.ffn (3.0): it computes sqrt(16)" in message
        assert "to=hf" in message

    def test_a_tokenizer_that_cannot_be_exported_writes_nothing(
        self, refused: Command, published_model: TokenFormer
    ) -> None:
        made = replace(Checkpoint.of(published_model), tokenizer="{}", end_of_text="<|end|>")
        save_checkpoint("ours", made)
        assert "is not a tokenizers JSON" in refused("source=ours", "to=hf", "out=deep/er/hf")

    @pytest.mark.parametrize("to", ["tokengrow", "hf", "neox"])
    def test_a_type_that_torch_cannot_mix_is_named(
        self, refused: Command, official: dict[str, Tensor], to: str
    ) -> None:
        torch.save(official | {EMBEDDING: official[EMBEDDING].to(torch.float8_e4m3fn)}, "a.bin")
        message = refused("source=a.bin", f"config={OFFICIAL}", f"to={to}", "out=ours")
        assert f"{EMBEDDING} (float8_e4m3fn)" in message

    def test_every_tensor_that_does_not_fit_is_named(
        self, refused: Command, official: dict[str, Tensor]
    ) -> None:
        official["sequential.9.x"] = official.pop("sequential.6.norm.bias")
        official["sequential.2.mlp.key_param_tokens"] = torch.ones(160, 65)
        torch.save(official, "a.bin")
        message = refused("source=a.bin", *FROM_A)
        assert "sequential.6.norm.bias [64] is missing" in message
        assert "sequential.9.x [64] is not part of the model" in message
        assert (
            "sequential.2.mlp.key_param_tokens must have shape [160, 64], got [160, 65]" in message
        )

    def test_a_pickle_that_would_run_a_program_runs_nothing(
        self, refused: Command, official: dict[str, Tensor]
    ) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return open, ("ran", "w")

        torch.save({**official, "x": Evil()}, "a.bin")
        assert "Nothing in it was run" in refused("source=a.bin", *FROM_A)
        assert not Path("ran").exists()

    @pytest.mark.parametrize("value", [[torch.ones(2)], {"module": {"a": torch.ones(2)}}])
    def test_a_pickle_of_something_else_is_refused(self, refused: Command, value: Any) -> None:
        torch.save(value, "a.bin")
        assert "named tensors" in refused("source=a.bin", *FROM_A)

    def test_a_file_that_was_cut_is_refused(self, refused: Command, download: Path) -> None:
        content = (download / "pytorch_model.bin").read_bytes()
        Path("a.bin").write_bytes(content[: len(content) // 2])
        assert "is truncated, damaged" in refused("source=a.bin", *FROM_A)

    def test_integer_weights_are_refused(
        self, refused: Command, official: dict[str, Tensor]
    ) -> None:
        torch.save({**official, EMBEDDING: official[EMBEDDING].long()}, "a.bin")
        assert f"{EMBEDDING} (int64)" in refused("source=a.bin", *FROM_A)

    def test_weights_without_sizes_are_refused(self, refused: Command, download: Path) -> None:
        message = refused("source=hub", "to=tokengrow", "out=ours")
        assert "Give config=YAML or preset=NAME" in message

    def test_json_in_the_folder_is_not_read_as_the_config(
        self, refused: Command, download: Path
    ) -> None:
        shutil.copy(OFFICIAL, "hub/config.json")
        message = refused("source=hub", "to=tokengrow", "out=ours")
        assert "Give config=YAML or preset=NAME" in message

    def test_weights_of_a_published_size_are_recognised(
        self, refused: Command, preset: Preset
    ) -> None:
        preset(50304)
        message = refused("source=a.bin", "to=tokengrow", "out=ours")
        assert "its tensors are those of preset=small" in message
        message = refused("source=a.bin", "preset=150m", "to=tokengrow", "out=ours")
        assert "the sizes of preset=small" in message

    def test_a_preset_has_the_published_vocabulary(self, refused: Command, preset: Preset) -> None:
        preset(50277)
        message = refused("source=a.bin", "preset=small", "to=tokengrow", "out=ours")
        assert f"{EMBEDDING} must have shape [50304, 8], got [50277, 8]" in message

    def test_several_yamls_in_the_folder_are_named(self, refused: Command, download: Path) -> None:
        shutil.copy(OFFICIAL, "hub/a.yml")
        shutil.copy(OFFICIAL, "hub/b.yaml")
        message = refused("source=hub", "to=tokengrow", "out=ours")
        assert "a.yml or b.yaml" in message

    def test_a_tokenizer_larger_than_the_model_is_refused(
        self, refused: Command, official: dict[str, Tensor], store: TokenStore
    ) -> None:
        torch.save(official | {EMBEDDING: official[EMBEDDING][:500].clone()}, "a.bin")
        message = refused(
            "source=a.bin", *FROM_A, f"tokenizer.file={store.folder / 'tokenizer.json'}"
        )
        assert "must have at most 500 entries, the rows of the model, got 512" in message

    def test_a_tokenizer_that_cannot_be_read_is_refused(
        self, refused: Command, download: Path
    ) -> None:
        (download / "tokenizer.json").write_text("{}")
        assert "hub/tokenizer.json" in refused("source=hub", *FROM_A)

    @pytest.mark.parametrize("to", ["tokengrow", "neox", "hf"])
    def test_an_existing_out_is_not_overwritten(
        self, refused: Command, download: Path, to: str
    ) -> None:
        Path("mine").mkdir()
        Path("mine/note.txt").write_text("mine")
        message = refused("source=hub", f"config={OFFICIAL}", f"to={to}", "out=mine")
        assert "out=mine exists. Choose another out=" in message

    @pytest.mark.parametrize("to", ["tokengrow", "neox", "hf"])
    def test_an_empty_out_is_accepted(self, convert: Command, download: Path, to: str) -> None:
        Path("empty").mkdir()
        convert("source=hub", f"config={OFFICIAL}", f"to={to}", "out=empty")
        assert any(Path("empty").iterdir())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["source=hub", f"config={OFFICIAL}", "out=o"],
                "to is missing. Give one of tokengrow, hf, neox.",
            ),
            (
                ["source=hub", f"config={OFFICIAL}", "out=o", "to=gguf"],
                "to must be one of tokengrow, hf, neox, got 'gguf'.",
            ),
            (
                ["source=hub", "preset=150", "to=hf", "out=o"],
                "Unknown preset '150'. Did you mean '150m'?",
            ),
            (["source=hub", "preset=150m", "config=a.yml", "to=hf", "out=o"], TWO_SIZES),
            (
                ["source=hub", "config=nowhere.yml", "to=hf", "out=o"],
                "nowhere.yml does not exist",
            ),
            (
                ["source=nowhere", "preset=150m", "to=hf", "out=o"],
                "nowhere does not exist. Give the path of a weights file, or download or export "
                "it again.",
            ),
            (
                ["source=hub", "preset=150m", "gpus=8", "to=hf", "out=o"],
                "gpus must be null for weights; it applies only to a GPT-NeoX config. Remove it.",
            ),
            (
                ["source=hub", "preset=150m", "to=hf"],
                "out is missing and has no default. Set out=VALUE.",
            ),
            (["to=hf", "out=o"], NO_SOURCE),
            (["preset=150m", "out=o", "to=hf"], NO_SOURCE),
            (["config=a.yml", "preset=150m", "out=o"], TWO_SIZES),
            (
                ["source=a.yml", "to=hf", "out=o"],
                "to=hf needs weights, but a.yml is a config. Remove to.",
            ),
            (
                ["source=a.json", "to=hf", "out=o"],
                "to=hf needs weights, but a.json is a config. Remove to.",
            ),
            (
                ["source=a.yml", "preset=150m", "out=o"],
                "source=a.yml is a GPT-NeoX config. Remove config and preset.",
            ),
            (["source=a.yml", "gpus=0", "out=o"], "gpus must be at least 1, got 0."),
            (["source=a.yml", "out=o", "sauce=3"], "Unknown key sauce. Did you mean 'source'?"),
        ],
    )
    def test_conflicting_arguments_are_refused(
        self, refused: Command, download: Path, arguments: list[str], message: str
    ) -> None:
        assert refused(*arguments).startswith(message)

    def test_a_checkpoint_has_its_own_sizes(self, refused: Command, source: Path) -> None:
        message = refused(f"source={source}", "preset=150m", "to=hf", "out=o")
        assert "has its own config. Remove config and preset." in message
