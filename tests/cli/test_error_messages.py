"""Catalogue of error messages: one line with key, value and remedy; exit status 2; no files."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore, build_store
from tokengrow.metrics import logger_collection as metrics

Command = Callable[..., Any]

TINY = (
    "model=tiny",
    "model.vocab_size=512",
    "model.context_length=32",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "fabric=cpu",
)
"""A model that the session's store fits."""

PROGRESS = {"eval": "reading the checkpoint and the tasks"}
"""Verb to the progress line that it prints on stderr before the input is checked."""

LADDER = (*TINY, "+stages.only.steps=1")


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty working directory, in which no file may be created."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(command: Command, somewhere: Path, tmp_path: Path) -> Command:
    """`refused(verb, *arguments)` checks that a wrong input writes no file; returns the message."""

    def call(verb: str, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = command(verb, *arguments)
        lines = [line for line in outcome.err.splitlines() if line != PROGRESS.get(verb)]
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith(f"tokengrow {verb}: ")
        assert "Traceback" not in outcome.out
        assert outcome.status == 2
        assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"
        return str(lines[0].removeprefix(f"tokengrow {verb}: "))

    return call


# Words of the command line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["generate", "source=x", "prompt=import", "os"],
            "Expected key=value, got 'os'. Quote text with spaces: prompt='import os'.",
        ),
        (
            ["generate", "source=x", "prompt=a", "=", "b"],
            "Expected key=value, got 'b'. Quote text with spaces: prompt='a = b'.",
        ),
        (["generate", "runs/a"], "Expected key=value, got 'runs/a'. --help lists the keys."),
        (["generate", "."], "Expected key=value, got '.'. Did you mean source=.?"),
        (["report", "."], "Expected key=value, got '.'. Did you mean runs=[.]?"),
        (
            ["report", "runs=[a", "b]", "out=x"],
            "runs=[a: the list has no closing bracket. Quote spaces, as in 'runs=[a, b]'.",
        ),
        (
            ["generate", "source=x", "stop=['it's']"],
            "Cannot parse stop=['it's']. Put text in double quotes inside single ones: "
            "'stop=[\"...\"]'.",
        ),
        (
            ["eval", "source=x", "--tasks", "piqa"],
            "Unknown option --tasks. Did you mean tasks=...?",
        ),
        (["eval", "source=x", "--limit=5"], "Unknown option --limit. Did you mean limit=5?"),
        (
            ["plan", "--batch-size", "4"],
            "Unknown option --batch-size. Did you mean batch_size=...?",
        ),
        (["eval", "--multirn"], "Unknown option --multirn. Did you mean '--multirun'?"),
    ],
)
def test_a_word_that_is_not_key_value_is_refused(
    refused: Command, words: list[str], sentence: str
) -> None:
    assert refused(*words) == sentence


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ("abc", "limit must be a number, got 'abc'."),
        ("2.5", "limit must be a whole number, or below 1, got 2.5."),
    ],
)
def test_a_limit_is_a_whole_number_or_a_share(
    refused: Command, source: Path, limit: str, sentence: str
) -> None:
    assert refused("eval", f"source={source}", "tasks=[piqa]", f"limit={limit}") == sentence


# Keys and groups


