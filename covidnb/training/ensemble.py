"""Several trained networks as one: their maps averaged, over a slice's mirror images too if asked for.

`python -m covidnb.training.ensemble RUN_FOLDER WEIGHTS... --data covid-semiseg --flips` scores them; with
`--pool` they label the unlabelled slices, for a Semi-Inf-Net to learn from.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from covidnb.metrics import null_nan
from covidnb.slices import SliceError, list_slices, read_image, semiseg_root, training_split
from covidnb.training.infnet import load_network, predict_greys, refuse_learnt, score, write_map
from covidnb.training.positions import mean_of_positions, positions
from covidnb.training.run import ConfigError, Run, versions


@dataclass(frozen=True)
class EnsembleConfig:
    """Which networks are averaged, and on what they are scored."""

    weights: tuple[str, ...] = ()
    """weights.safetensors of finished runs on infection slices; one is enough to see what flips bring."""
    flips: bool = False
    """Average each network's maps of the slice in eight positions: mirrored or not, four quarter turns."""
    sharpen: float = 1.0
    """Multiply the averaged map's logits by this. Moves no pixel across 0.5; lifts means over thresholds."""
    data: str = "phantom"
    """"phantom", "covid-semiseg", or a folder in the COVID-SemiSeg layout."""
    fold: int | None = None
    """The training fold that is scored, and that no network has learnt from; None: the test part."""
    pool: bool = False
    """Label the unlabelled slices, in place of a score; `fold` is then one that no teacher may know."""

    def __post_init__(self):
        if not self.weights:
            raise ConfigError("parameter 'weights' needs at least one weights.safetensors of a finished run")
        if not self.sharpen > 0:
            raise ConfigError(f"parameter 'sharpen' must be positive, got {self.sharpen}")


def sharpened(probability: np.ndarray, factor: float) -> np.ndarray:
    """Map whose logits are `factor` times those of a map in [0, 1]."""
    yes, no = probability**factor, (1 - probability) ** factor
    return yes / (yes + no)


def average_maps(net: nn.Module, greys: list[np.ndarray], size: int, flips: bool) -> list[np.ndarray]:
    """Lesion probability of slices, see `predict_greys`; with `flips` the mean over their eight positions."""
    if not flips:
        return predict_greys(net, greys, size)
    return [mean_of_positions(predict_greys(net, positions(grey), size)) for grey in greys]


def evaluate(config: EnsembleConfig, out: str | Path) -> Run:
    """Average the maps of trained networks: score them on held-out slices, or label the unlabelled ones.

    The run folder gets config.json, metrics.json and NAME.png of each slice: in predictions/, or, of the
    unlabelled slices, in labels/, which `-p labels` of the run semi_infnet takes.

    Raises
    ------
    ConfigError
        Where weights cannot be used, or a network has learnt from the fold that is to be scored.
    """
    networks = [load_network(path) for path in config.weights]
    for path, (_, theirs) in zip(config.weights, networks, strict=True):
        refuse_learnt("weights", path, theirs, config.data, config.fold)
    run = Run(out, config)
    folder = run.folder / ("labels" if config.pool else "predictions")
    if config.pool:
        files = list_slices(semiseg_root(config.data), "pseudo")
    else:
        _, files = training_split(config.data, config.fold)
    maps = []
    for f in tqdm(files, unit="slice"):
        each = [average_maps(net, [read_image(f.image)], c.size, config.flips)[0] for net, c in networks]
        one = sharpened(np.mean(each, axis=0), config.sharpen)
        write_map(folder / f"{f.name}.png", one)
        if not config.pool:
            maps.append(one)
    result = {"slices": {"labelled": len(files)}}
    if not config.pool:
        result = {"scores": null_nan(score(maps, files)), "slices": {"evaluated": len(files)}}
    run.write_json("metrics.json", result | {"seconds": 0, "versions": versions()})
    return run


def weights_parser(module: str, evaluate: Callable) -> argparse.ArgumentParser:
    """Parser of a command that averages trained networks: where to, which, on what."""
    does = evaluate.__doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=does)
    parser.add_argument("out", help="run folder")
    parser.add_argument("weights", nargs="+", help="weights.safetensors of finished runs")
    parser.add_argument("--data", default="phantom", help="phantom, covid-semiseg or a folder")
    parser.add_argument("--fold", type=int, help="training fold to score, instead of the test part")
    return parser


def evaluate_asked(kind: type, evaluate: Callable, parser: argparse.ArgumentParser, argv) -> dict:
    """Do what a `weights_parser` was asked for; return metrics.json. Bad input ends in one sentence."""
    asked = vars(parser.parse_args(argv))
    out, weights = asked.pop("out"), tuple(asked.pop("weights"))
    try:
        run = evaluate(kind(weights, **asked), out)
    except (ConfigError, SliceError, OSError) as fault:
        raise SystemExit(f"error: {fault}") from None
    return json.loads((run.folder / "metrics.json").read_text())


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = weights_parser("covidnb.training.ensemble", evaluate)
    parser.add_argument("--pool", action="store_true", help="label the unlabelled slices, score nothing")
    parser.add_argument("--flips", action="store_true", help="average over a slice's eight positions too")
    parser.add_argument("--sharpen", type=float, default=1.0, help="factor of the averaged map's logits")
    told = evaluate_asked(EnsembleConfig, evaluate, parser, argv)
    scores = told.get("scores", told["slices"])
    print(json.dumps({name: value for name, value in scores.items() if name != "per_slice"}, indent=2))


if __name__ == "__main__":
    main()
