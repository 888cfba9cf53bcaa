"""What a run of GASNet depends on: the config, recipes for machines of any size, and less of the method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from covidnb.training.run import ConfigError, from_recipe, variants

TERMS = (
    "adversarial",
    "generated_to_d",
    "original_to_d",
    "reconstruction",
    "paste",
    "multiple_instance",
    "healthy",
    "labelled",
)
KINDS = ("labelled", "covid", "healthy")  # the splits that are learned from


@dataclass(frozen=True)
class GasnetConfig:
    """What a run of GASNet depends on. Defaults: the paper's, on the embedded data.

    A step is one of S and G, with the steps of D that belong to it. (The paper counts those of S and G and
    those of D as iterations: its 300,000 are 150,000 steps, its 10,000 before paste and MIL are 5,000.)
    Each term of the loss has a weight, 0 to leave it out, and the step from which it counts.
    """

    data: str = "phantom"
    """"phantom"; "implants" (its lesions in real chests) or "medseg2" (real patients); or a folder of
    volumes as `python -m covidnb.volumes` and its splits make it."""
    patients: int = 2020
    """Seed of the phantom's patients; with real chests, of grown lesions and of who is held out."""
    size: tuple[int, ...] = (40, 160, 160)
    """(depth, height, width) of the drawn volumes; those of a folder are what they are."""
    depth: int | None = 32
    """Slices of each volume that a step sees, at random where; None: all."""
    augment: bool = True
    """Noise, flips, faint warps, as the paper's."""
    network: Literal["gasnet", "unet3d", "vnet"] = "gasnet"
    """The segmenter: GASNet's, or a baseline from MONAI in its place."""
    width: int | None = None
    """Channels of the segmenter's first level; None: its own, 20 for GASNet's."""
    game_width: int = 32
    """Channels of the first level of G and D."""
    game_levels: int = 4
    """Halvings in G and D below their first level."""
    steps: int = 150_000
    """Steps of S and G."""
    batch: int = 4
    """Volumes of each kind in a step."""
    in_a_row: int = 2
    """Steps of S and G before it is D's turn."""
    d_steps: int = 5
    """Steps of D for each of S and G."""
    joint_step: bool = False
    """One optimiser step down all terms of S and G, instead of one in the game and one of S's own."""
    adversarial: float = 1.0
    """S, G: D shall call the synthetic volume healthy."""
    adversarial_from: int = 0
    adversarial_segmenter_from: int = 0
    """From this step on that term reaches S too; before, G alone."""
    generated_to_d: float = 1.0
    """G: D shall call all that G makes of a sick volume healthy; D: shall not, ever more faintly."""
    generated_to_d_from: int = 0
    original_to_d: float = 1.0
    """D: the sick volume as it came is diseased."""
    original_to_d_from: int = 0
    reconstruction: float = 100.0
    """G: healthy volumes stay as they are."""
    reconstruction_from: int = 0
    paste: float = 100.0
    """S: a lesion pasted into healthy lungs is found where it was pasted."""
    paste_from: int = 5_000
    multiple_instance: float = 1000.0
    """S: a sick volume has a lesion somewhere."""
    multiple_instance_from: int = 5_000
    healthy: float = 100.0
    """S: nothing is lesion in healthy volumes."""
    healthy_from: int = 0
    labelled: float = 500.0
    """S: the lesions that were drawn."""
    labelled_from: int = 0
    silence_original_to_d: float = 0.1
    """Below this value that term is scaled by 1e-4, as released; 0: never."""
    silence_adversarial: float = 0.16
    """The same for the sum of S's and G's terms in the game, by 1e-3."""
    silence_segmentation: float = 0.064
    """The same for the sum of S's own terms, by 1e-2."""
    silence_discriminator: float = 0.16
    """The same for the sum of D's terms, by 1e-6."""
    double_sigmoid: bool = False
    """The released multiple-instance term, which takes a probability for a logit."""
    s_lr: float = 1e-4
    """Learning rate of S, by Adam."""
    g_lr: float = 1e-5
    """Of G, by Adam."""
    d_lr: float = 1e-5
    """Of D."""
    d_optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """Of D."""
    weight_decay: float = 1e-3
    """Of S and D."""
    s_halving: int = 10_000
    """The learning rate of S halves every so many steps; 0: never."""
    game_halving: int = 15_000
    """The same of G and D."""
    ema: float = 0.999
    """Decay of the running mean of S's weights; the mean is what is scored and kept."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the forward pass; on a CPU, volumes under 16 deep need 32-true: see `Padded`."""
    log_every: int = 500
    """Steps between rows of the log, each with a picture and a checkpoint."""
    validate_every: int = 0
    """Steps between scores of the validation volumes in the log, a multiple of `log_every`; 0: none."""
    workers: int = 0
    """Processes that prepare volumes ahead of the steps."""
    seed: int = 0
    """Of the weights' start, the order of the volumes and the augmentation."""

    def __post_init__(self):
        for name in ("steps", "batch", "in_a_row", "d_steps", "game_width", "game_levels", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parameter {name!r} must be at least 1, got {getattr(self, name)}")
        for name in (*TERMS, *(f"{term}_from" for term in TERMS), "adversarial_segmenter_from"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parameter {name!r} must not be negative, got {getattr(self, name)}")
        for name in ("s_lr", "g_lr", "d_lr", "ema"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"parameter {name!r} must lie between 0 and 1, got {getattr(self, name)}")
        if len(self.size) != 3 or min(self.size) < 8:
            raise ConfigError(f"parameter 'size' is (depth, height, width), from 8 voxels on: {self.size}")
        if self.validate_every % self.log_every:
            raise ConfigError(f"parameter 'validate_every' must be a multiple of log_every {self.log_every}")
        if not self.labelled:
            raise ConfigError("parameter 'labelled' must be above 0: nothing else says what a lesion is")

    @property
    def plays(self) -> bool:
        """Whether there is a game at all: without it G and D are not built."""
        return self.adversarial > 0 or self.generated_to_d > 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The splits that this run learns from."""
        sick = self.plays or self.paste > 0 or self.multiple_instance > 0
        healthy = self.plays or self.paste > 0 or self.healthy > 0
        return tuple(kind for kind, used in zip(KINDS, (True, sick, healthy), strict=True) if used)

    def weight(self, term: str, step: int) -> float:
        """Weight of a term in a step, counted from 0."""
        return getattr(self, term) if step >= getattr(self, f"{term}_from") else 0.0

    def learning_rate(self, player: str, step: int) -> float:
        """Learning rate of "s", "g" or "d" in a step, counted from 0."""
        halving = self.s_halving if player == "s" else self.game_halving
        return getattr(self, f"{player}_lr") * (0.5 ** (step // halving) if halving else 1.0)


# what every recipe below the paper's does differently from it
_SMALL = {
    "batch": 1,
    "in_a_row": 1,
    "d_steps": 1,
    "joint_step": True,
    "labelled": 5.0,
    "healthy": 1.0,
    "adversarial": 0.3,
    "generated_to_d": 0.1,
    "original_to_d": 0.5,
    "reconstruction": 3.0,
    "paste": 0.5,
    "multiple_instance": 0.05,
    "silence_original_to_d": 0.0,
    "silence_adversarial": 0.0,
    "silence_segmentation": 0.0,
    "silence_discriminator": 0.0,
    "s_lr": 1e-3,
    "g_lr": 5e-4,
    "d_lr": 2e-4,
    "d_optimizer": "adam",
    "weight_decay": 0.0,
    "s_halving": 0,
    "game_halving": 0,
    "ema": 0.98,
    "precision": "bf16-mixed",
    "game_levels": 3,
}
RECIPES = {
    "paper": {},
    "lite": _SMALL
    | {
        "width": 8,
        "game_width": 8,
        "steps": 1000,
        "adversarial": 0.1,
        "adversarial_segmenter_from": 220,
        "paste_from": 330,
        "multiple_instance_from": 330,
        "log_every": 50,
    },
    "laptop": _SMALL
    | {
        "size": (24, 64, 64),
        "depth": None,
        "width": 8,
        "game_width": 8,
        "steps": 600,
        "adversarial": 0.1,
        "adversarial_segmenter_from": 130,
        "paste_from": 200,
        "multiple_instance_from": 200,
        "log_every": 50,
    },
    "glance": _SMALL
    | {
        "size": (16, 48, 48),
        "depth": None,
        "width": 6,
        "game_width": 6,
        "steps": 120,
        "adversarial_segmenter_from": 30,
        "paste_from": 60,
        "multiple_instance_from": 60,
        "log_every": 10,
    },
}
AUTO = {"phantom": "glance", "implants": "laptop", "medseg2": "laptop"}
"""What recipe "auto" is, by data; "lite" elsewhere."""

_NO_GAME = {"adversarial": 0.0, "generated_to_d": 0.0, "original_to_d": 0.0, "reconstruction": 0.0}
_ALONE = _NO_GAME | {"paste": 0.0, "multiple_instance": 0.0}
ABLATION = {
    "labelled": _ALONE | {"healthy": 0.0},
    "healthy": _ALONE,
    "game": {"paste": 0.0, "multiple_instance": 0.0},
    "no game": _NO_GAME,
    "no original_to_d": {"original_to_d": 0.0},
    "no generated_to_d": {"generated_to_d": 0.0},
    "no reconstruction": {"reconstruction": 0.0},
    "no paste": {"paste": 0.0},
    "no multiple_instance": {"multiple_instance": 0.0},
    "gasnet": {},
}
"""GASNet and less of it: what differs from the config. "labelled": S learns from the labelled volume alone;
"healthy": and that nothing is lesion in healthy volumes; "game": and the game, without paste and multiple
instance; "no game": all terms of S, without G and D; then without a term."""


def configure(values: dict) -> GasnetConfig:
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    values : dict
        Fields of `GasnetConfig`, and optionally "recipe": "paper" (for a GPU), "lite" (small networks on
        real volumes, two cores: hours), "laptop" (what is made at 24 x 64 x 64: minutes), "glance" (less of
        it, at 16 x 48 x 48), or "auto": see `AUTO`.

    Raises
    ------
    ConfigError
        For an unknown recipe or field, or a value of the wrong type.
    """
    return from_recipe(GasnetConfig, RECIPES, values, AUTO)


def ablation(values: dict, names: list[str]) -> dict[str, GasnetConfig]:
    """Make the configs of variants of `ABLATION`; `values` are as for `configure` and hold for all of them.

    Raises
    ------
    ConfigError
        For an unknown variant, too.
    """
    return variants(configure, ABLATION, values, names)


def root_of(config: GasnetConfig) -> Path:
    """The folder of volumes that a config names; the phantom's are drawn if need be."""
    from covidnb.volumes import volumes_root  # here: it reads through SimpleITK, which a GPU box may lack

    return volumes_root(config.data, tuple(config.size), config.patients)