def test_an_unavailable_kernel_is_refused_before_data_is_read(refused: Command) -> None:
    said = refused("train", *LADDER, "kernel=triton", "data=text", "data.files=[no-such-file]")
    assert said == "kernel must be auto or reference on a CPU, got 'triton', which needs a GPU."


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize=4", "batch_size"),
        ("optim.learning=1", "optim.lr"),
        ("optim.warmup_step=1", "optim.warmup_steps"),
        ("model.token.ffn=8", "model.tokens.ffn"),
        ("stages.small.step=3", "stages.small.steps"),
        ("data.files=[a.txt]", "data.source"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(refused: Command, key: str, nearest: str) -> None:
    said = refused("train", "recipes=quickstart", key)
    assert said == f"Unknown key {key.partition('=')[0]}. Did you mean {nearest!r}?"


@pytest.mark.parametrize("key", ["steps=3", "tokens=1e6", "optim.lr=1e-4", "plateau.patience=2"])
def test_an_unknown_stage_is_named_with_the_nearest(refused: Command, key: str) -> None:
    said = refused("train", "recipes=quickstart", f"stages.smal.{key}")
    assert said == "Unknown key stages.smal. Did you mean 'stages.small'?"


def test_a_stage_of_two_lengths_is_refused(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "stages.small.tokens=1e6")
    assert said == (
        "stages.small must have one of steps, tokens, flops, got steps and tokens. Set the others "
        "to null (stages.small.steps=null or stages.small.tokens=null)."
    )


def test_an_unknown_key_inside_a_stage_is_named_with_the_nearest(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "+stages.small.step=3")
    assert said == "Unknown key stages.small.step. Did you mean 'steps'?"


def test_an_added_key_that_no_config_has_is_refused(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "+optim.lrr=3")
    assert said == "Unknown key optim.lrr. Did you mean 'lr'?"


@pytest.mark.parametrize(
    ("choice", "nearest"),
    [
        ("model=tny", "tiny"),
        ("optim=adam", "adamw"),
        ("recipes=quikstart", "quickstart"),
        ("data=stdlb", "stdlib"),
    ],
)
def test_a_misspelt_choice_is_named_with_the_nearest(
    refused: Command, choice: str, nearest: str
) -> None:
    said = refused("train", choice)
    assert said == f"Unknown choice {choice}. Did you mean {nearest!r}?"


def test_an_unknown_group_is_named(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "modle=tiny")
    assert said == "Unknown key modle. Did you mean 'model'?"


@pytest.mark.parametrize("group", ["model", "data", "optim"])
def test_renamed_choice_is_refused_with_its_new_name(refused: Command, group: str) -> None:
    message = f"{group}=same was renamed: use {group}=inherit."
    assert refused("train", f"{group}=same") == message
    assert refused("plan", "recipes=quickstart", f"{group}=same") == message


@pytest.mark.parametrize("group", ["model", "data", "optim"])
def test_renamed_choice_in_a_users_recipe_is_refused(
    refused: Command, tmp_path: Path, group: str
) -> None:
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(f"# @package _global_\ndefaults:\n  - override /{group}: same\n")
    message = refused("train", "--config-dir", str(tmp_path), "recipes=mine")
    assert message == f"{group}=same was renamed: use {group}=inherit."


def test_renamed_choice_in_a_users_option_is_refused(refused: Command, tmp_path: Path) -> None:
    option = tmp_path / "model" / "mine.yaml"
    option.parent.mkdir()
    option.write_text("defaults:\n  - same\n  - _self_\nwidth: 8\n")
    message = refused("train", "--config-dir", str(tmp_path), "model=mine")
    assert message == "model=same was renamed: use model=inherit."


def test_a_key_without_a_value_is_refused(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "seed")
    assert said.startswith("Expected key=value, got 'seed'. Quote text with spaces:")


def test_a_missing_value_is_named(refused: Command) -> None:
    for key, words in (
        ("source", ["generate"]),
        ("out", ["grow", "source=x"]),
        ("out", ["data"]),
        ("data.files", ["train", *LADDER, "data=text"]),
    ):
        assert refused(*words) == f"{key} is missing and has no default. Set {key}=VALUE."


def test_a_missing_recipe_is_refused(refused: Command) -> None:
    message = "stages is empty. Choose a recipe (recipes=quickstart) or add stages."
    assert refused("train") == message
    message = "There is nothing to plan. Give recipes=NAME, model=NAME, or source=DIR."
    assert refused("plan") == message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=many", "seed"),
        ("batch_size=1.5", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("model.tokens.ffn=wide", "model.tokens.ffn"),
        ("model.tokens=8", "model.tokens"),
        ("stages.small.steps=0", "stages.small.steps"),
        ("stages.small.steps=ten", "stages.small.steps"),
        ("~stages.small.steps", "stages.small.steps"),
        ("stages=5", "stages"),
        ("stages.small=5", "stages.small"),
        ("stages.medium.model=5", "stages.medium.model"),
        ("stages.medium.optim=5", "stages.medium.optim"),
        ("resume=perhaps", "resume"),
        ("fabric.precision=fp8", "fabric.precision"),
        ("logger.kinds=[comet]", "logger.kinds"),
        ("logger.wandb.mode=later", "logger.wandb.mode"),
        ("growth.new_value_scale=0", "growth.new_value_scale"),
        ("micro_batch_size=3", "batch_size"),
        ("store=5", "store"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(
    refused: Command, store: TokenStore, override: str, key: str
) -> None:
    given = () if override.startswith("store") else (f"store={store.folder}",)
    small = ("model.vocab_size=512", "model.width=32", "max_steps_per_stage=1", "fabric=cpu")
    assert key in refused("train", "recipes=quickstart", *small, *given, override)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(
    refused: Command, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda library: None)
    said = refused("train", *LADDER, "data=text", "data.files=[missing]", f"logger={kind}")
    problem = f"logger.kinds has {kind}, which is not installed"
    assert f"{problem}. Run pip install 'tokengrow[{kind}]'" in said


# Sizes


def test_heads_that_do_not_divide_the_width_are_refused(refused: Command) -> None:
    said = refused("train", *LADDER, "model.heads=5")
    assert "model.width must be a multiple of model.heads (5), got 32." in said


def test_a_stage_smaller_than_the_one_before_is_refused(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "stages.large.model.tokens.ffn=300")
    assert "model.tokens.ffn must be at least 512, got 300." in said
    assert "model.tokens.ffn=512 or more" in said


def test_a_target_smaller_than_the_source_is_refused(refused: Command, source: Path) -> None:
    said = refused("grow", f"source={source}", "out=bigger", "model.tokens.query=4")
    assert "model.tokens.query must be at least 8, got 4." in said
    assert "or remove tokens with `tokengrow prune`" in said


def test_growth_of_a_fixed_key_is_refused(refused: Command, source: Path) -> None:
    said = refused("grow", f"source={source}", "out=bigger", "model.vocab_size=600")
    assert said.startswith("model.vocab_size must stay 512, got 600. Growth changes only width")


@pytest.mark.parametrize("verb", ["grow", "plan"])
def test_a_growth_that_sets_tau_is_refused(refused: Command, source: Path, verb: str) -> None:
    out = ["out=bigger"] if verb == "grow" else []
    said = refused(verb, f"source={source}", *out, "model.tokens.ffn=32", "model.tau.ffn=9")
    assert (
        "model.tau must be null, got {'ffn': 9}, because a growth keeps the value of the source"
        in said
    )


def test_a_stage_that_sets_tau_is_refused(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "+stages.large.model.tau={ffn: 3}")
    assert "stages.large.model.tau must be null, got {'ffn': 3}" in said


def test_a_growth_to_the_same_sizes_is_refused(refused: Command, source: Path) -> None:
    assert refused("grow", f"source={source}", "out=bigger") == (
        "model must be larger than source, got the same sizes. Set a larger one, for example "
        "model.tokens.ffn=32."
    )


def test_an_out_that_exists_is_not_overwritten(refused: Command, source: Path) -> None:
    said = refused("grow", f"source={source}", f"out={source}", "model.tokens.ffn=32")
    assert said == f"out={source} exists. Choose another out=; nothing is overwritten."


# Data


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(
    refused: Command, store: TokenStore, corpus: TextCorpus
) -> None:
    room = [*LADDER, "model.vocab_size=300"]
    assert "model.vocab_size" in refused("train", *room, "tokenizer.vocab_size=400")
    assert "model.vocab_size" in refused("train", *room, f"store={store.folder}")
    file = f"tokenizer.file={store.folder / 'tokenizer.json'}"
    said = refused("train", *room, "data=text", f"data.files={corpus.files}", file)
    assert (
        "model.vocab_size must be at least 512, the size of the tokenizer's vocabulary, got 300"
        in said
    )


def test_a_corpus_without_text_is_refused(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    data = ["data=text", f"data.files=[{tmp_path / 'empty.txt'}]"]
    assert "no text" in refused("train", *LADDER, *data)
    assert "no text" in refused("data", *data, "out=store", "tokenizer.vocab_size=300")


def test_files_that_are_not_there_are_refused(refused: Command) -> None:
    said = refused("train", *LADDER, "data=text", "data.files=[nowhere.txt]")
    assert "data.files must name text files, got 'nowhere.txt', which matches none." in said


@pytest.fixture
def short_store(corpus: TextCorpus, store: TokenStore, tmp_path: Path) -> TokenStore:
    """The corpus with a validation split of a few words."""
    (tmp_path / "short.txt").write_text("import this")
    data = replace(corpus, validation_files=[str(tmp_path / "short.txt")])
    return build_store(data, store.tokenizer(), tmp_path / "short", progress=False)


def test_a_validation_split_with_no_full_sequence_is_refused(
    refused: Command, short_store: TokenStore
) -> None:
    said = refused("train", *LADDER, f"store={short_store.folder}")
    assert "tokens in its validation split, got" in said
    assert "model.context_length" in said


def test_a_half_written_store_is_refused(
    refused: Command, store: TokenStore, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(store.folder, half)
    (half / "store.json").rename(half / "progress.json")
    assert "Unfinished token store" in refused("train", *LADDER, f"store={half}")


@pytest.mark.fault(
    "a token shard is cut short", "before a run", "refused with 2, the file named; nothing written"
)
def test_a_store_whose_shard_was_cut_is_refused(
    refused: Command, store: TokenStore, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(store.folder, cut)
    with (cut / "train_00000.bin").open("r+b") as shard:
        shard.truncate(100)
    assert "train_00000.bin has 100 bytes" in refused("train", *LADDER, f"store={cut}")


def test_a_folder_that_is_no_store_is_refused(refused: Command, tmp_path: Path) -> None:
    assert "Not a token store" in refused("train", *LADDER, f"store={tmp_path}")


# Checkpoints


def test_a_checkpoint_of_another_config_is_refused(
    refused: Command, source: Path, store: TokenStore
) -> None:
    arguments = [f"out={source.parent}", f"store={store.folder}", "+stages.n8.steps=2"]
    said = refused("train", *TINY, *arguments)
    assert "with another configuration" in said
    assert "choose another out=" in said


def test_a_run_of_other_stages_is_refused(
    refused: Command, source: Path, store: TokenStore
) -> None:
    said = refused("train", *LADDER, f"out={source.parent}", f"store={store.folder}")
    assert "with the stages n8" in said


def test_a_source_that_is_not_there_is_refused(refused: Command) -> None:
    for verb, more in (("generate", []), ("grow", ["out=x"]), ("plan", ["model.tokens.ffn=64"])):
        assert refused(verb, "source=nowhere", *more) == (
            "source: nowhere does not exist. Give the directory of a run or of a checkpoint."
        )


def test_a_damaged_source_is_refused(refused: Command, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    said = refused("generate", f"source={tmp_path / 'damaged'}")
    assert "model.safetensors" in said


def test_a_source_without_its_marker_is_refused(
    refused: Command, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "half")
    (tmp_path / "half" / "COMPLETE").unlink()
    assert "COMPLETE" in refused("generate", f"source={tmp_path / 'half'}")


def test_a_checkpoint_without_a_tokenizer_cannot_generate(
    refused: Command, source: Path, tmp_path: Path
) -> None:
    last = load_checkpoint(source)
    bare = save_checkpoint(tmp_path / "bare", Checkpoint(last.config, last.weights))
    assert "holds no tokenizer" in refused("generate", f"source={bare}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temperature=-1", "sampling.temperature must be 0 or at least 0.001, got -1.0."),
        ("sampling.top_p=0", "sampling.top_p must be in (0, 1], got 0.0."),
        ("sampling.max_tokens=0", "sampling.max_tokens must be at least 1, got 0."),
        ("sampling.top_k=-1", "sampling.top_k must be 0 or more, got -1."),
        ("sampling.seed=-1", "sampling.seed must be in [0, 2**63), got -1."),
        (
            "sampling.repetition_penalty=0",
            "sampling.repetition_penalty must be a number above 0, got 0.0.",
        ),
        (
            "sampling.tempreature=1",
            "Unknown key sampling.tempreature. Did you mean 'sampling.temperature'?",
        ),
    ],
)
def test_an_invalid_sampling_setting_is_refused(
    refused: Command, source: Path, override: str, message: str
) -> None:
    assert refused("generate", f"source={source}", override) == message


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["prompt=a", "prompts=a.txt"],
            "prompt and prompts must not both be set. Remove one of them.",
        ),
        (
            ["interactive=true", "prompts=a.txt"],
            "prompts must not be set with interactive=true, which reads prompts from the terminal "
            "and prints texts. Remove prompts or interactive.",
        ),
        (
            ["interactive=true", "out=a.jsonl"],
            "out must not be set with interactive=true, which reads prompts from the terminal and "
            "prints texts. Remove out or interactive.",
        ),
        (["batch_size=0"], "batch_size must be at least 1, got 0."),
        (
            ["stop=['a', '']"],
            "stop must not contain an empty string, which would end every text. Remove it.",
        ),
        (["stop=a"], "stop must be a list, got 'a'. Write stop=[a]."),
        (["prompts=none.txt"], "prompts: none.txt does not exist. Give a .txt or .jsonl file."),
        (["prompts=."], "prompts: . is a directory. Give a .txt or .jsonl file."),
    ],
)
def test_conflicting_settings_of_generate_are_refused(
    refused: Command, source: Path, overrides: list[str], sentence: str
) -> None:
    assert refused("generate", f"source={source}", *overrides) == sentence


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv",
            b"prompt\na\n",
            "must end in .txt (a prompt per line) or .jsonl, got a.csv. Rename the file.",
        ),
        ("a.txt", b"\n  \n", "has no prompt. Write at least one line."),
        ("a.txt", b"ab\xff\n", "byte 2: invalid UTF-8. Save the file as UTF-8."),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": }\n',
            "line 3: invalid JSON (Expecting value). Write one object per line.",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"text": "a"}\n',
            'line 2: expected an object with a text, {"prompt": "..."}.',
        ),
        ("a.jsonl", b'["a"]\n', 'line 1: expected an object with a text, {"prompt": "..."}.'),
        (
            "a.jsonl",
            b'{"prompt": 3}\n',
            'line 1: expected an object with a text, {"prompt": "..."}.',
        ),
    ],
    ids=["another_kind", "no_prompt", "no_utf8", "no_json", "no_key", "no_object", "no_text"],
)
def test_an_invalid_prompt_file_is_refused_with_its_line(
    refused: Command, source: Path, somewhere: Path, name: str, content: bytes, sentence: str
) -> None:
    (somewhere / name).write_bytes(content)
    said = refused("generate", f"source={source}", f"prompts={name}", "out=texts.jsonl")
    assert said.startswith("prompts") and name in said
    assert said.endswith(sentence)


