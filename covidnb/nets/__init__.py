"""The papers' networks in plain PyTorch."""

from covidnb.nets.checkpoints import load_official
from covidnb.nets.infnet import InfNet, InfNetOutput

__all__ = ["InfNet", "InfNetOutput", "load_official"]
