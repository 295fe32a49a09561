"""Lightning Fabric from config."""

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from subprocess import Popen
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokengrow.distributed.launch import GUIDE, Launch, find_launch
from tokengrow.distributed.parallelize import CHECKPOINTING, shard
from tokengrow.errors import UserError

PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "fsdp2")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others. They wait while rank 0 grows a model; that one is dead, its
launcher finds out long before."""


@dataclass(frozen=True, kw_only=True)
class FabricConfig:
    """Which devices a run uses, how it is spread over them, and in which precision."""

    accelerator: str = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    strategy: str = "auto"
    """ddp: the whole model on each device; fsdp2: a part of it; auto: ddp."""
    devices: int | None = None
    """Devices of each node, a process for each; null: as many as the launcher started, without one
    all GPUs under ddp and fsdp2, else one device."""
    num_nodes: int | None = None
    """Nodes; null: as many as the launcher started processes on."""
    precision: str = "auto"
    """auto (bf16-mixed on a GPU, else 32), 32, bf16-mixed or bf16-true."""
    activation_checkpointing: str = "none"
    """What the backward pass computes anew: none, selective (all but products) or block (all)."""
    zero1: bool = False
    """Under ddp: each device keeps the optimizer state of some parameters (ZeRO stage 1)."""

    def __post_init__(self) -> None:
        for key, valid in (
            ("accelerator", ("auto", "cpu", "cuda")),
            ("strategy", STRATEGIES),
            ("precision", PRECISIONS),
            ("activation_checkpointing", CHECKPOINTING),
        ):
            if getattr(self, key) not in valid:
                raise UserError(
                    f"fabric.{key} {getattr(self, key)!r}: valid are {', '.join(valid)}"
                )
        for key in ("devices", "num_nodes"):
            if (number := getattr(self, key)) is not None and number < 1:
                raise UserError(f"fabric.{key} must be at least 1, not {number}")
        if self.zero1 and self.strategy == "fsdp2":
            raise UserError(
                "fabric.zero1 is for ddp: fsdp2 shares out the optimizer's state anyway; leave "
                "fabric.zero1 out, or set fabric=ddp"
            )

    def alone(self) -> "FabricConfig":
        """The same on one device: for what is measured there."""
        return replace(self, strategy="auto", devices=1, num_nodes=1, zero1=False)

    @property
    def on_gpu(self) -> bool:
        """Whether the run will be on a GPU."""
        return self.accelerator != "cpu" and torch.cuda.is_available()

    @property
    def chosen_precision(self) -> str:
        """The precision as Lightning writes it, with auto resolved."""
        if self.precision == "auto":
            return "bf16-mixed" if self.on_gpu else "32-true"
        return "32-true" if self.precision == "32" else self.precision


def build_fabric(config: FabricConfig) -> Fabric:
    """A launched Fabric; where nothing has started the other processes, it starts those of this
    node.

    Raises:
        UserError: a GPU that is not there, or other processes than a launcher has started.
    """
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("fabric.accelerator=cuda: no GPU is visible; set fabric=cpu")
    launch = find_launch()
    devices, num_nodes = _processes(config, launch)
    if config.on_gpu and devices > torch.cuda.device_count():
        raise UserError(
            f"{devices} processes on a node need as many GPUs, and {torch.cuda.device_count()} "
            "are visible: lower fabric.devices, or the number of processes that are started"
        )
    # Its notes on precision and tensor cores would break into the progress display at every stage.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # But who ends a job because one of its processes has died is to say so.
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)
    if launch and launch.by == "srun":
        # Slurm has it only where it was given, or that of the job around it; Lightning insists.
        os.environ["SLURM_NTASKS_PER_NODE"] = str(devices)
    fabric = Fabric(
        accelerator="cuda" if config.on_gpu else "cpu",
        strategy=_strategy(config, devices * num_nodes),
        devices=devices,
        num_nodes=num_nodes,
        precision=config.chosen_precision,  # type: ignore[arg-type]  # Lightning: a Literal
        # In a Slurm job, but not started by srun, it would wait for tasks that nobody starts; and
        # wherever there is an srun it would ask for it.
        plugins=None if launch else [LightningEnvironment()],
    )
    fabric.launch()
    return fabric


def _processes(config: FabricConfig, launch: Launch | None) -> tuple[int, int]:
    """Processes on each node, and nodes."""
    if launch:
        for key in ("devices", "num_nodes"):
            given, started = getattr(config, key), getattr(launch, key)
            if given not in (None, started):
                what = "processes on each node" if key == "devices" else "nodes"
                raise UserError(
                    f"fabric.{key}={given}, but {launch.by} started {started} {what}: leave "
                    f"fabric.{key} out, or start as many ({GUIDE})"
                )
        return launch.devices, launch.num_nodes
    if (config.num_nodes or 1) > 1:
        raise UserError(
            f"fabric.num_nodes={config.num_nodes}, and nothing has started this process on several "
            f"nodes: start it with torchrun or srun ({GUIDE})"
        )
    all_gpus = config.strategy != "auto" and config.on_gpu
    return config.devices or (torch.cuda.device_count() if all_gpus else 1), 1


def _strategy(config: FabricConfig, world_size: int) -> Strategy | str:
    """How the model is spread; over one device it is not."""
    if world_size == 1:
        return "auto"
    if config.strategy == "fsdp2":
        return ModelParallelStrategy(
            partial(shard, narrow=config.chosen_precision == "bf16-mixed"),
            data_parallel_size=world_size,  # by itself it would take the GPUs of a node for others
            tensor_parallel_size=1,
            timeout=TIMEOUT,
        )
    return _DDP(timeout=TIMEOUT, gradient_as_bucket_view=True)


class _DDP(DDPStrategy):
    """Lightning's, but for the stream: where gradients are accumulated on another one than that of
    the training step, each waits for the other."""

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(
            module, device_ids=self._determine_ddp_device_ids(), **self._ddp_kwargs
        )


def started_by(fabric: Fabric) -> list[Popen]:
    """The processes of this node that Fabric has started in this one, ranks 1 and up.

    Its own list: it watches over the processes that are in it.
    """
    return getattr(fabric.strategy.launcher, "procs", [])


def release(fabric: Fabric, module: Any) -> None:
    """Lets go of a LightningModule, so that its memory is free once nobody else holds it.

    Fabric keeps every one that it sets up among its callbacks, and has no door out for it.

    Args:
        fabric: that set it up.
        module: as `setup_module` gave it back.
    """
    kept = fabric._callbacks
    kept[:] = [callback for callback in kept if callback is not module._original_module]


def device_name(device: torch.device) -> str:
    """The GPU by its name, or the CPU with its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"