def test_texts_do_not_overwrite_a_file(refused: Command, source: Path, somewhere: Path) -> None:
    (somewhere / "texts.jsonl").write_text("mine")
    said = refused("generate", f"source={source}", "out=texts.jsonl")
    assert said == "out=texts.jsonl exists. Choose another out=; nothing is overwritten."
    assert (somewhere / "texts.jsonl").read_text() == "mine"


def test_texts_cannot_be_written_below_a_file(
    refused: Command, source: Path, somewhere: Path
) -> None:
    (somewhere / "file").write_text("mine")
    said = refused("generate", f"source={source}", "out=file/texts.jsonl")
    assert "Choose another path." in said


def test_an_out_below_a_file_is_refused(refused: Command, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "grown"
    said = refused("grow", f"source={source}", "model.tokens.ffn=40", f"out={out}")
    assert said == f"{out}/step_00000002: Not a directory. Choose another path."


def test_a_seed_that_no_generator_takes_is_refused(refused: Command) -> None:
    assert refused("plan", "recipes=quickstart", f"seed={2**63}").startswith(
        "seed must be in [0, 2**63), got"
    )


def test_a_key_that_a_recipe_does_not_set_is_required(refused: Command) -> None:
    said = refused("train", "recipes=owt2-354m-to-757m-60k", "out=run")
    assert said == "source is missing and has no default. Set source=VALUE."


def test_a_value_with_commas_is_explained(refused: Command) -> None:
    said = refused("train", "recipes=quickstart", "data=megatron", "data.split=3,1")
    assert said.startswith("data.split=3,1: commas separate the values of a sweep")
    assert """'data.split="3,1"'""" in said
