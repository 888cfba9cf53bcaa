"""Pseudo-labels by random sampling propagation (Fan et al., IEEE TMI 2020, Sec. III-D).

A trained Inf-Net labels a few unlabelled slices, learns from them and from all labelled before, and labels
the next few. Semi-Inf-Net then trains on the finished labels, and after that on the doctor's: that is
`covidnb.training.infnet` with `part` and `start`.

`python -m covidnb.training.semi_infnet CONFIG.json RUN_FOLDER` starts a propagation, or goes on with it.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from covidnb.slices import InfectionSlices, SliceFiles, list_slices, read_mask, semiseg_root
from covidnb.training.infnet import (
    EDGES,
    InfNetConfig,
    configure,
    evaluate,
    load_network,
    predict_slices,
    split_slices,
    steps,
    train,
    write_map,
)
from covidnb.training.loop import JointBatches, command_line, mean_terms, memory_advice, start_fabric
from covidnb.training.run import ConfigError, Run, check_finite, check_positive, parse_config, recipe_of

RECENT = 20  # slices over which the share of lesion in new labels is judged


class Drift(RuntimeError):
    """The labels of a propagation have emptied or flooded; the message says when, and what to do."""


@dataclass(frozen=True)
class PropagationConfig:
    """What a propagation depends on. The defaults are the paper's and the released code's."""

    start: str = ""
    """weights.safetensors of a trained Inf-Net: labels the first slices, is fine-tuned from there."""
    data: str = "phantom"
    """"phantom", "covid-semiseg", or a folder in the COVID-SemiSeg layout."""
    fold: int | None = None
    """The fold of the doctor's slices that is not learnt from."""
    pool: int | None = None
    """How many unlabelled slices to label; None: all."""
    per_round: int = 5
    """Slices labelled in a round."""
    order: Literal["random", "confident"] = "random"
    """Which slices come next: any, or those that the network is surest of, which confirms its errors."""
    strategy: Literal["paper", "incremental"] = "paper"
    """Each round learns from all labelled slices, or from the new ones and `replay` of the old."""
    replay: int = 45
    """Labelled slices, doctor's or pseudo, drawn anew each round to learn from beside the new ones."""
    cut: float | None = None
    """Label lesion what is above this probability, the rest not; None: labels are probabilities, as in the
    data set's own. Rounds tend to raise what is called lesion; a cut above 0.5 counters that."""
    epochs: int = 9
    """Passes over a round's slices (the released loop says ten and makes nine)."""
    size: int = 352
    """Side of the square that slices are resized to, in pixels; a multiple of 32."""
    batch: int = 16
    """Slices a step."""
    lr: float = 3e-4
    """Adam's learning rate; the optimiser starts afresh each round."""
    augment: bool = False
    """As in InfNetConfig."""
    share_limits: tuple[float, ...] = (0.05, 4.0)
    """Stop where recent labels hold less or more lesion than this many times the doctor's."""
    watched: int = 4
    """Unlabelled slices whose map is kept after each round."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the forward pass."""
    seed: int = 0
    """Of the order of the slices, the batches and the augmentation."""

    def __post_init__(self):
        check_positive(self, ("per_round", "epochs", "size", "batch"))
        if not self.start:
            raise ConfigError("parameter 'start' must name the weights.safetensors of a trained Inf-Net")
        if self.cut is not None and not 0 < self.cut < 1:
            raise ConfigError(f"parameter 'cut' must lie between 0 and 1, or be null, got {self.cut}")
        if len(self.share_limits) != 2 or not 0 <= self.share_limits[0] < self.share_limits[1]:
            raise ConfigError(f"parameter 'share_limits' needs two rising numbers, got {self.share_limits}")

    def round_config(self, started: InfNetConfig) -> InfNetConfig:
        """Config of the training steps of a round, for the network that the propagation started from."""
        own = ("data", "fold", "size", "batch", "lr", "augment", "precision", "seed")
        return replace(
            started, part="doctor", start="", scales=(1.0,), **{name: getattr(self, name) for name in own}
        )


