"""tokengrow convert: convert weights between formats, or a GPT-NeoX config into a recipe."""

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
from tokengrow.console.format import empty_table
from tokengrow.data.tokenizer import END_OF_TEXT, Tokenizer
from tokengrow.errors import UserError
from tokengrow.files import atomic_directory
from tokengrow.interop.hf import is_hf, read_hf, write_hf
from tokengrow.interop.neox import (
    WEIGHTS,
    find_weights,
    from_published,
    matching_presets,
    read_tensors,
    vocab_size_of,
    write_neox,
)
from tokengrow.interop.neox_config import NeoxConfig, read_neox_yaml
from tokengrow.model.config import ModelConfig
from tokengrow.model.presets import PRESETS
from tokengrow.parsing import parse_dataclass, suggest

T = TypeVar("T")

FORMATS = ("tokengrow", "hf", "neox")
YAML_EXTENSIONS = (".yml", ".yaml")
CONFIG_EXTENSIONS = (*YAML_EXTENSIONS, ".json")
"""Extensions of a GPT-NeoX config given by name; JSON in a directory may be anything."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """Tokenizer of a converted checkpoint or a recipe."""

    file: str | None
    """A ``tokenizers`` JSON file; null: that of the source, or next to published weights."""
    end_of_text: str
    """Token of that file that ends a document."""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Keys of convert.yaml."""

    source: str | None
    """Weights or GPT-NeoX config to convert; null: convert `config` into a recipe."""
    to: str | None
    """Output format, one of `FORMATS`; not used for a recipe."""
    out: str
    """Directory for the result."""
    config: str | None
    """GPT-NeoX config (YAML or JSON) with the sizes of published weights."""
    preset: str | None
    """Published size, instead of `config`."""
    gpus: int | None
    """Number of data-parallel processes of the run of a GPT-NeoX config."""
    tokenizer: TokenizerFile
    """Tokenizer of the weights."""

    @property
    def recipe(self) -> Path | None:
        """GPT-NeoX config to convert into a recipe; None: convert weights."""
        if self.source is None:
            return Path(self.config) if self.config else None
        return Path(self.source) if Path(self.source).suffix in CONFIG_EXTENSIONS else None

    def __post_init__(self) -> None:
        if self.source is None and self.config is None:
            raise UserError("source is missing. Give weights or a GPT-NeoX YAML (source=PATH).")
        if self.config and self.preset:
            raise UserError(
                "config and preset must not both be set, because both define the sizes. Remove one."
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(
                f"Unknown preset {self.preset!r}. {suggest(self.preset, list(PRESETS))}"
            )
        if self.recipe:
            self._check_recipe()
        elif self.gpus is not None:
            raise UserError(
                "gpus must be null for weights; it applies only to a GPT-NeoX config. Remove it."
            )
        elif self.to is None:
            raise UserError(f"to is missing. Give one of {', '.join(FORMATS)}.")
        elif self.to not in FORMATS:
            raise UserError(f"to must be one of {', '.join(FORMATS)}, got {self.to!r}.")

    def _check_recipe(self) -> None:
        if self.source is not None and (self.config or self.preset):
            raise UserError(f"source={self.source} is a GPT-NeoX config. Remove config and preset.")
        if self.preset:
            raise UserError("preset needs weights. Give them (source=PATH).")
        if self.to not in (None, "tokengrow"):
            raise UserError(
                f"to={self.to} needs weights, but {self.recipe} is a config. Remove to."
            )
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"gpus must be at least 1, got {self.gpus}.")


@dataclass(frozen=True)
class LoadedWeights:
    """Weights in any format, as a checkpoint."""

    checkpoint: Checkpoint
    """Checkpoint of tokengrow."""
    description: str
    """Path and format of the weights."""
    folder: Path | None = None
    """Directory that may hold their tokenizer."""


