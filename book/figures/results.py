"""Tables and a figure of the results page, made of what runs have written to data/results."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from covidnb.view import use_style

RECORDS = Path(__file__).resolve().parents[2] / "data" / "results"
SCORES = {
    "meanDic": "mean Dice",
    "dice_at_0.5": "Dice at 0.5",
    "meanSen": "Sen",
    "meanSpe": "Spe",
    "Sm": "S",
    "meanEm": "E",
    "MAE": "MAE",
}
# Fan et al., TMI 2020, the toolbox's figures; Dice at 0.5 was measured on the maps that the authors released
PUBLISHED = {
    "U-Net, published": (0.439, 0.541, 0.534, 0.858, 0.622, 0.625, 0.186),
    "U-Net++, published": (0.581, 0.706, 0.672, 0.902, 0.722, 0.720, 0.120),
    "Inf-Net, published": (0.682, 0.738, 0.692, 0.943, 0.781, 0.838, 0.082),
    "Semi-Inf-Net, published": (0.739, 0.770, 0.725, 0.960, 0.800, 0.894, 0.064),
}
# GGO and consolidation, mean Dice of the toolbox: Fan et al., TMI 2020; the last three rows are as Table 3 of
# FSS-2019-nCov (PMC7836902, 2021) gives them: its figures of the others' maps differ from theirs
PUBLISHED_CLASSES = {
    "DeepLabV3+, stride 8, published": (0.375, 0.117),
    "DeepLabV3+, stride 16, published": (0.443, 0.188),
    "FCN8s, published": (0.471, 0.221),
    "Semi-Inf-Net & FCN8s, published": (0.646, 0.238),
    "Semi-Inf-Net & FCN8s, by FSS-2019-nCov": (0.657, 0.318),
    "Semi-Inf-Net & multi-class U-Net, by FSS-2019-nCov": (0.639, 0.471),
    "FSS-2019-nCov": (0.679, 0.529),
}
CLASS_SCORES = {
    "toolbox, argmax": lambda own: own["toolbox_of_argmax"]["meanDic"],
    "toolbox, probability": lambda own: own["toolbox_of_probability"]["meanDic"],
    "argmax, where present": lambda own: own["dice_where_present"],
}


def record(name: str) -> dict[str, list[dict]]:
    """Runs of a record by what they share: their names without the seed or fold at the end."""
    groups: dict[str, list[dict]] = {}
    for run in json.loads((RECORDS / f"{name}.json").read_text()):
        groups.setdefault(re.sub(r"-(seed|fold)\d+$", "", run["name"]), []).append(run)
    return groups


def cell(values: list[float]) -> str:
    """Mean of a score over runs, with its standard deviation where there are several; no leading zero."""
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.3f}"
    return re.sub(r"\b0\.", ".", text)


def test_table(name: str, titles: dict[str, str], published: tuple[str, ...]) -> Markdown:
    """Published rows, then a row for each group of runs that was scored on the test slices.

    Parameters
    ----------
    name : the record.
    titles : group to the name of its row, in their order.
    published : rows of `PUBLISHED`.
    """
    heads = f"{' | '.join(SCORES.values())} | runs | minutes of the last stage"
    lines = [f"| | {heads} |", "| --- |" + " --- |" * (len(SCORES) + 2)]
    for row in published:
        figures = " | ".join(cell([value]) for value in PUBLISHED[row])
        lines.append(f"| *{row}* | {figures} | | |")
    groups = record(name)
    for group, title in titles.items():
        if group in groups:
            runs = groups[group]
            figures = " | ".join(cell([run["scores"][score] for run in runs]) for score in SCORES)
            minutes = np.mean([run["seconds"] for run in runs]) / 60
            lines.append(f"| {title} | {figures} | {len(runs)} | {f'{minutes:.0f}' if minutes else ''} |")
    return Markdown("\n".join(lines))


def propagation_figure(name: str, titles: dict[str, str], lesion_share: float) -> Figure:
    """Share of lesion in the labels that each round of some propagations wrote.

    Parameters
    ----------
    name : the record, a CSV file of tools/record_logs.py.
    titles : run to the name of its line, in their order.
    lesion_share : that of the doctor's labels, in percent of a slice; drawn across.
    """
    use_style()
    rows = pd.read_csv(RECORDS / f"{name}.csv")
    figure, ax = plt.subplots(figsize=(7, 3))
    for run, title in titles.items():
        one = rows[rows["run"] == run]
        ax.plot(one["labelled"], 100 * one["share"], "o-", ms=3, label=title)
    ax.axhline(lesion_share, color="#444444", ls="--", lw=1, label="the doctor's labels")
    ax.set(xlabel="slices labelled", ylabel="lesion in new labels, % of the slice", ylim=(0, None))
    ax.legend(ncols=2)
    plt.close(figure)  # the page shows what is returned, once
    return figure


def fold_table(name: str, titles: dict[str, str], reference: str) -> Markdown:
    """Mean Dice of each fold and group, their mean, and the paired difference to a reference group."""
    groups = record(name)
    by_fold = {
        group: {run["config"]["fold"]: run["scores"]["meanDic"] for run in groups[group]}
        for group in titles
        if group in groups
    }
    folds = sorted({fold for scores in by_fold.values() for fold in scores})
    heads = " | ".join(f"fold {fold}" for fold in folds)
    lines = [f"| | {heads} | mean | Dice at 0.5 | against {titles[reference]} |"]
    lines.append("| --- |" + " --- |" * (len(folds) + 3))
    for group, scores in by_fold.items():
        figures = " | ".join(cell([scores[fold]]) if fold in scores else "" for fold in folds)
        cut = cell([float(np.mean([run["scores"]["dice_at_0.5"] for run in groups[group]]))])
        both = [fold for fold in scores if fold in by_fold[reference]]
        gains = [scores[fold] - by_fold[reference][fold] for fold in both]
        gain = "" if group == reference else f"{np.mean(gains):+.3f} ± {np.std(gains, ddof=1):.3f}"
        mean = cell([float(np.mean(list(scores.values())))])
        lines.append(f"| {titles[group]} | {figures} | {mean} | {cut} | {gain} |")
    return Markdown("\n".join(lines))


def class_table(name: str, titles: dict[str, str], published: tuple[str, ...]) -> Markdown:
    """Published rows, a row for each group of runs on classes, and one grey value within their priors.

    The columns say of what each Dice is: the toolbox's mean over thresholds of the map of 0 and 1 where the
    class is the likeliest, as the published rows, or of its probability; or plain Dice of that map of 0 and
    1, mean over the slices that have the class.

    Parameters
    ----------
    name : the record.
    titles : group to the name of its row, in their order.
    published : rows of `PUBLISHED_CLASSES`.
    """
    heads = [f"{kind}: {score}" for kind in ("GGO", "consolidation") for score in CLASS_SCORES]
    lines = [f"| | {' | '.join(heads)} | runs |", "| --- |" + " --- |" * (len(heads) + 1)]
    for row in published:
        figures = [text for value in PUBLISHED_CLASSES[row] for text in (cell([value]), "", "")]
        lines.append(f"| *{row}* | {' | '.join(figures)} | |")
    groups, references = record(name), {}
    for group, title in titles.items():
        if group in groups:
            scores = [run["scores"] for run in groups[group]]
            lines.append(f"| {title} | {_class_figures(scores)} | {len(scores)} |")
            if "one grey value" in scores[0]:
                # runs with the same prior share it
                distinct = {json.dumps(one["one grey value"]): one["one grey value"] for one in scores}
                references.setdefault(_class_figures(list(distinct.values())), []).append(title)
    for figures, of in references.items():
        lines.append(f"| one grey value within the prior of: {'; '.join(of)} | {figures} | |")
    return Markdown("\n".join(lines))


def _class_figures(scores: list[dict]) -> str:
    kinds = ("GGO", "consolidation")
    return " | ".join(
        cell([read(one[kind]) for one in scores]) for kind in kinds for read in CLASS_SCORES.values()
    )


def held_out_table(name: str, titles: dict[str, str]) -> Markdown:
    """Dice on the scan of each held-out volume, a column for each group of runs; shares of the last group.

    Parameters
    ----------
    name : the record; every volume is held out in one run of a group.
    titles : group to the name of its column, in their order.
    """
    groups = record(name)
    rows: dict[str, dict[str, dict]] = {}
    for group in titles:
        for run in groups.get(group, ()):
            for volume, scores in run["volumes"].items():
                rows.setdefault(volume, {})[group] = scores
    last = list(titles)[-1]
    heads = f"{' | '.join(titles.values())} | {titles[last]} marks, % of the lungs | true"
    lines = [f"| | {heads} |", "| --- |" + " --- |" * (len(titles) + 2)]
    for volume, row in sorted(rows.items()):
        dices = [cell([row[group]["scan"]]) if group in row else "" for group in titles]
        shares = [f"{row[last][key]:.1f}" for key in ("share_found", "share_true")]
        lines.append(f"| {volume} | {' | '.join(dices + shares)} |")
    return Markdown("\n".join(lines))


VOLUME_SCORES = {
    "Dice": "Dice",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "HD95": "HD95, mm",
    "share_found": "lesion found, % of the lungs",
    "share_true": "true",
}


def volume_table(name: str, titles: dict[str, str], reference: str = "gasnet") -> Markdown:
    """Scores on the scan of each group of runs, and by how many points of Dice the reference is ahead of it.

    A run's score is its mean over the volumes; rows give mean and standard deviation over runs, that is over
    seeds. The margin is taken seed by seed, between runs on the same volumes.

    Parameters
    ----------
    name : the record.
    titles : group to the name of its row, in their order.
    reference : group that the others are compared with.
    """
    groups = record(name)
    heads = f"{' | '.join(VOLUME_SCORES.values())} | seeds | minutes each | {titles[reference]} ahead by"
    lines = [f"| | {heads} |", "| --- |" + " --- |" * (len(VOLUME_SCORES) + 3)]
    ahead = {run["config"]["seed"]: run["scores"]["scan"]["mean"]["Dice"] for run in groups[reference]}
    for group, title in titles.items():
        if group not in groups:
            continue
        runs = groups[group]
        means = {run["config"]["seed"]: run["scores"]["scan"]["mean"] for run in runs}
        figures = [_volume_figure(list(means.values()), key) for key in VOLUME_SCORES]
        margins = [100 * (ahead[seed] - mean["Dice"]) for seed, mean in means.items() if seed in ahead]
        margin = "" if group == reference or not margins else f"{np.mean(margins):+.0f}"
        if margin and len(margins) > 1:
            margin += f" ± {np.std(margins, ddof=1):.0f}"
        minutes = np.mean([run["seconds"] for run in runs]) / 60
        lines.append(f"| {title} | {' | '.join(figures)} | {len(runs)} | {minutes:.0f} | {margin} |")
    return Markdown("\n".join(lines))


def _volume_figure(means: list[dict], key: str) -> str:
    """A score over runs; lengths in whole mm and shares with one digit."""
    values = [mean[key] for mean in means if key in mean]
    if key not in ("HD95", "share_found", "share_true"):
        return cell(values) if values else ""
    digits = 0 if key == "HD95" else 1
    text = f"{np.mean(values):.{digits}f}" if values else ""
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text
