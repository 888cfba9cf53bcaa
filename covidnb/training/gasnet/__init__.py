"""Training GASNet (Xu et al. 2020): one volume with its lesions drawn, others known as sick or healthy.

The segmenter S and the generator G play against the discriminator D, while S also learns from what is known
of each volume. With some weights at 0 the same loop trains the segmenter alone, any of `volume_segmenter`.

`python -m covidnb.training.gasnet CONFIG.json RUN_FOLDER` starts a run, or goes on with it.
"""

import time
from pathlib import Path

from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from covidnb.nets.gasnet import volume_segmenter
from covidnb.training.gasnet.config import (
    ABLATION,
    KINDS,
    RECIPES,
    TERMS,
    GasnetConfig,
    ablation,
    configure,
    root_of,
)
from covidnb.training.gasnet.game import (
    Game,
    Players,
    StepVolumes,
    Terms,
    build,
    discriminator_terms,
    find,
    game_terms,
    lesion_share,
    own_terms,
    picture,
    pools_of,
    warnings_of,
    weighed,
)
from covidnb.training.gasnet.verdicts import verdicts
from covidnb.training.loop import command_line, memory_advice, start_fabric
from covidnb.training.run import ConfigError, Run, check_finite, parse_config, read_weights
from covidnb.training.volume_evaluation import evaluate_volumes, mean_dice

__all__ = [
    "ABLATION",
    "KINDS",
    "RECIPES",
    "TERMS",
    "Game",
    "GasnetConfig",
    "Players",
    "StepVolumes",
    "Terms",
    "ablation",
    "build",
    "configure",
    "discriminator_terms",
    "evaluate",
    "find",
    "fit",
    "game_terms",
    "lesion_share",
    "load_network",
    "main",
    "own_terms",
    "picture",
    "pools_of",
    "root_of",
    "train",
    "verdicts",
    "warnings_of",
    "weighed",
]

INPUT = "chest CT cropped to the lungs, -1250 to 250 HU scaled to -1 to 1."
OUTPUT = "probability of lesion for each voxel; 0.5 is the cut, within the lungs."


def train(config: GasnetConfig, out: str | Path) -> Run:
    """Train and evaluate in a run folder; a folder that has begun goes on from its checkpoint.

    Everything random is drawn from (seed, step), and a checkpoint holds all networks and optimisers, so a
    killed and resumed run ends at the weights of an uninterrupted one: bit for bit on a CPU.

    Parameters
    ----------
    config : GasnetConfig
    out : str or Path
        The run folder: config.json, log.csv, checkpoint/, weights.safetensors (S, the running mean of its
        weights), metrics.json, predictions/ (NIfTI), validation/ (pictures), tensorboard/, model_card.md.

    Raises
    ------
    ConfigError
        Where the folder belongs to another config, its checkpoint cannot be used, or memory runs out.
    VolumeError
        Where the volumes cannot be used.
    """
    fabric = start_fabric(config)
    pools = pools_of(config, augment=True)
    run = Run(out, config)
    with memory_advice(config):
        segmenter, history = fit(fabric, run, pools)
        if not (run.folder / "metrics.json").exists():
            evaluate(run, segmenter, history, sum(len(pool) for pool in pools.values()))
    return run


def fit(fabric: Fabric, run: Run, pools: dict[str, Dataset]) -> tuple[nn.Module, list[dict]]:
    """Train to the last step, from the start or the last checkpoint; return S and the log."""
    config, saved = run.config, run.load_checkpoint()
    volumes, looked_at = StepVolumes(config, pools), pools_of(config, augment=False)
    shape = tuple(pools["labelled"][0]["image"].shape[1:])
    game = Game(fabric, config, shape, saved)
    history = saved["history"] if saved else []
    done = history[-1]["step"] if history else 0
    loader = DataLoader(
        volumes, batch_size=None, sampler=range(done, config.steps), num_workers=config.workers
    )
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    sums, started, told = {}, time.perf_counter(), []
    with tqdm(total=config.steps, initial=done, unit="step") as progress:
        for step, batches in enumerate(loader, done):
            for name, value in game.step(step, batches).items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + value.detach().float(), count + 1
            progress.update()
            if (step + 1) % config.log_every and step + 1 < config.steps:
                continue
            terms = {name: float(total / count) for name, (total, count) in sums.items()}
            check_finite(terms, f"step {step + 1}")
            row = {"step": step + 1} | terms
            row["seconds"] = round(time.perf_counter() - started, 2)
            if config.validate_every and (step + 1) % config.validate_every == 0:
                row["Dice"] = mean_dice(game.segmenter, root_of(config))
            warnings = warnings_of(row) if step >= config.steps // 10 else []  # all are strangers at first
            row["warning"] = "; ".join(warnings)
            for warning in warnings:
                if warning.split(":")[0] not in told:
                    progress.write(f"step {step + 1}: {warning}")
            told = [warning.split(":")[0] for warning in warnings]
            history.append(row)
            run.write_log(history, picture(game.nets, looked_at, fabric.device), "step")
            run.save_checkpoint(game.state() | {"history": history})
            sums, started = {}, time.perf_counter()
    return game.segmenter, history


def evaluate(run: Run, segmenter: nn.Module, history: list[dict], trained: int) -> None:
    """Segment the validation volumes and write what a finished run has."""
    scores = evaluate_volumes(segmenter, root_of(run.config), run.folder / "predictions")
    counts = {"trained": trained, "evaluated": scores["crop"]["volumes"]}
    on_card = {
        f"{name}, mean, on the {grid}'s grid": mean
        for grid in ("crop", "scan")
        for name, mean in scores[grid]["mean"].items()
    }
    run.finish(segmenter, history, counts, scores, on_card, OUTPUT, unit="volumes", input=INPUT)


def load_network(weights: str | Path) -> tuple[nn.Module, GasnetConfig]:
    """Build the segmenter that a run's weights.safetensors is for, and fill it; ready to segment.

    Raises
    ------
    ConfigError
        Where the file is missing, damaged, or another method's.
    """
    header, tensors = read_weights(weights)
    if "multiple_instance" not in header["config"]:
        raise ConfigError(f"{weights} holds a {header['network']}, no segmenter of volumes")
    config = parse_config(GasnetConfig, header["config"])
    net = volume_segmenter(config.network, config.width)
    net.load_state_dict(tensors)
    return net.eval(), config


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    command_line("covidnb.training.gasnet", GasnetConfig, train, argv)