STAGES = {
    "paper": {"propagation": {}, "pseudo": {}, "doctor": {}},
    "lite": {
        "propagation": {"strategy": "incremental", "per_round": 40, "replay": 60, "epochs": 1, "size": 256}
        # the doctor's 50 real slices were chosen for their lesions: a pool of whole scans holds less; labels
        # cut at 0.5 or not at all flooded it
        | {"lr": 1e-4, "augment": True, "cut": 0.7, "share_limits": [0.05, 1.0]},
        "pseudo": {"scales": [1.0], "epochs": 4, "drop_epoch": 3},
        "doctor": {"epochs": 30, "drop_epoch": 24},
    },
    "laptop": {
        "propagation": {"strategy": "incremental", "per_round": 15, "replay": 30, "epochs": 2, "size": 160}
        | {"batch": 8, "lr": 3e-4, "augment": True},
        "pseudo": {"epochs": 8, "drop_epoch": 7},
        "doctor": {"epochs": 8, "lr": 1e-3, "drop_epoch": 6},
    },
    "glance": {
        "propagation": {"strategy": "incremental", "per_round": 15, "replay": 30, "epochs": 2, "size": 96}
        | {"batch": 8, "lr": 3e-4, "augment": True},
        "pseudo": {"epochs": 12, "drop_epoch": 10},
        "doctor": {"epochs": 8, "lr": 1e-3, "drop_epoch": 6},
    },
}
"""What the stages of Semi-Inf-Net set beside the Inf-Net recipe of the same name."""
AUTO = {"phantom": "glance"}
"""What recipe "auto" is, by data; "lite" elsewhere."""


def plan(values: dict, out: str | Path) -> dict[str, InfNetConfig | PropagationConfig]:
    """Make the configs of Semi-Inf-Net's runs, in their order; `execute` runs them in folders of `out`.

    Parameters
    ----------
    values : dict
        "recipe" as in `infnet.configure`, but see `AUTO`; "start": weights of an Inf-Net that is there,
        or empty to train one first ("infnet"); "labels": "own", "authors" for the data set's pseudo-labels,
        or a folder of them (`covidnb.training.ensemble` with `--pool` writes one), which need no propagation;
        "infnet", "propagation", "pseudo", "doctor": fields of one stage alone; the rest are fields of all of
        them, such as data, fold, seed and precision.
    out : str or Path

    Raises
    ------
    ConfigError
        For what no stage knows.
    """
    values = {"start": "", "labels": "own"} | values | {"recipe": recipe_of(values, AUTO)}
    names = ("infnet", "propagation", "pseudo", "doctor")
    own = {name: dict(values.pop(name, {})) for name in names}
    recipe, start, labels = (values.pop(name) for name in ("recipe", "start", "labels"))
    if labels not in ("own", "authors") and not Path(labels).is_dir():
        raise ConfigError(f"parameter 'labels' must be 'own', 'authors' or a folder of maps, got {labels!r}")
    weights = {name: str(Path(out) / name / "weights.safetensors") for name in names}
    own["propagation"] |= {"start": start or weights["infnet"]}
    own["pseudo"] |= {"part": "pseudo"}
    if labels != "authors":
        propagated = Path(out) / "propagation" / "labels"
        own["pseudo"] |= {"labels": str(propagated if labels == "own" else labels)}
    own["doctor"] |= {"start": weights["pseudo"]}
    configs = {}
    for name in names:
        if name == "infnet" and start or name == "propagation" and labels != "own":
            continue
        fields = values | STAGES.get(recipe, {}).get(name, {}) | own[name]
        if name == "propagation":
            configs[name] = parse_config(PropagationConfig, fields)
        else:
            configs[name] = configure(fields | {"recipe": recipe})
    return configs


def execute(configs: dict[str, InfNetConfig | PropagationConfig], out: str | Path) -> dict[str, Run]:
    """Run the stages of `plan`, each in its folder of `out`; those that are finished are only opened."""
    run = {PropagationConfig: propagate, InfNetConfig: train}
    return {name: run[type(config)](config, Path(out) / name) for name, config in configs.items()}


