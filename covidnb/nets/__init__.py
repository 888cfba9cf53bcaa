"""The papers' networks in plain PyTorch."""

from covidnb.nets.checkpoints import load_official
from covidnb.nets.deeplab import DeepLabV3Plus
from covidnb.nets.fcn import FCN8s
from covidnb.nets.gasnet import Discriminator, DiscriminatorOutput, Generator, Segmenter, volume_segmenter
from covidnb.nets.infnet import InfNet, InfNetOutput
from covidnb.nets.unet import MultiClassUNet, UNet, UNetPlusPlus

__all__ = [
    "DeepLabV3Plus",
    "Discriminator",
    "DiscriminatorOutput",
    "FCN8s",
    "Generator",
    "InfNet",
    "InfNetOutput",
    "MultiClassUNet",
    "Segmenter",
    "UNet",
    "UNetPlusPlus",
    "load_official",
    "volume_segmenter",
]
