"""Paths of conf/ and recipes/, in a checkout, an editable install or a wheel, and of the cache."""

import os
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

ARMS = "arm"
"""Name of the group in a study's recipe that a sweep varies."""

_PACKAGE = Path(__file__).resolve().parent


def data_root() -> Path:
    """Return the directory of conf/ and recipes/: the package in a wheel, else the repository."""
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / "conf" / "train.yaml").is_file():
            return root
    raise FileNotFoundError(f"No conf/ in or next to {_PACKAGE}. Install tokengrow again.")


def recipes() -> list[str]:
    """Return the names of the recipes in the package, without the arms of studies."""
    folder = data_root() / "recipes"
    names = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names if name.parent.name != ARMS)


def cache_dir() -> Path:
    """Return the cache of tokenizers and token stores: TOKENGROW_CACHE, else the XDG directory."""
    if folder := os.environ.get("TOKENGROW_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tokengrow"


def _missing() -> NoReturn:
    """Resolve `${tokengrow.missing:}`; `???` in a recipe would keep the default of run.yaml."""
    raise MissingMandatoryValue("Missing mandatory value")


OmegaConf.register_new_resolver("tokengrow.missing", _missing, replace=True)
OmegaConf.register_new_resolver("tokengrow.root", lambda: str(data_root()), replace=True)
OmegaConf.register_new_resolver("tokengrow.recipes", lambda: ", ".join(recipes()), replace=True)
