"""Fabric from config: device and precision."""

import logging

import pytest
import torch

from tokengrow.distributed.fabric import FabricConfig, build_fabric
from tokengrow.errors import UserError


def test_cpu_computes_in_float32() -> None:
    fabric = build_fabric(FabricConfig(accelerator="cpu"))
    assert (fabric.device.type, fabric.world_size) == ("cpu", 1)
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_mixed_precision_multiplies_in_bfloat16() -> None:
    fabric = build_fabric(FabricConfig(accelerator="cpu", precision="bf16-mixed"))
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_lightning_messages_do_not_interrupt_the_progress(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        build_fabric(FabricConfig(accelerator="cpu", precision="bf16-mixed"))
    assert "Mixed Precision" not in caplog.text


@pytest.mark.parametrize("key", ["accelerator", "strategy", "precision"])
def test_unknown_choice_is_an_error(key: str) -> None:
    with pytest.raises(UserError, match=rf"fabric\.{key} must be one of auto, .*, got 'fp7'"):
        FabricConfig(**{key: "fp7"})


def test_fewer_than_one_device_is_an_error() -> None:
    with pytest.raises(UserError, match=r"fabric\.devices must be at least 1, got 0"):
        FabricConfig(devices=0)


def test_zero1_under_fsdp2_is_an_error() -> None:
    message = r"fabric\.zero1 must be false under fsdp2, got true\. fsdp2 already shards"
    with pytest.raises(UserError, match=message):
        FabricConfig(strategy="fsdp2", zero1=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_an_error() -> None:
    message = r"fabric\.accelerator must be auto or cpu .*, got 'cuda': no GPU is visible"
    with pytest.raises(UserError, match=message):
        build_fabric(FabricConfig(accelerator="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_uses_the_gpu_in_bfloat16() -> None:
    fabric = build_fabric(FabricConfig())
    assert fabric.device.type == "cuda"
    with fabric.autocast():
        ones = torch.ones(2, 2, device=fabric.device)
        assert (ones @ ones).dtype == torch.bfloat16
