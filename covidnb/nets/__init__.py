"""The papers' networks in plain PyTorch."""

from covidnb.nets.checkpoints import load_official
from covidnb.nets.infnet import InfNet, InfNetOutput
from covidnb.nets.unet import MultiClassUNet, UNet, UNetPlusPlus

__all__ = ["InfNet", "InfNetOutput", "MultiClassUNet", "UNet", "UNetPlusPlus", "load_official"]
