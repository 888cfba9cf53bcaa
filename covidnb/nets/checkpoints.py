"""The authors' released weights, read strictly into our networks."""

import re
from functools import partial

from torch import Tensor, nn

from covidnb.nets.backbones import vgg_place
from covidnb.nets.gasnet import Discriminator, Generator, Segmenter
from covidnb.nets.infnet import InfNet
from covidnb.nets.unet import MultiClassUNet


def _infnet_entry(name: str) -> str | None:
    """Translate an entry of the authors' Inf-Net state dict to ours; None for one its forward never uses."""
    top, _, rest = name.partition(".")
    if top == "resnet":
        return None if rest.startswith("fc.") else f"backbone.{rest}"
    if top == "vgg":
        return _vgg_entry(rest)
    if top in ("rfb2_1", "rfb3_1", "rfb4_1"):
        part, _, entry = rest.partition(".")
        part = {"conv_cat": "concat", "conv_res": "shortcut"}.get(part, part.replace("branch", "branches."))
        return f"{top[:4]}.{part}.{entry}"
    if top == "ParDec":
        part, _, entry = rest.partition(".")
        part = part.replace("conv_upsample", "up").replace("conv_concat", "concat")
        return f"decoder.{ {'conv4': 'fuse', 'conv5': 'head'}.get(part, part) }.{entry}"
    if top.startswith("edge_conv"):
        number = int(top.removeprefix("edge_conv"))
        return f"edge.head.{rest}" if number == 4 else f"edge.features.{number - 1}.{rest}"
    if top.startswith("ra"):
        stage, number = int(top[2]), int(top.removeprefix(top[:3] + "_conv"))
        last = 5 if stage == 4 else 4
        part = {1: "project", last: "head"}.get(number, f"refine.{number - 2}")
        return f"reverse{stage}.{part}.{rest}"
    return name


def _vgg_entry(name: str) -> str | None:
    """Translate an entry below the authors' `vgg.`; None for their second, unused copy of stages 4 and 5."""
    _, layer, entry = name.split(".")
    # conv2.conv2_1 is stage 2, convolution 1; conv4_1.conv4_3_1 is stage 4, convolution 3, first copy
    stage, conv, *copy = (int(n) for n in layer.removeprefix("conv").split("_"))
    return None if copy == [2] else f"backbone.{vgg_place(stage, conv)}.{entry}"


def _unet_entry(name: str) -> str:
    """Translate an entry of the authors' multi-class U-Net state dict to ours."""
    top, _, rest = name.partition(".")
    rest = rest.replace("maxpool_conv.1.", "").replace("double_conv.", "").removeprefix("conv.")
    if top in ("inc", "outc"):
        return f"{ {'outc': 'head'}.get(top, top) }.{rest}"
    return f"{top[:-1]}.{int(top[-1]) - 1}.{rest}"  # down1 is our down.0


# the authors' layers -> ours; None: declared, and never used by their forward
SEGMENTER = {"conv": "stem.0", "conv1": "level.0", "cov2": "level.1", "cov3": "level.2", "pred": "head"}
SEGMENTER |= {"max_cov2": "down.0", "max_cov3": "down.1", "up_cov2": "up.0", "up_cov1": "up.1"}
SEGMENTER |= {"de_cov2": "merge.0", "de_cov1": "merge.1"}
SEGMENTER |= dict.fromkeys(("max_cov4", "cov4", "up_cov3", "de_cov3"))
GENERATOR = {f"conv{i + 1}": f"down.{i}" for i in range(5)} | {f"up_conv{4 - i}": f"up.{i}" for i in range(4)}
GENERATOR |= {"out_G": "head"} | dict.fromkeys(("out_2", "out_3", "out_4"))
DISCRIMINATOR = {"cov_init": "stem", "layer": "head", "att": "attention"}
DISCRIMINATOR |= {"cov1": "plane.0", "cov5": "plane.1", "cov8": "plane.2", "cov11": "plane.3"}
DISCRIMINATOR |= {"cov3": "down.0", "cov6": "down.1", "cov9": "down.2", "cov12": "down.3"}
DISCRIMINATOR |= dict.fromkeys(("cov13", "out_conv", "flat_conv2"))


def _gasnet_entry(layers: dict[str, str | None], name: str) -> str | None:
    """Translate an entry of the authors' GASNet state dicts to ours; None for a layer never used."""
    top, _, rest = name.partition(".")
    ours = layers.get(top, top)
    if ours is None:
        return None
    rest = rest.replace("output_conv", "1")
    # their spectral norm keeps its vectors beside the weight, today's below the weight's parametrization
    rest = re.sub(r"weight_([uv])$", r"parametrizations.weight.0._\1", rest)
    return f"{ours}.{rest.replace('weight_orig', 'parametrizations.weight.original')}"


TRANSLATIONS = {
    InfNet: _infnet_entry,
    MultiClassUNet: _unet_entry,
    Segmenter: partial(_gasnet_entry, SEGMENTER),
    Generator: partial(_gasnet_entry, GENERATOR),
    Discriminator: partial(_gasnet_entry, DISCRIMINATOR),
}


def load_official(net: nn.Module, state_dict: dict[str, Tensor]) -> list[str]:
    """Load a state dict with the authors' names into one of our networks, strictly.

    Parameters
    ----------
    net : InfNet, MultiClassUNet, Segmenter, Generator or Discriminator
        The network to fill, built as the weights were: backbone, width, levels.
    state_dict : dict of str to Tensor
        The authors' entries.

    Returns
    -------
    list of str
        Entries dropped because the forward never uses them: the ImageNet classifier, VGG-16's second
        tail, GASNet's fourth level of S, side outputs of G, last block and two heads of D.

    Raises
    ------
    TypeError
        For a network of another kind.
    ValueError
        Naming every entry that is missing, unknown or of another shape.
    """
    if type(net) not in TRANSLATIONS:
        known = " or ".join(kind.__name__ for kind in TRANSLATIONS)
        raise TypeError(f"the authors published no weights for {type(net).__name__}: pass an {known}")
    translate = TRANSLATIONS[type(net)]
    translated, names, dropped = {}, {}, []
    for name, value in state_dict.items():
        ours = translate(name)
        if ours is None:
            dropped.append(name)
        else:
            translated[ours], names[ours] = value, name
    own = net.state_dict()
    faults = [f"missing: {name}" for name in own if name not in translated]
    for ours, value in translated.items():
        if ours not in own:
            faults.append(f"unknown: {names[ours]}")
        elif own[ours].shape != value.shape:
            faults.append(f"{names[ours]} is {tuple(value.shape)}, expected {tuple(own[ours].shape)}")
    if faults:
        raise ValueError(f"not the weights of this {type(net).__name__}:\n  " + "\n  ".join(faults))
    net.load_state_dict(translated)
    return dropped
