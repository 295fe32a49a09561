"""tokengrow convert: weights from one format into another, or a GPT-NeoX YAML into a recipe."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from tokengrow.checkpoint.layout import COMPLETE, TOKENIZER, step_folder, step_folders
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.checkpoint.tensors import StateDict, dtype_name
from tokengrow.cli.neox_recipe import NeoxRecipe, neox_recipe
from tokengrow.cli.runner import new_folder, run_command
from tokengrow.console.format import table
from tokengrow.data.tokenizer import END_OF_TEXT, Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import atomic_directory
from tokengrow.interop.hf import is_hf, read_hf, write_hf
from tokengrow.interop.neox import (
    WEIGHTS,
    find_weights,
    fitting_presets,
    from_official,
    read_tensors,
    vocabulary_of,
    write_neox,
)
from tokengrow.interop.neox_config import NeoxConfig, read_neox_yaml
from tokengrow.model.config import ModelConfig
from tokengrow.model.presets import PRESETS
from tokengrow.parsing import parse_dataclass, suggest

T = TypeVar("T")

FORMATS = ("tokengrow", "hf", "neox")
YAML_ENDINGS = (".yml", ".yaml")
CONFIG_ENDINGS = (*YAML_ENDINGS, ".json")
"""Of a GPT-NeoX configuration that is given by its name; in a folder, JSON may be anything."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """The tokenizer that a converted checkpoint or a recipe gets."""

    file: str | None
    """A ``tokenizers`` JSON file; null: the source's own, or the one beside published weights."""
    end_of_text: str
    """The token of that file that ends a document."""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """The keys of convert.yaml."""

    source: str | None
    """What is converted; null: the configuration of `config`, into a recipe."""
    to: str | None
    """Format of the result, one of `FORMATS`; a recipe needs none."""
    out: str
    """Folder that will hold the result."""
    config: str | None
    """GPT-NeoX YAML, or the same as JSON, with the sizes of published weights."""
    preset: str | None
    """Published size, in place of `config`."""
    gpus: int | None
    """Data-parallel processes of a YAML's run."""
    tokenizer: TokenizerFile
    """The tokenizer that goes with the weights."""

    @property
    def recipe(self) -> Path | None:
        """The YAML, or JSON, that becomes a recipe, if there are no weights to convert."""
        if self.source is None:
            return Path(self.config) if self.config else None
        return Path(self.source) if Path(self.source).suffix in CONFIG_ENDINGS else None

    def __post_init__(self) -> None:
        if self.source is None and self.config is None:
            raise UserError("source is missing: give weights or a GPT-NeoX YAML (source=PATH)")
        if self.config and self.preset:
            raise UserError("config and preset both say what the sizes are: give one of them")
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r}{suggest(self.preset, list(PRESETS))}")
        if self.recipe:
            self._check_recipe()
        elif self.gpus is not None:
            raise UserError("gpus is of a recipe, made of a GPT-NeoX YAML alone: leave it out")
        elif self.to not in FORMATS:
            what = "is missing" if self.to is None else repr(self.to)
            raise UserError(f"to {what}: valid are {', '.join(FORMATS)}")

    def _check_recipe(self) -> None:
        if self.source is not None and (self.config or self.preset):
            raise UserError(f"source={self.source} is a GPT-NeoX YAML: leave out config and preset")
        if self.preset:
            raise UserError("preset is the size of weights: give them too (source=PATH)")
        if self.to not in (None, "tokengrow"):
            raise UserError(
                f"to={self.to} needs weights, and {self.recipe} is a YAML: leave it out"
            )
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"gpus must be at least 1, not {self.gpus}")


@dataclass(frozen=True)
class Source:
    """What was read."""

    checkpoint: Checkpoint
    """In our terms."""
    text: str
    """Where it was, and what it is."""
    folder: Path | None = None
    """Where a tokenizer may lie that belongs to it."""


