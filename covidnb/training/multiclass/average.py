"""Trained networks on classes as one, and with another prior than their runs had: no training.

`python -m covidnb.training.multiclass.average RUN_FOLDER WEIGHTS... --data covid-semiseg --prior FOLDER`
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from covidnb.slices import read_image, training_split
from covidnb.slices.multiclass import read_prior, write_classes
from covidnb.training.ensemble import evaluate_asked, weights_parser
from covidnb.training.infnet import refuse_learnt
from covidnb.training.multiclass import load_network
from covidnb.training.multiclass.maps import grey_reference, predict_slice, score
from covidnb.training.run import ConfigError, Run, versions


@dataclass(frozen=True)
class AverageConfig:
    """Which networks on classes are averaged, with which prior, and on what they are scored."""

    weights: tuple[str, ...] = ()
    """weights.safetensors of finished runs on classes, all with a prior or all without; one is enough to see
    what another prior brings."""
    prior: str = "none"
    """A folder of maps of the evaluated slices, "label" for the doctor's, "none" for networks without. Maps
    are taken on trust: with a `fold`, they must be of networks that have not seen it."""
    lesions: Literal["network", "prior"] = "network"
    """As in MultiClassConfig, whatever the networks' runs had."""
    consolidation: float = 1.0
    """Multiply the probability of consolidation by this before the likeliest class wins: below 1 is in favour
    of ground glass. Chosen on folds, never on what is scored."""
    data: str = "phantom"
    """"phantom", "covid-semiseg", or a folder in the COVID-SemiSeg layout."""
    fold: int | None = None
    """The training fold that is scored, and that no network has learnt from; None: the test part."""

    def __post_init__(self):
        if not self.weights:
            raise ConfigError("parameter 'weights' needs at least one weights.safetensors of a finished run")
        if not self.consolidation > 0:
            raise ConfigError(f"parameter 'consolidation' must be positive, got {self.consolidation}")


def weighed(maps: np.ndarray, consolidation: float) -> np.ndarray:
    """Class probabilities (3, H, W), that of consolidation times a factor; they then sum to one."""
    if consolidation == 1:
        return maps  # as they are: learnt each against the rest, they need not sum to one
    maps = maps * np.array([1, 1, consolidation], maps.dtype)[:, None, None]
    return maps / maps.sum(0)


def evaluate(config: AverageConfig, out: str | Path) -> Run:
    """Average the class probabilities of trained networks and score them on held-out slices.

    The run folder gets config.json, metrics.json with the scores of `score` and, where there is a prior,
    of `grey_reference`, and predictions/NAME.png, the likeliest classes.

    Raises
    ------
    ConfigError
        Where weights cannot be used, want another prior, or have learnt from the fold that is to be scored.
    SliceError
        Where a slice has no prior.
    """
    networks = []
    for path in config.weights:
        net, theirs = load_network(path)
        refuse_learnt("weights", path, theirs, config.data, config.fold)
        if theirs.takes_prior != (config.prior != "none"):
            wants = "takes an infection prior: give one" if theirs.takes_prior else "takes none"
            raise ConfigError(f"parameter 'prior' is {config.prior!r}, but the network of {path} {wants}")
        networks.append((net, replace(theirs, lesions=config.lesions)))
    if config.prior.endswith(".safetensors"):
        raise ConfigError(
            f"parameter 'prior': {config.prior} holds a network, not maps: make them with "
            "python -m covidnb.training.ensemble, and give its predictions/"
        )
    files, held_out = training_split(config.data, config.fold, "multiclass_train", "multiclass_test")
    priors = [None if config.prior == "none" else read_prior(f, config.prior) for f in held_out]
    run, maps = Run(out, config), []
    for f, prior in zip(tqdm(held_out, unit="slice"), priors, strict=True):
        each = [predict_slice(net, theirs, read_image(f.image), prior) for net, theirs in networks]
        maps.append(weighed(np.mean(each, axis=0), config.consolidation))
        write_classes(run.folder / "predictions" / f"{f.name}.png", maps[-1].argmax(0).astype(np.uint8))
    scores = score(maps, held_out)
    if config.prior != "none":
        scores["one grey value"] = grey_reference(files, held_out, config.prior)
    counts = {"evaluated": len(held_out)}
    run.write_json("metrics.json", {"scores": scores, "slices": counts, "seconds": 0, "versions": versions()})
    return run


def main(argv: list[str] | None = None) -> None:
    """Run from the command line; prints Dice of the likeliest class."""
    parser = weights_parser("covidnb.training.multiclass.average", evaluate)
    parser.add_argument("--prior", default=AverageConfig.prior, help="folder of maps, label, or none")
    parser.add_argument("--lesions", default=AverageConfig.lesions, choices=["network", "prior"])
    parser.add_argument("--consolidation", type=float, default=1.0, help="factor of its probability")
    scores = evaluate_asked(AverageConfig, evaluate, parser, argv)["scores"]
    dice = {
        kind: {
            "toolbox_of_argmax": round(scores[kind]["toolbox_of_argmax"]["meanDic"], 4),
            "dice_where_present": scores[kind]["dice_where_present"],
        }
        for kind in ("GGO", "consolidation")
    }
    print(json.dumps(dice, indent=2))


if __name__ == "__main__":
    main()
