"""Class maps: from a network's logits, scored, beside one grey value's, and as a picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from covidnb.metrics import dice_at, null_nan, slice_scores
from covidnb.nets.infnet import resize
from covidnb.slices import SliceFiles, read_classes, read_image
from covidnb.slices.multiclass import CLASSES, PALETTE, class_input, read_prior
from covidnb.training.multiclass.config import MultiClassConfig
from covidnb.training.positions import mean_of_positions, positions
from covidnb.training.threshold import ConsolidationCut


def probabilities(logits: Tensor, config: MultiClassConfig) -> Tensor:
    """Probability of background, GGO and consolidation, (N, 3, H, W), from a network's logits.

    With the "bce" loss each class was learnt against the rest, and the three need not sum to one.
    """
    if config.channel_order == "official":
        logits = logits.roll(1, dims=1)  # GGO, consolidation, background
    return torch.sigmoid(logits) if config.loss == "bce" else logits.softmax(1)


def named_within(maps: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """Class probabilities (3, H, W) where it is settled what is lesion, bool (H, W): what is left is naming.

    Inside, ground glass and consolidation share the probability as they did before; outside there is none.
    """
    tiny = np.finfo(np.float32).tiny  # where a network gives neither kind anything, they share alike
    kinds = (maps[1:] + tiny) / (maps[1:] + tiny).sum(0)
    return np.stack([~lesion, *(kinds * lesion)]).astype(np.float32)


@torch.no_grad()
def predict_slice(
    net: nn.Module, config: MultiClassConfig, grey: np.ndarray, prior: np.ndarray | None = None
) -> np.ndarray:
    """Class probabilities of one slice; `.argmax(0)` is its class map.

    Parameters
    ----------
    net : Module
        Of `load_network`, or the authors' weights in a `MultiClassUNet` with `channel_order` "official".
    config : MultiClassConfig
        Its size, loss, channel order, flips and lesions tell how to feed and read the network.
    grey : uint8 (H, W)
        The slice, in a lung window, cropped to the lungs.
    prior : uint8 (H, W), optional
        Infection map, 255 for certain infection, where the network takes one.

    Returns
    -------
    ndarray
        float32 (3, H, W): background, GGO, consolidation.

    Raises
    ------
    ValueError
        Where the network takes a prior and there is none, or the other way round.
    """
    if config.takes_prior != (prior is not None):
        wants = "takes an infection prior: pass one" if config.takes_prior else "takes the slice alone"
        raise ValueError(f"this {type(net).__name__} {wants}")
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    greys, priors = [grey], [prior]
    if config.flips:
        greys, priors = positions(grey), [None] * 8 if prior is None else positions(prior)
    inputs = [class_input(*planes, config.size) for planes in zip(greys, priors, strict=True)]
    logits = net(torch.stack(inputs).to(device)).float().cpu()
    net.train(was_training)
    sized = [resize(one[None], plane.shape) for one, plane in zip(logits, greys, strict=True)]
    maps = [probabilities(one, config)[0].numpy() for one in sized]
    classes = mean_of_positions(maps) if config.flips else maps[0]
    return named_within(classes, prior >= 128) if config.lesions == "prior" else classes


def predict_slices(
    net: nn.Module, config: MultiClassConfig, files: list[SliceFiles], prior: str | Path | None
) -> list[np.ndarray]:
    """Class probabilities of each slice, its prior read from `prior` (see `read_prior`)."""
    return [
        predict_slice(net, config, read_image(f.image), None if prior is None else read_prior(f, prior))
        for f in files
    ]


def score(maps: list[np.ndarray], files: list[SliceFiles]) -> dict:
    """Score class probabilities, lesion class by lesion class.

    Returns
    -------
    dict
        For "GGO" and "consolidation": "toolbox_of_argmax", `slice_scores` of the pixels where the class is
        the likeliest (how the published rows were made: the mean over thresholds of a map of 0 and 1 is its
        Dice, but for the last threshold; a slice without the class counts 0); "toolbox_of_probability", the
        same of its soft map; "dice_of_argmax", plain Dice, where a slice without the class counts 1 if none
        is predicted; "dice_where_present", that over the slices with the class; "slices_with", their number.
        "confusion": pixels of true (row) and predicted (column) class.
    """
    truths = [read_classes(f.mask) for f in files]
    likeliest = [m.argmax(0) for m in maps]
    scores, count = {}, len(CLASSES)
    for k, name in list(enumerate(CLASSES))[1:]:
        wanted, found = ([plane == k for plane in planes] for planes in (truths, likeliest))
        present = [j for j, mask in enumerate(wanted) if mask.any()]
        scores[name] = {
            "toolbox_of_argmax": _toolbox(found, wanted, files),
            "toolbox_of_probability": _toolbox([m[k] for m in maps], wanted, files),
            "dice_of_argmax": dice_at(found, wanted),
            "dice_where_present": _dice_of(found, wanted, present),
            "slices_with": len(present),
        }
    pairs = sum(
        np.bincount(count * t.astype(int).ravel() + p.ravel(), minlength=count**2)
        for t, p in zip(truths, likeliest, strict=True)
    )
    return scores | {"confusion": pairs.reshape(count, count).tolist()}


def grey_reference(files: list[SliceFiles], held_out: list[SliceFiles], prior: str | Path) -> dict:
    """What a run has to beat: scores of one grey value, the best on `files`, within the prior of `held_out`.

    Returns
    -------
    dict
        As `score`, and "grey", that value: from it on, infected pixels are called consolidation.
    """
    cut = ConsolidationCut.fit([read_image(f.image) for f in files], [read_classes(f.mask) for f in files])
    named = [cut.predict(read_image(f.image), read_prior(f, prior) >= 128) for f in held_out]
    maps = [np.stack([classes == k for k in range(3)]).astype(np.float32) for classes in named]
    return {"grey": cut.grey} | score(maps, held_out)


def _toolbox(maps: list, truths: list, files: list[SliceFiles]) -> dict:
    scores = slice_scores(maps, truths)
    for f, row in zip(files, scores["per_slice"], strict=True):
        row["name"] = f.name
    return null_nan(scores)


def _dice_of(found: list, wanted: list, present: list[int]) -> float | None:
    return dice_at([found[j] for j in present], [wanted[j] for j in present]) if present else None


def card_scores(scores: dict) -> dict[str, float]:
    """Rows of the model card: what each score is of is in its name."""
    rows = {}
    for name in CLASSES[1:]:
        own = scores[name]
        for kind in ("toolbox_of_argmax", "toolbox_of_probability"):
            for figure in ("meanDic", "meanSen", "meanSpe", "Sm", "meanEm", "MAE"):
                rows[f"{name}, {kind}, {figure}"] = own[kind][figure]
        rows |= {f"{name}, {kind}": own[kind] for kind in ("dice_of_argmax", "dice_where_present")}
    return rows


def picture(files: list[SliceFiles], maps: list[np.ndarray], side: int = 128) -> np.ndarray:
    """Slices over their true classes over the network's, uint8 (3 side, N side, 3): a glance at a run."""
    colours = np.array(PALETTE, np.uint8).reshape(-1, 3)
    columns = []
    for f, m in zip(files, maps, strict=True):
        grey = np.repeat(read_image(f.image)[..., None], 3, axis=2)
        planes = (grey, colours[read_classes(f.mask)], colours[m.argmax(0)])
        columns.append(np.concatenate([Image.fromarray(p).resize((side, side)) for p in planes]))
    return np.concatenate(columns, axis=1)
