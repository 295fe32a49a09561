"""Each private detail of another library that tokengrow.compat relies on still exists."""

import pickle
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from jinja2 import StrictUndefined, Template
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from tokengrow import compat
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.paths import data_root
from tokengrow.training.config import TrainConfig
from tokengrow.training.module import TokenFormerModule


def composition_error(*overrides: str) -> ConfigCompositionException:
    """Return the error of composing train.yaml with these overrides."""
    GlobalHydra.instance().clear()
    with (
        initialize_config_dir(str(data_root() / "conf"), version_base="1.3"),
        pytest.raises(ConfigCompositionException) as caught,
    ):
        compose("train", list(overrides))
    return caught.value


def test_torch_cpu_allocator_message() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert compat.is_out_of_memory(caught.value)
    assert not compat.is_out_of_memory(RuntimeError("shapes do not match"))


def test_torch_store_raises_a_network_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(RuntimeError) as caught:
        dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=0.2))
    assert compat.is_peer_connection_error(caught.value)
    assert not compat.is_peer_connection_error(RuntimeError("shapes do not match"))


def test_torch_marks_compiled_modules() -> None:
    block = nn.Linear(2, 2)
    assert not compat.is_compiled(block)
    block.compile(backend="eager")
    assert compat.is_compiled(block)


def test_torch_recompile_limit_is_patched() -> None:
    before = torch._dynamo.config.recompile_limit
    with compat.recompile_limit(before + 3):
        assert torch._dynamo.config.recompile_limit == before + 3
    assert torch._dynamo.config.recompile_limit == before


def test_fabric_unregisters_a_module(tiny_run: Callable[..., TrainConfig]) -> None:
    (stage,) = tiny_run("run", rungs=(8,)).stages
    tiny_module = TokenFormerModule(TokenFormer(stage.model), stage.optim, updates=1)
    fabric = Fabric(accelerator="cpu", devices=1)
    module = fabric.setup_module(tiny_module)
    assert tiny_module in fabric._callbacks
    compat.unregister_module(fabric, module)
    assert tiny_module not in fabric._callbacks


def test_hydra_names_an_unknown_key() -> None:
    error = composition_error("optim.lrr=1")
    assert compat.hydra_unknown_key(error) == "optim.lrr"
    assert compat.hydra_ambiguous_override(error) is None


def test_hydra_names_an_ambiguous_override() -> None:
    error = composition_error("seed=1,2")
    assert compat.hydra_ambiguous_override(error) == ("seed", "1,2")
    assert compat.hydra_unknown_key(error) is None


def test_omegaconf_names_a_missing_value() -> None:
    config = OmegaConf.create({"a": "???"})
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(config, throw_on_missing=True)
    assert compat.omegaconf_missing_key(caught.value) == "a"


def test_omegaconf_names_an_interpolation_to_a_missing_value() -> None:
    config = OmegaConf.create({"b": "${tokengrow.missing:}"})
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(config, resolve=True)
    assert compat.omegaconf_missing_key(caught.value) == "b"


def test_lm_eval_loads_task_functions(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "utils.py").write_text("def double(x):\n    return 2 * x\n")
    path = tmp_path / "task.yaml"
    path.write_text("task: sample\nprocess_docs: !function utils.double\n")
    config = compat.load_task_yaml(path)
    assert config["task"] == "sample"
    assert config["process_docs"](3) == 6
    sys.modules.pop("utils", None)


def test_jinja_names_a_missing_column() -> None:
    with pytest.raises(Exception, match="goal") as caught:
        Template("{{ goal }}", undefined=StrictUndefined).render()
    assert compat.missing_column(caught.value) == "'goal'"
    assert compat.missing_column(KeyError("sol1")) == "'sol1'"
    assert compat.missing_column(ValueError("'x'")) is None


def test_torch_names_a_refused_class(tmp_path: Path) -> None:
    torch.save({"weights": Path("x")}, tmp_path / "file.bin")
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "file.bin", weights_only=True)
    assert "Path" in str(compat.refused_pickle_global(str(caught.value)))
    assert compat.refused_pickle_global("file is cut short") is None