def next_slices(config: PropagationConfig, net: nn.Module, waiting: list[SliceFiles], size: int) -> list[int]:
    """Which of the waiting slices are labelled next: their positions in `waiting`."""
    if config.order == "random":  # the pool was shuffled once
        return list(range(min(config.per_round, len(waiting))))
    maps = predict_slices(net, waiting, size)
    doubt = [float(np.mean(np.minimum(p, 1 - p))) for p in maps]
    return sorted(np.argsort(doubt, kind="stable")[: config.per_round].tolist())


def write_label(path: Path, probability: np.ndarray, cut: float | None) -> float:
    """Write one pseudo-label, cut or not, as an 8-bit PNG; return its share of lesion pixels."""
    label = write_map(path, probability if cut is None else probability > cut)
    return float((label > 127).mean())


def lesion_share(files: list[SliceFiles]) -> float:
    """Mean share of lesion pixels of labelled slices."""
    return float(np.mean([(read_mask(f.mask) > 127).mean() for f in files]))


def check_drift(history: list[dict], doctor_share: float, limits: tuple[float, ...]) -> None:
    """Stop a propagation whose recent labels hold far less or more lesion than the doctor's.

    Raises
    ------
    Drift
        Once at least `RECENT` slices have been labelled.
    """
    shares = [share for row in history for share in row["shares"]]
    if len(shares) < RECENT:
        return
    recent = float(np.mean(shares[-RECENT:]))
    low, high = (limit * doctor_share for limit in limits)
    if not low <= recent <= high:
        what, cut = ("emptied", "lower") if recent < low else ("flooded", "higher")
        raise Drift(
            f"round {history[-1]['round']}: the labels have {what}. The last {RECENT} hold {recent:.1%} "
            f"lesion on average, the doctor's {doctor_share:.1%}; allowed is {low:.1%} to {high:.1%}. Start "
            f"anew from a better network, with a lower 'lr' or a {cut} 'cut'; let trained networks label the "
            "pool at once (covidnb.training.ensemble --pool); or widen 'share_limits' for a pool like that"
        )


def to_learn_from(config: PropagationConfig, number: int, old: list[int], new: list[int]) -> list[int]:
    """Slices that round `number` learns from, by position: all, or the new ones and a sample of the old."""
    if config.strategy == "paper":
        return old + new
    rng = np.random.default_rng((config.seed, number))
    return sorted(rng.choice(old, min(config.replay, len(old)), replace=False).tolist()) + new


def propagate(config: PropagationConfig, out: str | Path) -> Run:
    """Label the pool, round by round; a folder that has begun goes on from the round it had finished.

    A round depends on the weights that the one before left, on the labels on disk and (seed, round) alone:
    a killed and resumed propagation ends at the same labels and weights, bit for bit on a CPU.

    Parameters
    ----------
    config : PropagationConfig
    out : str or Path
        The run folder: labels/NAME.png for each slice of the pool, watch/NAME/round_NNNN.png, log.csv with a
        row a round, and what any run has: weights.safetensors of the last round, its scores and predictions.

    Raises
    ------
    Drift
        Where the labels empty or flood.
    ConfigError
        Where the start or the folder cannot be used, or memory runs out.
    """
    net, started = load_network(config.start)
    run = Run(out, config)
    fabric = start_fabric(config)
    with memory_advice(config):
        _Propagation(fabric, run, net, config.round_config(started)).run_all()
    return run