def main(config: DictConfig) -> None:
    """Converts `source` into `out`."""
    # Not by cli.resolve: it imports all of training, 0.2 GB of which a conversion has no use.
    values = OmegaConf.to_container(config, resolve=True)
    arguments = parse_dataclass(ConvertArguments, values)
    out, console = new_folder(arguments.out), Console(highlight=False)
    if arguments.recipe:
        tokenizer = arguments.tokenizer
        recipe = neox_recipe(
            arguments.recipe, arguments.gpus, tokenizer.file, tokenizer.end_of_text
        )
        write_whole(out, write_recipe, recipe)
        show_recipe(console, out, recipe)
        return
    with console.status("converting"):
        source = read(arguments)
        checkpoint = with_tokenizer(source, arguments.tokenizer)
        folder = write(out, checkpoint, str(arguments.to))
    show(console, replace(source, checkpoint=checkpoint), out, folder, str(arguments.to))


def read(arguments: ConvertArguments) -> Source:
    """Reads the weights, in whichever of the formats they are.

    Raises:
        UserError: nothing there, or nothing that can be taken as a model.
    """
    path = Path(str(arguments.source))
    ours = (path / COMPLETE).is_file() or (path.is_dir() and bool(step_folders(path)))
    if not (ours or is_hf(path)):
        return _read_published(path, arguments)
    if arguments.config or arguments.preset:
        raise UserError(f"source={path} has its own config: leave out config and preset")
    if ours:
        checkpoint = load_checkpoint(path)
        return Source(checkpoint, f"{checkpoint.folder}: checkpoint of tokengrow")
    return Source(read_hf(path), f"{path}: Hugging Face folder")


def _read_published(path: Path, arguments: ConvertArguments) -> Source:
    weights = find_weights(path) if path.is_dir() else path
    yaml = Path(arguments.config) if arguments.config else None
    if yaml is None and arguments.preset is None and path.is_dir():
        yaml = _only_yaml(path)
    keys = NeoxConfig.of(read_neox_yaml(yaml), yaml) if yaml else None
    tensors = read_tensors(weights)
    if keys:
        sizes, name = keys.model(vocabulary_of(tensors)), str(yaml)
    elif arguments.preset:
        sizes, name = ModelConfig.preset(arguments.preset), f"preset={arguments.preset}"
    else:
        raise UserError(_ask_for_sizes(weights, tensors))
    checkpoint = from_official(tensors, sizes, str(weights), name)
    return Source(checkpoint, f"{weights}: published weights, sizes of {name}", weights.parent)


def _only_yaml(folder: Path) -> Path | None:
    """The YAML of a folder, if it has one."""
    found = sorted(path for path in folder.iterdir() if path.suffix in YAML_ENDINGS)
    if len(found) > 1:
        names = " or ".join(path.name for path in found)
        raise UserError(f"{folder} holds several YAML files: give config={names}, or preset=NAME")
    return found[0] if found else None


def _ask_for_sizes(weights: Path, tensors: StateDict) -> str:
    """The sentence about weights that come alone."""
    fitting = fitting_presets(tensors)
    hint = f" (its tensors are those of preset={' or '.join(fitting)})" if fitting else ""
    return f"{weights} does not say its sizes: give config=YAML or preset=NAME{hint}"


def with_tokenizer(source: Source, given: TokenizerFile) -> Checkpoint:
    """The checkpoint with the tokenizer that is given, or lies beside published weights.

    Raises:
        UserError: it cannot be used, or has more entries than the model has rows.
    """
    file, checkpoint = given.file, source.checkpoint
    if file is None and source.folder and (source.folder / TOKENIZER).is_file():
        file = str(source.folder / TOKENIZER)
    if file is None:
        return checkpoint
    tokenizer = Tokenizer.from_file(file, given.end_of_text)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"tokenizer.file: {file} has {tokenizer.vocab_size} entries, and the model "
            f"{checkpoint.config.vocab_size} rows: give the tokenizer that it was trained with"
        )
    text, end = tokenizer.to_json(), tokenizer.end_of_text_token
    return replace(checkpoint, tokenizer=text, end_of_text=end)


