"""Lightning Fabric from config."""

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from subprocess import Popen
from typing import Literal, get_args

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokengrow.distributed.launch import CLUSTER_GUIDE, Launch, detect_launch
from tokengrow.distributed.parallelize import CheckpointingMode, apply_fsdp
from tokengrow.errors import UserError

AcceleratorName = Literal["auto", "cpu", "cuda"]
"""Kind of device."""

StrategyName = Literal["auto", "ddp", "fsdp2"]
"""Distribution of a model over devices."""

PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "bf16-true")
"""Valid values of `fabric.precision`; on a command line, 32 is a number."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Maximum time that a rank waits in a collective, for example while rank 0 grows a model. The
launcher detects a rank that has exited long before."""


@dataclass(frozen=True, kw_only=True)
class FabricConfig:
    """Devices of a run, its distribution over them, and its precision."""

    accelerator: AcceleratorName = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    strategy: StrategyName = "auto"
    """ddp: the full model on each device; fsdp2: a shard of it on each device; auto: ddp."""
    devices: int | None = None
    """Devices per node, one process for each; null: as many as the launcher started. Without a
    launcher: all GPUs under ddp and fsdp2, otherwise one device."""
    num_nodes: int | None = None
    """Number of nodes; null: as many as the launcher started processes on."""
    precision: str = "auto"
    """auto (bf16-mixed on a GPU, otherwise 32), 32, bf16-mixed or bf16-true."""
    activation_checkpointing: CheckpointingMode = "none"
    """Activations that the backward pass recomputes: none, selective (all but matrix products) or
    block (all)."""
    zero1: bool = False
    """Under ddp: whether the optimizer state is sharded over the devices (ZeRO stage 1)."""

    def __post_init__(self) -> None:
        for key, valid in (
            ("accelerator", get_args(AcceleratorName)),
            ("strategy", get_args(StrategyName)),
            ("precision", PRECISIONS),
            ("activation_checkpointing", get_args(CheckpointingMode)),
        ):
            if (value := getattr(self, key)) not in valid:
                raise UserError(f"fabric.{key} must be one of {', '.join(valid)}, got {value!r}.")
        for key in ("devices", "num_nodes"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"fabric.{key} must be at least 1, got {value}.")
        if self.zero1 and self.strategy == "fsdp2":
            raise UserError(
                "fabric.zero1 must be false under fsdp2, got true. fsdp2 already shards the "
                "optimizer state. Remove fabric.zero1, or set fabric=ddp."
            )

    def single_device(self) -> "FabricConfig":
        """Return the config for one device, for measurements on it."""
        return replace(self, strategy="auto", devices=1, num_nodes=1, zero1=False)

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on a GPU."""
        return self.accelerator != "cpu" and torch.cuda.is_available()

    @property
    def chosen_precision(self) -> str:
        """Precision in Lightning's notation, with auto resolved."""
        if self.precision == "auto":
            return "bf16-mixed" if self.on_gpu else "32-true"
        return "32-true" if self.precision == "32" else self.precision


def build_fabric(config: FabricConfig) -> Fabric:
    """Build and launch Fabric; without a launcher, it starts the other processes of this node.

    Args:
        config: the `fabric` section.

    Raises:
        UserError: a GPU is missing, or the launcher started other processes than the config.
    """
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "fabric.accelerator must be auto or cpu on this machine, got 'cuda': no GPU is "
            "visible. Set fabric=cpu."
        )
    launch = detect_launch()
    devices, num_nodes = _resolve_processes(config, launch)
    if config.on_gpu and devices > torch.cuda.device_count():
        raise UserError(
            f"The processes per node must be at most the visible GPUs "
            f"({torch.cuda.device_count()}), got {devices}. Lower fabric.devices, or start fewer "
            "processes."
        )
    # Fabric's messages about precision and tensor cores would interrupt the progress display.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The launcher logs at INFO that it ends the job because a process has died.
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)
    if launch and launch.launcher == "srun":
        # Slurm sets it only if it was given, or to that of the enclosing job. Lightning needs it.
        os.environ["SLURM_NTASKS_PER_NODE"] = str(devices)
    fabric = Fabric(
        accelerator="cuda" if config.on_gpu else "cpu",
        strategy=_build_strategy(config, devices * num_nodes),
        devices=devices,
        num_nodes=num_nodes,
        precision=config.chosen_precision,  # type: ignore[arg-type]  # a Literal of Lightning
        # Without it, Lightning detects Slurm from the job or from an installed srun, and waits for
        # tasks that nothing starts.
        plugins=None if launch else [LightningEnvironment()],
    )
    fabric.launch()
    return fabric


def _resolve_processes(config: FabricConfig, launch: Launch | None) -> tuple[int, int]:
    """Return the number of processes per node and the number of nodes."""
    if launch:
        for key, unit in (("devices", "processes on each node"), ("num_nodes", "nodes")):
            value, started = getattr(config, key), getattr(launch, key)
            if value not in (None, started):
                raise UserError(
                    f"fabric.{key} must be {started}, because {launch.launcher} started {started} "
                    f"{unit}, got {value}. Remove fabric.{key}, or start as many "
                    f"({CLUSTER_GUIDE})."
                )
        return launch.devices, launch.num_nodes
    if (config.num_nodes or 1) > 1:
        raise UserError(
            f"fabric.num_nodes must be 1 without a launcher, got {config.num_nodes}. Start the "
            f"command with torchrun or srun ({CLUSTER_GUIDE})."
        )
    all_gpus = config.strategy != "auto" and config.on_gpu
    return config.devices or (torch.cuda.device_count() if all_gpus else 1), 1


def _build_strategy(config: FabricConfig, world_size: int) -> Strategy | str:
    """Return Lightning's strategy for a number of processes."""
    if world_size == 1:
        return "auto"
    if config.strategy == "fsdp2":
        return ModelParallelStrategy(
            partial(apply_fsdp, bf16_params=config.chosen_precision == "bf16-mixed"),
            data_parallel_size=world_size,  # the default is tensor parallelism within a node
            tensor_parallel_size=1,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return _SingleStreamDDP(timeout=COLLECTIVE_TIMEOUT, gradient_as_bucket_view=True)


class _SingleStreamDDP(DDPStrategy):
    """Lightning's DDP strategy without its CUDA stream of its own.

    Gradients would be accumulated on another stream than that of the training step, and each
    stream would wait for the other.
    """

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(
            module, device_ids=self._determine_ddp_device_ids(), **self._ddp_kwargs
        )


def child_processes(fabric: Fabric) -> list[Popen[bytes]]:
    """Return the processes of this node that Fabric started from this one, ranks 1 and up.

    The list is Fabric's own: it monitors the processes in it.
    """
    children: list[Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    return children


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"
