"""What the training loops share: processes, batches, epochs, validation, early stop, exact resume."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from covidnb.training.run import ConfigError, Run


def under_torchrun() -> bool:
    """Whether torchrun started this process, so that others work on the same run."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(module: str, config, out: str | Path) -> None:
    """Run `python -m MODULE CONFIG.json OUT` in `config.devices` processes of this machine, by torchrun.

    Raises
    ------
    ConfigError
        Where a process fails; what it said is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.json"
        settings.write_text(json.dumps(asdict(config)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(config.devices), "-m", module, str(settings), str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        for line in process.stderr:  # a notebook shows what its own stderr is told, not its children's
            print(line, end="", file=sys.stderr)
        if process.wait():
            raise ConfigError(
                f"training in {config.devices} processes failed (exit {process.returncode}): see above; "
                "-p devices 1 shows the fault without torchrun"
            )


def start_fabric(config) -> Fabric:
    """Take the accelerator there is, one device or, under torchrun, one for each of its processes."""
    if not under_torchrun():
        return Fabric(accelerator="auto", devices=1, precision=config.precision)
    here, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    fabric = Fabric(
        accelerator="auto",
        devices=here,
        num_nodes=all_of_them // here,
        strategy="ddp",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


class JointBatches(Sampler[list[int]]):
    """Batches of a shuffle that depends on (seed, epoch) alone; each process gets its share of every batch.

    So N processes take the same optimiser steps as one that sees the whole batches. Where a batch cannot be
    shared equally its first slices are seen twice.

    Parameters
    ----------
    length, batch : int
        Slices in all, and in a joint batch.
    seed : int
        Of the order.
    rank, world : int
        Which process this is, of how many.
    """

    def __init__(self, length: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world = rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.length // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for first in range(0, self.length, self.batch):
            joint = order[first : first + self.batch]
            joint += (joint * self.world)[: -len(joint) % self.world]
            yield joint[self.rank :: self.world]


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverProcesses.apply(grad)


class JointBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the joint batch of all processes, on the CPU (torch's own demands a GPU).

    The reduction is differentiable: each process's gradient knows what its pixels did to the others' mean
    and variance, as it would in one batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float() if x.dtype == torch.bfloat16 else x  # statistics lose their digits in bf16
        count = values.numel() / values.shape[1] * torch.distributed.get_world_size()
        mean = SumOverProcesses.apply(values.sum((0, 2, 3))) / count
        centred = values - mean.view(1, -1, 1, 1)
        variance = SumOverProcesses.apply((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def join_batch_norms(net: nn.Module) -> None:
    """Let every batch norm of `net` speak to the other processes; its parameters stay the same objects."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = JointBatchNorm2d


@contextmanager
def memory_advice(config):
    """Turn a device's or the machine's lack of memory into a ConfigError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        said = str(fault)
        if not isinstance(fault, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in said:
            raise
        raise ConfigError(
            f"out of memory with 'batch' {config.batch} at 'size' {config.size}: try batch "
            f"{max(1, config.batch // 2)}, precision 'bf16-mixed', or a smaller size"
        ) from fault


def best_validation(history: list[dict]) -> int | None:
    """Row of the log with the highest mean Dice on the held-out fold; None before the first validation."""
    validated = [k for k, row in enumerate(history) if "meanDic" in row]
    return max(validated, key=lambda k: history[k]["meanDic"], default=None)


def has_stalled(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` validations all fell short of the best; never for a patience of 0."""
    best = best_validation(history)
    since = [row for row in history[best + 1 :] if "meanDic" in row] if best is not None else []
    return 0 < patience <= len(since)


def fit(
    fabric: Fabric,
    run: Run,
    saved: dict | None,
    bare: nn.Module,
    optimizer: torch.optim.Optimizer,
    slices: Dataset,
    train_epoch: Callable,
    passes: int = 1,
    validate: Callable | None = None,
) -> list[dict]:
    """Train `bare` to the last epoch, or until it no longer improves, from the start or a checkpoint.

    Parameters
    ----------
    fabric : Fabric
    run : Run
        Its config has epochs, batch, seed, patience, validate_every, compile and learning_rate(epoch).
    saved : dict or None
        `run.load_checkpoint()`.
    bare : Module
        The network; holds the trained weights afterwards, the best ones where `patience` is set.
    optimizer : Optimizer
        Over the parameters of `bare`.
    slices : Dataset
        With `set_epoch`.
    train_epoch : callable
        (net, optimizer, loader, progress) to the mean of each loss term over its steps (scalar tensors);
        it counts the steps by `progress.update()`.
    passes : int
        Optimiser steps it takes with each batch.
    validate : callable, optional
        (bare) to (scores, picture uint8 (H, W, 3)) on the held-out fold.

    Returns
    -------
    list of dict
        The log: one row an epoch.
    """
    config, world = run.config, fabric.world_size
    if world > 1 and fabric.device.type == "cpu":
        join_batch_norms(bare)
    elif world > 1:
        bare = nn.SyncBatchNorm.convert_sync_batchnorm(bare)
    history, best = [], None
    if saved is not None:
        bare.load_state_dict(saved["net"])
        history, best = saved["history"], saved["best"]
    net, optimizer = fabric.setup(torch.compile(bare) if config.compile else bare, optimizer)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    batches = JointBatches(len(slices), config.batch, config.seed, fabric.global_rank, world)
    loader = DataLoader(slices, batch_sampler=batches)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    done, total = (n * len(batches) * passes for n in (len(history), config.epochs))
    leads = fabric.is_global_zero
    with tqdm(total=total, initial=done, unit="step", disable=not leads) as progress:
        while len(history) < config.epochs and not has_stalled(history, config.patience):
            started, epoch = time.perf_counter(), len(history)
            slices.set_epoch(epoch)
            batches.epoch = epoch
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(epoch)
            terms = train_epoch(net, optimizer, loader, progress)
            terms = {name: float(fabric.all_reduce(value)) for name, value in terms.items()}
            row = {"epoch": epoch + 1, "lr": config.learning_rate(epoch)} | terms
            row["seconds"] = round(time.perf_counter() - started, 2)
            picture = None
            if config.validate_every and (epoch + 1) % config.validate_every == 0:
                scores, picture = validate(bare) if leads else ({}, None)
                row |= fabric.broadcast(scores)
            history.append(row)
            if picture is not None and best_validation(history) == epoch and config.patience:
                best = {name: value.cpu().clone() for name, value in bare.state_dict().items()}
            if leads:
                run.write_log(history, picture)
                state = {"net": bare.state_dict(), "optimizer": optimizer.state_dict()}
                run.save_checkpoint(state | {"history": history, "best": best})
            progress.set_postfix(epoch=epoch + 1, loss=f"{row['total']:.3f}")
    if config.patience:
        best = fabric.broadcast(best)
    if best is not None:
        bare.load_state_dict(best)
    return history
