"""What trainings on slices share: their config, processes, batches, epochs, early stop, exact resume."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from covidnb.training.run import ConfigError, Run, check_finite, check_positive, parse_config


@dataclass(frozen=True)
class SliceConfig:
    """What every training on slices depends on."""

    data: str = "phantom"
    """"phantom", "covid-semiseg", or a folder in the COVID-SemiSeg layout."""
    fold: int | None = None
    """The training fold held out for evaluation; None trains on all and evaluates on the test part."""
    size: int = 352
    """Side of the square that slices are resized to, in pixels; a multiple of 32."""
    batch: int = 24
    """Slices a step."""
    epochs: int = 100
    """Passes over the training slices."""
    lr: float = 1e-4
    """The optimiser's learning rate."""
    drop_epoch: int = 50
    """From this epoch on the learning rate is a tenth."""
    augment: bool = False
    """Flips, quarter turns, small affine and grey-value changes; the paper has none."""
    validate_every: int = 0
    """Score the held-out fold every so many epochs; 0 only at the end."""
    patience: int = 0
    """Stop after so many validations without a better one, and keep the best weights; 0: never."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the forward pass."""
    compile: bool = False
    """torch.compile the network: minutes at the start, faster steps on a GPU."""
    devices: int = 1
    """Processes that share each batch, a GPU each where there are any; started by torchrun."""
    seed: int = 0
    """Of all that is random: the weights' start, the order of the slices, the augmentation."""

    def __post_init__(self):
        check_positive(self, ("size", "batch", "epochs", "devices"))
        if self.validate_every and self.fold is None:
            raise ConfigError(
                "parameter 'validate_every' needs a 'fold' to score: the test part is for the end"
            )
        if self.patience and not self.validate_every:
            raise ConfigError("parameter 'patience' counts validations: set 'validate_every' and 'fold' too")
        if self.batch % self.devices:
            raise ConfigError(f"parameter 'batch' must be a multiple of 'devices', got {self.batch}")

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr * (0.1 if epoch >= self.drop_epoch else 1.0)


class Task(NamedTuple):
    """What one kind of training brings of its own; `train` does the rest."""

    slices: Dataset
    """To learn from; with `set_epoch`."""
    network: Callable[[bool], nn.Module]
    """(fresh) to the network: from the weights it starts with, or where a checkpoint fills it, without."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    steps: Callable
    """(fabric, net, optimizer, batches) to an iterator that takes the optimiser steps of an epoch and yields
    the loss of each: a NamedTuple of scalar tensors, "total" among them; a term that is None is left out."""
    validate: Callable[[nn.Module], tuple]
    """(net) to (scores, picture uint8 (H, W, 3)) on the held-out fold."""
    evaluate: Callable[[Run, nn.Module, list], None]
    """(run, net, log): write what a finished run has."""
    passes: int = 1
    """Optimiser steps with each batch."""


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


def mean_terms(losses: Iterable[NamedTuple], progress: tqdm) -> dict[str, Tensor]:
    """Mean of each term over the losses of an epoch's steps, each counted by `progress` as it comes."""
    totals, steps = {}, 0
    for loss in losses:
        for name, term in loss._asdict().items():
            if term is not None:
                totals[name] = totals.get(name, 0) + term.detach().float()
        steps += 1
        progress.update()
    return {name: total / steps for name, total in totals.items()}


def train(module: str, config: SliceConfig, out: str | Path, prepare: Callable[[Run], Task]) -> Run:
    """Train and evaluate in a run folder; a folder that has begun goes on from its checkpoint.

    Everything random is drawn from (seed, epoch, index), and checkpoints are taken between epochs, so a
    killed and resumed run ends at the weights of an uninterrupted one: bit for bit on a CPU. With more than
    one device, torchrun starts the processes; those it has started already share the work.

    Parameters
    ----------
    module : str
        Whose command line torchrun is to start, see `command_line`.
    config : SliceConfig
    out : str or Path
        The run folder.
    prepare : callable
        (run) to its `Task`; called in the first process before the others, so it may write to the folder.

    Raises
    ------
    ConfigError
        Where the folder belongs to another config, its checkpoint cannot be used, or memory runs out.
    """
    if config.devices > 1 and not under_torchrun():
        launch(module, config, out)
        return Run(out, config)
    fabric = start_fabric(config)
    with fabric.rank_zero_first():
        run = Run(out, config)
        task = prepare(run)
    with memory_advice(config):
        net, history = fit(fabric, run, task)
        if fabric.is_global_zero and not (run.folder / "metrics.json").exists():
            task.evaluate(run, net, history)
    fabric.barrier()
    return run


def fit(fabric: Fabric, run: Run, task: Task) -> tuple[nn.Module, list[dict]]:
    """Train to the last epoch, or until no longer better, from the start or the last checkpoint.

    Returns
    -------
    Module
        With the trained weights; with the best ones where `patience` is set.
    list of dict
        The log: one row an epoch.
    """
    config, slices, world = run.config, task.slices, fabric.world_size
    saved = run.load_checkpoint()
    torch.manual_seed(config.seed)
    bare = task.network(saved is None).to(memory_format=torch.channels_last)
    if world > 1 and fabric.device.type == "cpu":
        join_batch_norms(bare)
    elif world > 1:
        bare = nn.SyncBatchNorm.convert_sync_batchnorm(bare)
    history, best = [], None
    if saved is not None:
        bare.load_state_dict(saved["net"])
        history, best = saved["history"], saved["best"]
    net, optimizer = fabric.setup(torch.compile(bare) if config.compile else bare, task.optimizer(bare))
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    batches = JointBatches(len(slices), config.batch, config.seed, fabric.global_rank, world)
    loader = DataLoader(slices, batch_sampler=batches)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    done, total = (n * len(batches) * task.passes for n in (len(history), config.epochs))
    leads = fabric.is_global_zero
    with tqdm(total=total, initial=done, unit="step", disable=not leads) as progress:
        while len(history) < config.epochs and not has_stalled(history, config.patience):
            started, epoch = time.perf_counter(), len(history)
            slices.set_epoch(epoch)
            batches.epoch = epoch
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(epoch)
            net.train()
            terms = mean_terms(task.steps(fabric, net, optimizer, loader), progress)
            terms = {name: float(fabric.all_reduce(value)) for name, value in terms.items()}
            check_finite(terms, f"epoch {epoch + 1}")
            row = {"epoch": epoch + 1, "lr": config.learning_rate(epoch)} | terms
            row["seconds"] = round(time.perf_counter() - started, 2)
            picture = None
            if config.validate_every and (epoch + 1) % config.validate_every == 0:
                scores, picture = task.validate(bare) if leads else ({}, None)
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
    return bare, history


def command_line(module: str, kind: type, run: Callable, argv: list[str] | None = None) -> None:
    """Run a training from the command line: `python -m MODULE CONFIG.json RUN_FOLDER`.

    Parameters
    ----------
    module : str
    kind : type
        Of the config; its fields are what the JSON file may hold.
    run : callable
        (config, folder); its docstring is the help.
    argv : list of str, optional
        Without it, the process's arguments.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=run.__doc__)
    parser.add_argument("config", help=f"JSON file with fields of {kind.__name__}")
    parser.add_argument("out", help="run folder")
    asked = parser.parse_args(argv)
    run(parse_config(kind, json.loads(Path(asked.config).read_text())), asked.out)
