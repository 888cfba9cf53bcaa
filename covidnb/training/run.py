"""A run folder: the config it was started with, its last checkpoint, its log and its results."""

import csv
import dataclasses
import difflib
import io
import json
import math
import platform
import types
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from covidnb.files import whole

AUTO = {"phantom": "laptop"}  # data to the recipe that "auto" is there
HEADER = "covidnb"  # the entry of a weights file's header that says what it is

CARD = """# Model card: {method}, COVID-19 lesion segmentation in CT {unit}

**Not for diagnosis.** Research and teaching only; never validated for clinical use.

- Data: {data}; {trained} {unit} trained on, {evaluated} {unit} evaluated on.
- Licence: the code is MIT; the weights inherit the terms of the data (book page "Data sets").
- Input: {input}
- Output: {output}

## Scores on the evaluated {unit}

| score | value |
| --- | --- |
{rows}

## Configuration

| field | value |
| --- | --- |
{settings}

## Software and machine

| what | value |
| --- | --- |
{software}
"""


class ConfigError(ValueError):
    """A run's parameters cannot be used; the message names the field and the remedy."""


def _fits(value, hint) -> bool:
    """Whether `value` has the type `hint`; a whole number counts as a float, True as no number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, args[0]) for v in value)
    if origin is typing.Literal:
        return value in args
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def parse_config(kind: type, values: dict):
    """Fill a config dataclass from a notebook's or a file's parameters.

    Parameters
    ----------
    kind : type
        A dataclass whose fields have defaults.
    values : dict
        Field name to value; lists stand for tuples.

    Raises
    ------
    ConfigError
        Naming an unknown field (with the nearest known one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown parameter {name!r}: {advice}")
        if not _fits(value, hints[name]):
            wanted = next(field.type for field in dataclasses.fields(kind) if field.name == name)
            wanted = getattr(wanted, "__name__", str(wanted))
            raise ConfigError(f"parameter {name!r} must be {wanted}, got {value!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def recipe_of(values: dict, auto: dict[str, str] = AUTO) -> str:
    """Name of the recipe that a run's values ask for; "auto", or none: that of their data, or "lite"."""
    recipe = values.get("recipe", "auto")
    return auto.get(values.get("data", "phantom"), "lite") if recipe == "auto" else recipe


def from_recipe(kind: type, recipes: dict[str, dict], values: dict, auto: dict[str, str] = AUTO):
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    kind : type
        See `parse_config`.
    recipes : dict
        Name of a recipe to the fields that it sets; those that "auto" can be are among them.
    values : dict
        Fields, and optionally "recipe": a name, or "auto".
    auto : dict
        See `recipe_of`.

    Raises
    ------
    ConfigError
        For an unknown recipe, or as `parse_config`.
    """
    recipe = recipe_of(values, auto)
    if recipe not in recipes:
        raise ConfigError(f"parameter 'recipe' must be 'auto' or one of {', '.join(recipes)}, got {recipe!r}")
    return parse_config(kind, recipes[recipe] | {k: v for k, v in values.items() if k != "recipe"})


def check_finite(terms: dict[str, float], when: str) -> None:
    """Refuse losses that are no numbers, before a checkpoint keeps the weights that made them.

    Raises
    ------
    ConfigError
        Naming the term, and what to change.
    """
    for name, value in terms.items():
        if not math.isfinite(value):
            raise ConfigError(
                f"{when}: the loss {name!r} is {value}, and the weights are lost; the last checkpoint is "
                "from before. Begin a new run folder with a lower learning rate, or with precision 32-true"
            )


def variants(configure: Callable, differences: dict[str, dict], values: dict, names: list[str]) -> dict:
    """Make the configs of an ablation, by name.

    Parameters
    ----------
    configure : callable
        (values) to a config.
    differences : dict
        Name of a variant to the fields in which it differs.
    values : dict
        Of all variants.
    names : list of str
        The variants asked for.

    Raises
    ------
    ConfigError
        For an unknown variant, or as `configure`.
    """
    for name in names:
        if name not in differences:
            raise ConfigError(f"parameter 'variants': {name!r} is not one of {', '.join(differences)}")
    return {name: configure(values | differences[name]) for name in names}


def check_positive(config, names: tuple[str, ...]) -> None:
    """Check that whole numbers are at least 1, and that 'size' can be halved five times.

    Raises
    ------
    ConfigError
        Naming the field.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"parameter {name!r} must be at least 1, got {getattr(config, name)}")
    if config.size % 32:
        raise ConfigError(f"parameter 'size' must be a multiple of 32, got {config.size}")
    if not 0 < config.lr < 1:
        raise ConfigError(f"parameter 'lr' must lie between 0 and 1, got {config.lr}")


def notebook_parameters(names: dict) -> dict:
    """Pick a notebook's parameters out of its `globals()`: the plain values that it holds before it imports.

    Papermill adds a value that the notebook never declared as one more name, so a misspelt parameter is
    found here and refused by `parse_config`.
    """
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    return {
        name: value
        for name, value in names.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ("In", "Out")
    }


def versions() -> dict[str, str]:
    """Name what a run's numbers depend on: Python, torch, the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }


def _event_writer(folder: Path, epoch: int):
    """TensorBoard's log from `epoch` on, what an interrupted run wrote of it dropped; False if impossible."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # a GPU box may have torch alone; log.csv says the same
        return False
    return SummaryWriter(str(folder), purge_step=epoch)


class Run:
    """A run folder, opened for a config: new, or the one it was started with.

    Parameters
    ----------
    folder : str or Path
        Made if missing. One that has learnt with other parameters is refused; one that failed before its
        first checkpoint (its ImageNet weights could not be had, say) may start again with any.
    config : dataclass
        Written to config.json.

    Raises
    ------
    ConfigError
        Naming the fields in which the folder's own config differs.
    """

    def __init__(self, folder: str | Path, config):
        self.folder = Path(folder)
        self.config = config
        self._events = None
        asked = json.loads(json.dumps(dataclasses.asdict(config)))
        path = self.folder / "config.json"
        if path.exists() and self.checkpoint_path.exists():
            # what the config did not have yet when the run began was as its default
            defaults = {
                f.name: f.default for f in dataclasses.fields(config) if f.default != dataclasses.MISSING
            }
            started = json.loads(json.dumps(defaults)) | json.loads(path.read_text())
            fields = sorted(k for k in {*asked, *started} if asked.get(k) != started.get(k))
            if fields:
                pairs = ", ".join(f"{k} {started.get(k)!r} (now {asked.get(k)!r})" for k in fields)
                raise ConfigError(
                    f"{self.folder} was started with {pairs}: choose another folder, or delete this one"
                )
        else:
            self.write_json("config.json", asked)

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint" / "last.pt"

    @property
    def weights_path(self) -> Path:
        return self.folder / "weights.safetensors"

    def write_json(self, name: str, content) -> None:
        """Write one JSON file of the folder, whole or not at all."""
        with whole(self.folder / name) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")

    def write_log(self, history: list[dict], picture: np.ndarray | None = None, unit: str = "epoch") -> None:
        """Write log.csv, rewritten each time, so that a resumed run has no double rows.

        Parameters
        ----------
        history : list of dict
            All rows; each has the `unit` that it is the end of.
        picture : ndarray, optional
            What the network makes of held-out slices, uint8 (H, W, 3), kept as validation/UNIT_NNNN.png.
        unit : str
            What the rows count: "epoch" or "step".

        The last row and the picture go to TensorBoard's log too, where tensorboardX is installed.
        """
        columns = list(dict.fromkeys(key for row in history for key in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        with whole(self.folder / "log.csv") as part:
            part.write_text(table.getvalue())
        last = history[-1]
        if picture is not None:
            with whole(self.folder / "validation" / f"{unit}_{last[unit]:04d}.png") as part:
                Image.fromarray(picture).save(part)
        if self._events is None:
            self._events = _event_writer(self.folder / "tensorboard", last[unit])
        if self._events:
            for name, value in last.items():
                if isinstance(value, int | float) and name != unit:
                    self._events.add_scalar(name, value, last[unit])
            if picture is not None:
                self._events.add_image("validation", picture, last[unit], dataformats="HWC")
            self._events.flush()

    def save_checkpoint(self, state: dict) -> None:
        """Write all that the next step depends on; a kill at any moment leaves the one before or this one.

        Raises OSError, naming the file, where the disk is full.
        """
        # through memory: torch's own writer does not say that a disk is full
        torch.save(state, content := io.BytesIO())
        with whole(self.checkpoint_path) as part:
            part.write_bytes(content.getbuffer())

    def load_checkpoint(self) -> dict | None:
        """Read the last checkpoint, on the CPU; None where the run has not come that far.

        Raises
        ------
        ConfigError
            For a file that is no checkpoint.
        """
        if not self.checkpoint_path.exists():
            return None
        try:
            return torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except Exception as fault:
            raise ConfigError(
                f"{self.checkpoint_path} cannot be read ({type(fault).__name__}): delete it to start again"
            ) from fault

    def write_card(self, method: str, counts: dict, scores: dict, output: str, unit: str, input: str) -> None:
        """Write model_card.md: what the weights were made from, how well they do, what they are not for."""
        rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in scores.items() if isinstance(v, float))
        settings = "\n".join(f"| {k} | {v} |" for k, v in dataclasses.asdict(self.config).items())
        software = "\n".join(f"| {k} | {v} |" for k, v in versions().items())
        data = self.config.data
        with whole(self.folder / "model_card.md") as part:
            part.write_text(CARD.format(**counts, **locals()))

    def finish(
        self,
        net: nn.Module,
        history: list[dict],
        counts: dict,
        scores: dict,
        on_card: dict | None = None,
        output: str = "probability of infection for each pixel; 0.5 is the cut.",
        built_by=None,
        unit: str = "slices",
        input: str = "axial slices in a lung window, 8-bit, resized to a square and ImageNet-normalised.",
    ) -> None:
        """Write what a finished run has: its weights, its model card and, last, metrics.json.

        Parameters
        ----------
        net : Module
            With the trained weights.
        history : list of dict
            The log.
        counts : dict
            How many slices were "trained" on, and how many "evaluated".
        scores : dict
            For metrics.json, without NaN.
        on_card : dict, optional
            What the card shows of them, name to float; without it, the floats among the scores.
        output : str
            What the network says of a pixel.
        built_by : dataclass, optional
            The config that builds the network, for the weights' header; without it, the run's.
        unit : str
            What was counted: "slices" or "volumes".
        input : str
            What the network takes, for the card.
        """
        self.save_weights(net, built_by)
        self.write_card(type(net).__name__, counts, on_card or scores, output, unit, input)
        seconds = sum(row["seconds"] for row in history)
        result = {"scores": scores, unit: counts, "seconds": seconds, "versions": versions()}
        self.write_json("metrics.json", result)

    def save_weights(self, net: nn.Module, built_by=None) -> None:
        """Write the trained weights as safetensors, with the config that builds their network."""
        made = {"network": type(net).__name__, "config": dataclasses.asdict(built_by or self.config)}
        header = {HEADER: json.dumps(made)}  # one entry: safetensors writes several in any order
        with whole(self.weights_path) as part:
            part.write_bytes(save({k: v.contiguous().cpu() for k, v in net.state_dict().items()}, header))


def read_weights(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a run's weights file: its header ("network", "config") and its tensors.

    Raises
    ------
    ConfigError
        Where the file is missing, or was not written by a run of the course.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; give the weights.safetensors of a finished run")
    try:
        with safe_open(path, framework="pt") as stored:
            header = (stored.metadata() or {}).get(HEADER)
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as fault:
        raise ConfigError(f"{path} is no safetensors file ({fault}): train or copy it again") from fault
    if header is None:
        raise ConfigError(f"{path} does not say which network it is for: use the file that a run wrote")
    return json.loads(header), tensors
