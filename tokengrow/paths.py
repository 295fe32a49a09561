"""Where things are: conf/ and recipes/ in a checkout, an editable install or a wheel; the cache."""

import os
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

ARMS = "arm"
"""Name of the group of a study's recipe that a sweep goes through."""

_PACKAGE = Path(__file__).resolve().parent


def data_root() -> Path:
    """The folder that holds conf/ and recipes/: the package in a wheel, else the repository."""
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / "conf" / "train.yaml").is_file():
            return root
    raise FileNotFoundError(f"tokengrow: no conf/ in or beside {_PACKAGE}: the install is broken")


def recipes() -> list[str]:
    """Names of the recipes that come with the package, without the arms of their studies."""
    folder = data_root() / "recipes"
    names = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names if name.parent.name != ARMS)


def cache_dir() -> Path:
    """Where tokenizers and token stores are kept between runs: TOKENGROW_CACHE, else the XDG
    one."""
    if folder := os.environ.get("TOKENGROW_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tokengrow"


def _missing() -> NoReturn:
    """What `${tokengrow.missing:}` stands for: a recipe's `???` would leave run.yaml's default."""
    raise MissingMandatoryValue("Missing mandatory value")


OmegaConf.register_new_resolver("tokengrow.missing", _missing, replace=True)
OmegaConf.register_new_resolver("tokengrow.root", lambda: str(data_root()), replace=True)
OmegaConf.register_new_resolver("tokengrow.recipes", lambda: ", ".join(recipes()), replace=True)