def main(config: DictConfig) -> None:
    """Convert `source` into `out`."""
    values = OmegaConf.to_container(config, resolve=True)
    arguments = parse_dataclass(ConvertArguments, values)
    out, console = new_folder(arguments.out), Console(highlight=False)
    if arguments.recipe:
        tokenizer = arguments.tokenizer
        recipe = neox_recipe(
            arguments.recipe, arguments.gpus, tokenizer.file, tokenizer.end_of_text
        )
        write_atomic_directory(out, write_recipe, recipe)
        show_recipe(console, out, recipe)
        return
    with console.status("converting"):
        source = read(arguments)
        checkpoint = with_tokenizer(source, arguments.tokenizer)
        folder = write(out, checkpoint, str(arguments.to))
    show(console, replace(source, checkpoint=checkpoint), out, folder, str(arguments.to))


def read(arguments: ConvertArguments) -> LoadedWeights:
    """Read the weights of `source` in any format.

    Raises:
        UserError: there are no weights, or they are not those of a model.
    """
    path = Path(str(arguments.source))
    ours = (path / COMPLETE).is_file() or (path.is_dir() and bool(step_folders(path)))
    if not (ours or is_hf(path)):
        return _read_published(path, arguments)
    if arguments.config or arguments.preset:
        raise UserError(f"source={path} has its own config. Remove config and preset.")
    if ours:
        checkpoint = load_checkpoint(path)
        return LoadedWeights(checkpoint, f"{checkpoint.folder}: checkpoint of tokengrow")
    return LoadedWeights(read_hf(path), f"{path}: Hugging Face folder")


def _read_published(path: Path, arguments: ConvertArguments) -> LoadedWeights:
    weights = find_weights(path) if path.is_dir() else path
    yaml = Path(arguments.config) if arguments.config else None
    if yaml is None and arguments.preset is None and path.is_dir():
        yaml = _only_yaml(path)
    keys = NeoxConfig.from_values(read_neox_yaml(yaml), yaml) if yaml else None
    tensors = read_tensors(weights)
    if keys:
        sizes, name = keys.to_model(vocab_size_of(tensors)), str(yaml)
    elif arguments.preset:
        sizes, name = ModelConfig.preset(arguments.preset), f"preset={arguments.preset}"
    else:
        raise UserError(_missing_sizes_message(weights, tensors))
    checkpoint = from_published(tensors, sizes, str(weights), name)
    return LoadedWeights(
        checkpoint, f"{weights}: published weights, sizes of {name}", weights.parent
    )


def _only_yaml(folder: Path) -> Path | None:
    """Return the YAML file of a directory, or None if it has none."""
    found = sorted(path for path in folder.iterdir() if path.suffix in YAML_EXTENSIONS)
    if len(found) > 1:
        names = " or ".join(path.name for path in found)
        raise UserError(f"{folder} holds several YAML files. Give config={names}, or preset=NAME.")
    return found[0] if found else None


def _missing_sizes_message(weights: Path, tensors: StateDict) -> str:
    """Return the error message for weights without a config."""
    fitting = matching_presets(tensors)
    hint = f" (its tensors are those of preset={' or '.join(fitting)})" if fitting else ""
    return f"{weights} has no config. Give config=YAML or preset=NAME{hint}."


def with_tokenizer(source: LoadedWeights, given: TokenizerFile) -> Checkpoint:
    """Add the given tokenizer, or the one next to published weights, to the checkpoint.

    Raises:
        UserError: the tokenizer cannot be read, or has more entries than the model has rows.
    """
    file, checkpoint = given.file, source.checkpoint
    if file is None and source.folder and (source.folder / TOKENIZER).is_file():
        file = str(source.folder / TOKENIZER)
    if file is None:
        return checkpoint
    tokenizer = Tokenizer.from_file(file, given.end_of_text)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"tokenizer.file must have at most {checkpoint.config.vocab_size} entries, the rows of "
            f"the model, got {tokenizer.vocab_size} in {file}. Give the tokenizer of its training."
        )
    text, end = tokenizer.to_json(), tokenizer.end_of_text_token
    return replace(checkpoint, tokenizer=text, end_of_text=end)


