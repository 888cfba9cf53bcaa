"""What a run on classes depends on: the config, and recipes for machines of any size."""

from dataclasses import dataclass
from typing import Literal

from covidnb.training.loop import SliceConfig
from covidnb.training.run import ConfigError, from_recipe


@dataclass(frozen=True)
class MultiClassConfig(SliceConfig):
    """What a run on classes depends on. Defaults: the paper's recipe, on the embedded data."""

    network: Literal["unet", "fcn8s", "deeplab"] = "unet"
    """The paper's multi-class U-Net, FCN8s or DeepLabV3+."""
    width: int = 64
    """Channels of the U-Net's first level."""
    backbone: str = "resnet50"
    """Of FCN8s and DeepLabV3+: a name of covidnb.nets.backbones.BACKBONES."""
    pretrained: bool = True
    """Start the backbone from ImageNet weights."""
    output_stride: Literal[8, 16] = 16
    """Of DeepLabV3+."""
    prior: str = "label"
    """Infection prior of the training slices: "label" (the doctor's), a folder of maps, or "none"."""
    prior_noise: float = 0.0
    """Training priors are made imperfect, up to this strength: see imperfect_prior."""
    eval_prior: str = ""
    """That of the evaluated slices: a folder of maps, the weights.safetensors of an Inf-Net run, or "label",
    which tells how well a perfect prior would do. Never assumed: a run with a prior must name it."""
    lesions: Literal["network", "prior"] = "network"
    """Who says what is lesion in an evaluated slice: the network, or the prior, cut at one half, in which the
    network names what is there."""
    channel_order: Literal["plain", "official"] = "plain"
    """"official": the released one-hot, in which class k lands in channel k - 1."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.7
    """SGD's."""
    loss: Literal["bce", "dice"] = "bce"
    """"bce": the paper's, each class against the rest; "dice": weighted softmax cross-entropy, and Dice."""
    class_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of background, GGO and consolidation in the cross-entropy of the "dice" loss."""
    flips: bool = False
    """Average the maps of a slice in eight positions: mirrored or not, four quarter turns; the prior's too,
    where weights make it."""
    batch: int = 16
    epochs: int = 200
    lr: float = 1e-2
    drop_epoch: int = 200
    """The paper's learning rate stays as it is."""

    def __post_init__(self):
        super().__post_init__()
        if self.prior_noise < 0:
            raise ConfigError(f"parameter 'prior_noise' must not be negative, got {self.prior_noise}")
        if len(self.class_weights) != 3 or min(self.class_weights) < 0:
            raise ConfigError(
                f"parameter 'class_weights' needs three weights of at least 0, got {self.class_weights}"
            )
        if self.eval_prior and not self.takes_prior:
            raise ConfigError("parameter 'eval_prior' needs a 'prior': the network was to learn without one")
        if self.lesions == "prior" and not self.takes_prior:
            raise ConfigError("parameter 'lesions': the network was to learn without a 'prior' to go by")
        if self.channel_order == "official" and self.loss != "bce":
            raise ConfigError(
                "parameter 'channel_order': the released one-hot gives pixels two classes or none, "
                "which only loss 'bce' can learn"
            )

    @property
    def takes_prior(self) -> bool:
        """Whether the network gets a prior beside the slice."""
        return self.prior != "none"


RECIPES = {
    "paper": {},
    "lite": {
        "width": 16,
        "prior_noise": 1.0,
        "size": 224,
        "batch": 8,
        "epochs": 60,
        "optimizer": "adam",
        "lr": 2e-3,
        "drop_epoch": 48,
        "loss": "dice",
        "augment": True,
        "flips": True,
    },
    "laptop": {
        "width": 16,
        "prior_noise": 1.0,
        "size": 160,
        "batch": 8,
        "epochs": 16,
        "optimizer": "adam",
        "lr": 2e-3,
        "drop_epoch": 13,
        "loss": "dice",
        "augment": True,
    },
    "glance": {
        "width": 8,
        "prior_noise": 1.0,
        "size": 64,
        "batch": 8,
        "epochs": 20,
        "optimizer": "adam",
        "lr": 1e-2,
        "drop_epoch": 16,
        "loss": "dice",
        "class_weights": (1.0, 4.0, 8.0),
    },
}


def configure(values: dict) -> MultiClassConfig:
    """Make a config of a recipe and what the caller sets beside it.

    Parameters
    ----------
    values : dict
        Fields of `MultiClassConfig`, and optionally "recipe": "paper" (the multi-class U-Net at 352 pixels:
        for a GPU), "lite" (one a quarter as wide at 224 pixels, a loss with Dice, imperfect priors, flips:
        real slices on two cores), "laptop" (less of the same, at 160 pixels), "glance" (a narrow one at 64
        pixels, rare classes weighted: seconds, where many runs are compared), or "auto": "laptop" on the
        phantom, else "lite".

    Raises
    ------
    ConfigError
        For an unknown recipe or field, or a value of the wrong type.
    """
    return from_recipe(MultiClassConfig, RECIPES, values)
