"""Dependencies between packages, and the side effects of importing tokengrow."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import tokengrow

PACKAGE = Path(tokengrow.__file__).parent
ROOT = Path(__file__).parents[2]
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""`package/module` to its syntax tree; a shared module has no package."""

SHARED = {"errors", "parsing", "paths", "files", "figures", "compat"}
"""Modules that every package may import."""

DEPENDENCIES = {
    "kernels": set(),
    "console": set(),
    "model": {"kernels"},
    "data": {"model", "checkpoint"},
    "checkpoint": {"model"},
    "growth": {"model", "checkpoint"},
    "distributed": set(),
    "optim": {"model", "growth", "distributed", "checkpoint"},
    "metrics": {"console"},
    "generation": {"model", "kernels"},
    "interop": {"model", "checkpoint", "kernels"},
    "training": {
        "kernels",
        "model",
        "data",
        "checkpoint",
        "distributed",
        "growth",
        "optim",
        "metrics",
        "console",
    },
    "planning": {"model", "growth", "training", "distributed"},
    "evaluation": {"model", "data", "checkpoint", "distributed", "generation", "console"},
    "inspection": {"model", "checkpoint", "growth", "console"},
    "reports": {"checkpoint", "evaluation", "console"},
    "bench": {
        "kernels",
        "model",
        "data",
        "training",
        "distributed",
        "optim",
        "generation",
    },
    "cli": {
        "training",
        "model",
        "data",
        "checkpoint",
        "distributed",
        "growth",
        "optim",
        "metrics",
        "generation",
        "interop",
        "planning",
        "evaluation",
        "inspection",
        "reports",
        "console",
        "bench",
    },
}
"""Package to the packages that it may import."""


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name != "__version__":
            assert node.level == 0, "relative imports are banned"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    return module.partition("/")[0] if "/" in module else ""


def files_that_import(library: str) -> set[str]:
    return {
        module
        for module, tree in MODULES.items()
        if any(name.partition(".")[0] == library for name in imports_of(tree))
    }


def test_every_package_has_declared_dependencies() -> None:
    assert {package_of(module) for module in MODULES} - {""} == set(DEPENDENCIES)


@pytest.mark.parametrize("package", DEPENDENCIES)
def test_a_package_imports_only_its_dependencies(package: str) -> None:
    allowed = DEPENDENCIES[package] | SHARED | {package}
    for module, tree in MODULES.items():
        if package_of(module) != package:
            continue
        for name in imports_of(tree):
            library, _, inside = name.partition(".")
            if library == "tokengrow" and inside:
                assert inside.partition(".")[0] in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("shared", sorted(SHARED))
def test_a_shared_module_imports_no_package(shared: str) -> None:
    for name in imports_of(MODULES[shared]):
        library, _, inside = name.partition(".")
        if library == "tokengrow":
            assert inside.partition(".")[0] in SHARED


def test_only_cli_and_paths_know_hydra() -> None:
    assert all(package_of(m) == "cli" or m == "paths" for m in files_that_import("hydra"))
    assert files_that_import("hydra"), "the test sees something"


def test_only_code_that_runs_training_imports_lightning() -> None:
    importers = files_that_import("lightning") - {"compat"}
    packages = {package_of(module) for module in importers}
    assert packages <= {"distributed", "training", "metrics", "planning", "cli"}
    assert packages, "the test sees something"


def test_only_triton_files_of_kernels_know_triton() -> None:
    assert all(module.startswith("kernels/triton_") for module in files_that_import("triton"))


def test_only_exported_code_imports_transformers() -> None:
    exported = "interop/modeling_tokenformer"
    assert files_that_import("transformers") == {exported}
    libraries = {name.partition(".")[0] for name in imports_of(MODULES[exported])}
    assert libraries - sys.stdlib_module_names == {"torch", "transformers"}
    imported = {name for tree in MODULES.values() for name in imports_of(tree)}
    assert not any("modeling_tokenformer" in name for name in imported)


def assert_runs_in_silence(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_prints_nothing_and_loads_little() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import tokengrow; "
        "heavy = {'torch', 'hydra', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    assert_runs_in_silence(code)


def test_a_model_runs_where_triton_is_missing() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; "
        "from tokengrow import ModelConfig, TokenFormer; "
        "from tokengrow.model.config import ParameterTokens; "
        "tokens = ParameterTokens(query=4, key=4, value=4, output=4, ffn=8); "
        "config = ModelConfig(vocab_size=9, context_length=4, layers=1, width=8, heads=2, "
        "tokens=tokens); "
        "assert TokenFormer(config)(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 9)"
    )
    assert_runs_in_silence(code)


PUBLIC = {
    *("ModelConfig", "ParameterTokens", "Pattention", "TokenFormer", "TokenStore", "TrainConfig"),
    *("build_optimizer", "build_store", "fit", "generate", "grow", "load_checkpoint"),
    *("perplexity", "plan_growth", "save_checkpoint", "train_loader"),
}


def test_public_names_are_pinned() -> None:
    assert set(tokengrow.__all__) == PUBLIC
    for name in PUBLIC:
        public = getattr(tokengrow, name)
        assert getattr(import_module(public.__module__), name) is public


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_docstrings(name: str) -> None:
    public = getattr(tokengrow, name)
    docstring = public.__doc__ or ""
    assert docstring and not docstring.startswith(f"{name}("), "a docstring of its own"
    if not isinstance(public, type):
        assert "Args:" in docstring
        assert "Raises:" in docstring or "Yields:" in docstring


def test_importing_the_package_takes_less_than_300_ms() -> None:
    clock = "time.perf_counter()"
    code = f"import time; start = {clock}; import tokengrow; print({clock} - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3


def test_private_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'train'"):
        _ = tokengrow.train


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


CONFIGS = [
    pytest.param(node, id=node.name)
    for tree in MODULES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
    and (node.name.endswith(("Config", "Corpus")) or node.name in ("ParameterTokens", "Taus"))
]


@pytest.mark.parametrize("node", CONFIGS)
def test_every_field_of_a_config_says_what_it_is(node: ast.ClassDef) -> None:
    for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        documented = (
            isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        )
        assert documented, f"{node.name}.{ast.unparse(statement.target)}"


def test_the_configs_are_found() -> None:
    names = {parameter.id for parameter in CONFIGS}
    assert {"ModelConfig", "TrainConfig", "StageConfig", "OptimConfig", "TextCorpus"} <= names


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[ <>=;\[]", line)[0] for line in project["dependencies"]}
    # Extras: find_spec checks all but one before their use; exported code imports that one.
    declared |= {"lm_eval", "mlflow-skinny", "tensorboard", "torchao", "transformers", "wandb"}
    distributions = packages_distributions()
    for module, tree in MODULES.items():
        for name in imports_of(tree):
            library = name.partition(".")[0]
            if library in sys.stdlib_module_names or library in ("tokengrow", ""):
                continue
            named = {each.lower() for each in distributions[library]}
            assert named & {each.lower() for each in declared}, f"{module} imports {library}"