class _Propagation:
    """The rounds of one propagation: doctor's slices first, then the pool in the order of its labels."""

    def __init__(self, fabric: Fabric, run: Run, net: nn.Module, learning: InfNetConfig):
        self.fabric, self.run, self.config, self.learning = fabric, run, run.config, learning
        self.net = fabric.to_device(net.to(memory_format=torch.channels_last))
        self.doctor, self.held_out = split_slices(learning)
        self.doctor_share = lesion_share(self.doctor)
        pool = list_slices(semiseg_root(self.config.data), "pseudo")
        order = np.random.default_rng(self.config.seed).permutation(len(pool))[: self.config.pool]
        folder = run.folder / "labels"
        self.pool = [pool[k]._replace(mask=folder / f"{pool[k].name}.png", edge=None) for k in order]
        # decoded and drawn once, when a round first learns from them; by then their labels are there
        self.slices = InfectionSlices(
            self.doctor + self.pool, learning.size, learning.augment, learning.seed, edges=EDGES["pseudo"]
        )
        self.history: list[dict] = []

    def run_all(self) -> None:
        config, saved = self.config, self.run.load_checkpoint()
        if saved is not None:
            self.net.load_state_dict(saved["net"])
            self.history = saved["history"]
        check_drift(self.history, self.doctor_share, config.share_limits)
        rounds = -(-len(self.pool) // config.per_round)
        with tqdm(total=rounds, initial=len(self.history), unit="round") as progress:
            while len(self.history) < rounds:
                row = self.one_round(len(self.history))
                self.history.append(row)
                self.run.write_log([{k: v for k, v in r.items() if k != "shares"} for r in self.history])
                self.run.save_checkpoint({"net": self.net.state_dict(), "history": self.history})
                check_drift(self.history, self.doctor_share, config.share_limits)
                progress.set_postfix(share=f"{row['share']:.1%}", loss=f"{row['total']:.3f}")
                progress.update()
        if not (self.run.folder / "metrics.json").exists():
            labelled = len(self.doctor) + len(self.pool)
            evaluate(self.run, self.learning, self.net, self.history, labelled, self.held_out)

    def one_round(self, number: int) -> dict:
        """Label the next slices, learn from them; return the round's row of the log."""
        started, config = time.perf_counter(), self.config
        done = {name for row in self.history for name in row["names"].split()}
        position = {f.name: k for k, f in enumerate(self.slices.files)}
        waiting = [f for f in self.pool if f.name not in done]
        chosen = [waiting[k] for k in next_slices(config, self.net, waiting, self.learning.size)]
        maps = predict_slices(self.net, chosen, self.learning.size)
        shares = [write_label(f.mask, p, config.cut) for f, p in zip(chosen, maps, strict=True)]
        old = list(range(len(self.doctor))) + sorted(position[name] for name in done)
        learnt = to_learn_from(config, number, old, [position[f.name] for f in chosen])
        terms = self.fine_tune(number, learnt)
        self.watch(number)
        return {
            "epoch": number + 1,
            "round": number + 1,
            "labelled": len(done) + len(chosen),
            "learnt_from": len(learnt),
            "share": float(np.mean(shares)),
            "doubt": float(np.mean([np.minimum(p, 1 - p).mean() for p in maps])),
            **terms,
            "seconds": round(time.perf_counter() - started, 2),
            "names": " ".join(f.name for f in chosen),
            "shares": shares,
        }

    def fine_tune(self, number: int, learnt: list[int]) -> dict[str, float]:
        """Train on slices by position, with a fresh optimiser; return the loss terms of the last epoch."""
        optimizer = torch.optim.Adam(self.net.parameters(), lr=self.config.lr)
        net, optimizer = self.fabric.setup(self.net, optimizer)
        batches = JointBatches(len(learnt), self.config.batch, self.config.seed)
        loader = self.fabric.setup_dataloaders(DataLoader(Subset(self.slices, learnt), batch_sampler=batches))
        with tqdm(total=self.config.epochs * len(batches), unit="step", leave=False) as progress:
            for epoch in range(number * self.config.epochs, (number + 1) * self.config.epochs):
                batches.epoch = epoch
                self.slices.set_epoch(epoch)
                net.train()
                terms = mean_terms(steps(self.learning, self.fabric, net, optimizer, loader), progress)
        terms = {name: float(term) for name, term in terms.items()}
        check_finite(terms, f"round {number + 1}")
        return terms

    def watch(self, number: int) -> None:
        """Keep what the network now makes of the slices that it labels last."""
        watched = self.pool[len(self.pool) - min(self.config.watched, len(self.pool)) :]
        if watched:
            for f, p in zip(watched, predict_slices(self.net, watched, self.learning.size), strict=True):
                write_label(self.run.folder / "watch" / f.name / f"round_{number + 1:04d}.png", p, cut=None)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    command_line("covidnb.training.semi_infnet", PropagationConfig, propagate, argv)


if __name__ == "__main__":
    main()
