"""Fabric from config: which device, which precision."""

import logging

import pytest
import torch

from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.errors import UserError


def test_the_cpu_computes_in_float32() -> None:
    fabric = build_fabric(FabricConfig(accelerator="cpu"))
    assert (fabric.device.type, fabric.world_size) == ("cpu", 1)
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_mixed_precision_multiplies_in_bfloat16() -> None:
    fabric = build_fabric(FabricConfig(accelerator="cpu", precision="bf16-mixed"))
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_lightnings_notes_do_not_break_into_the_progress(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        build_fabric(FabricConfig(accelerator="cpu", precision="bf16-mixed"))
    assert "Mixed Precision" not in caplog.text


@pytest.mark.parametrize("key", ["accelerator", "strategy", "precision"])
def test_an_unknown_choice_is_refused_by_name(key: str) -> None:
    with pytest.raises(UserError, match=rf"fabric\.{key} 'fp7': valid are auto, "):
        FabricConfig(**{key: "fp7"})


def test_a_number_of_devices_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"fabric\.devices must be at least 1, not 0"):
        FabricConfig(devices=0)


def test_the_optimizer_is_shared_out_by_one_means_alone() -> None:
    with pytest.raises(UserError, match=r"fabric\.zero1 is for ddp: fsdp2 shares out"):
        FabricConfig(strategy="fsdp2", zero1=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"fabric\.accelerator=cuda: no GPU is visible"):
        build_fabric(FabricConfig(accelerator="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_taken_where_there_is_one_in_bfloat16() -> None:
    fabric = build_fabric(FabricConfig())
    assert fabric.device.type == "cuda"
    with fabric.autocast():
        ones = torch.ones(2, 2, device=fabric.device)
        assert (ones @ ones).dtype == torch.bfloat16