def write(out: Path, checkpoint: Checkpoint, to: str) -> Path:
    """Writes a checkpoint in one of `FORMATS`; returns its folder."""
    if to == "tokengrow":
        return save_checkpoint(out / step_folder(checkpoint.step), checkpoint)
    write_whole(out, write_neox if to == "neox" else write_hf, checkpoint)
    return out


def write_recipe(folder: Path, recipe: NeoxRecipe) -> None:
    """Writes a recipe as `recipes/NAME.yaml`, where `--config-dir` finds it, into a folder."""
    (folder / "recipes").mkdir()
    path = folder / "recipes" / f"{recipe.name}.yaml"
    path.write_text(recipe.text, encoding="utf-8")


def write_whole(out: Path, write: Callable[[Path, T], None], what: T) -> None:
    """Lets `write` fill the folder `out`, which is there whole or not at all."""
    with atomic_directory(out) as partial:
        write(partial, what)


def show(console: Console, source: Source, out: Path, folder: Path, to: str) -> None:
    """Prints what was read, what was written and where, and what to do with it."""
    checkpoint = source.checkpoint
    parameters = f"{checkpoint.config.num_parameters():,} parameters"
    lines = {
        "read": source.text,
        "tensors": f"{_precisions(checkpoint.weights)}, {parameters}",
        "tokenizer": _tokenizer_text(checkpoint, to),
        to: str(folder),
        "next": _next(out, checkpoint, to),
    }
    _print(console, lines)


def _precisions(weights: Mapping[str, Tensor]) -> str:
    """How many tensors there are, and of which types."""
    kinds = Counter(dtype_name(tensor.dtype) for tensor in weights.values())
    each = [f"{kind} ({number})" if len(kinds) > 1 else kind for kind, number in kinds.items()]
    return f"{len(weights)} of {' and '.join(each)}"


def _tokenizer_text(checkpoint: Checkpoint, to: str) -> str:
    end = checkpoint.end_of_text
    if checkpoint.tokenizer is None:
        return "none: give tokenizer.file=FILE to have one in it"
    if end is None:
        return "no end of text: give tokenizer.file=FILE tokenizer.end_of_text=TOKEN"
    if to == "neox" and end != END_OF_TEXT:  # which the published code has in its source
        return f"documents end with {end} (the folder does not say it: tokenizer.end_of_text=...)"
    return f"documents end with {end}"


def _next(out: Path, checkpoint: Checkpoint, to: str) -> str:
    """The command that one is likely to want."""
    place = quote(str(out))
    if to == "hf":
        return f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
    if to == "neox":
        return f"eval_ckpt: {out / WEIGHTS} in a YAML of the published code"
    if checkpoint.end_of_text is None:
        return f"tokengrow plan source={place}"
    return f'tokengrow generate source={place} prompt="Once upon a time"'


def show_recipe(console: Console, out: Path, recipe: NeoxRecipe) -> None:
    """Prints what was not carried over, what is taken for granted, and the recipe's command."""
    rows = table("Not carried over exactly", "GPT-NeoX key", ())
    rows.add_column("why")
    for key, why in recipe.left.items():
        rows.add_row(key, why)
    console.print(rows)
    given = "".join(f" {key}=..." for key in recipe.missing)
    command = f"tokengrow train --config-dir {quote(str(out))} recipes={recipe.name}{given}"
    path = out / "recipes" / f"{recipe.name}.yaml"
    lines = {"recipe": str(path)}
    if recipe.assumed:
        lines["vocabulary"] = f"{recipe.assumed}: give tokenizer.file=FILE to have it counted"
    _print(console, lines | {"next": command})


def _print(console: Console, lines: dict[str, str]) -> None:
    for what, text in lines.items():
        console.print(f"{what:<11} {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command("convert", main)