def write(out: Path, checkpoint: Checkpoint, to: str) -> Path:
    """Write a checkpoint in one of `FORMATS`; return its directory."""
    if to == "tokengrow":
        return save_checkpoint(out / step_folder(checkpoint.step), checkpoint)
    write_atomic_directory(out, write_neox if to == "neox" else write_hf, checkpoint)
    return out


def write_recipe(folder: Path, recipe: NeoxRecipe) -> None:
    """Write a recipe as `recipes/NAME.yaml` in a directory for `--config-dir`."""
    (folder / "recipes").mkdir()
    path = folder / "recipes" / f"{recipe.name}.yaml"
    path.write_text(recipe.text, encoding="utf-8")


def write_atomic_directory(out: Path, write: Callable[[Path, T], None], content: T) -> None:
    """Create the directory `out` atomically, filled by `write`."""
    with atomic_directory(out) as partial:
        write(partial, content)


def show(console: Console, source: LoadedWeights, out: Path, folder: Path, to: str) -> None:
    """Print the source, the result, and a command that uses it."""
    checkpoint = source.checkpoint
    parameters = f"{checkpoint.config.num_parameters():,} parameters"
    lines = {
        "read": source.description,
        "tensors": f"{_precisions(checkpoint.weights)}, {parameters}",
        "tokenizer": _tokenizer_text(checkpoint, to),
        to: str(folder),
        "next": _next_command(out, checkpoint, to),
    }
    _print(console, lines)


def _precisions(weights: Mapping[str, Tensor]) -> str:
    """Return the number of tensors and their data types."""
    kinds = Counter(dtype_name(tensor.dtype) for tensor in weights.values())
    each = [f"{kind} ({number})" if len(kinds) > 1 else kind for kind, number in kinds.items()]
    return f"{len(weights)} of {' and '.join(each)}"


def _tokenizer_text(checkpoint: Checkpoint, to: str) -> str:
    end = checkpoint.end_of_text
    if checkpoint.tokenizer is None:
        return "none; add one with tokenizer.file=FILE"
    if end is None:
        return "no end-of-text token; set tokenizer.file=FILE tokenizer.end_of_text=TOKEN"
    if to == "neox" and end != END_OF_TEXT:  # the published code hard-codes END_OF_TEXT
        return f"documents end with {end} (not stored there; set tokenizer.end_of_text=...)"
    return f"documents end with {end}"


def _next_command(out: Path, checkpoint: Checkpoint, to: str) -> str:
    """Return a command that uses the result."""
    place = quote(str(out))
    if to == "hf":
        return f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
    if to == "neox":
        return f"eval_ckpt: {out / WEIGHTS} in a YAML of the published code"
    if checkpoint.end_of_text is None:
        return f"tokengrow plan source={place}"
    return f'tokengrow generate source={place} prompt="Once upon a time"'


def show_recipe(console: Console, out: Path, recipe: NeoxRecipe) -> None:
    """Print the keys that were not converted exactly, the assumptions, and the train command."""
    rows = empty_table("Keys not converted exactly", "GPT-NeoX key", ())
    rows.add_column("reason")
    for key, reason in recipe.inexact.items():
        rows.add_row(key, reason)
    console.print(rows)
    given = "".join(f" {key}=..." for key in recipe.missing)
    command = f"tokengrow train --config-dir {quote(str(out))} recipes={recipe.name}{given}"
    path = out / "recipes" / f"{recipe.name}.yaml"
    lines = {"recipe": str(path)}
    if recipe.assumed_vocabulary:
        lines["vocabulary"] = f"{recipe.assumed_vocabulary}; set tokenizer.file=FILE to count it"
    _print(console, lines | {"next": command})


def _print(console: Console, lines: dict[str, str]) -> None:
    for name, text in lines.items():
        console.print(f"{name:<11} {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command("convert", main)
