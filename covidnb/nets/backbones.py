"""Backbones: an image in, four feature maps out, with ImageNet weights where they can be had.

Every backbone is a module with `channels` (of f1 to f4) and `strides`, whose forward takes (N, 3, H, W)
and returns the list [f1, f2, f3, f4]; `levels()` are the layers that make each map from the one before.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottle2neck(nn.Module):
    """Res2Net bottleneck: the 3x3 convolution of a ResNet split into a hierarchy of `scale` groups.

    Each group is convolved after the result of the group before it was added, so one block sees several
    receptive fields at once (Gao et al., TPAMI 2021, Fig. 2). The first block of a stage does not add, and
    average-pools the last group instead of passing it on.
    """

    scale = 4

    def __init__(self, inputs: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None):
        super().__init__()
        width = planes * 26 // 64
        self.opens_stage = shortcut is not None
        self.conv1 = nn.Conv2d(inputs, width * self.scale, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * self.scale)
        groups = self.scale - 1
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False) for _ in range(groups)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(groups))
        self.pool = nn.AvgPool2d(3, stride, padding=1) if self.opens_stage else nn.Identity()
        self.conv3 = nn.Conv2d(width * self.scale, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut if shortcut is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        *splits, last = self.relu(self.bn1(self.conv1(x))).chunk(self.scale, dim=1)
        seen: list[Tensor] = []
        for split, conv, bn in zip(splits, self.convs, self.bns, strict=True):
            if seen and not self.opens_stage:
                split = split + seen[-1]
            seen.append(self.relu(bn(conv(split))))
        out = self.bn3(self.conv3(torch.cat([*seen, self.pool(last)], dim=1)))
        return self.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """ResNet bottleneck: 1x1 down, 3x3, 1x1 up, added to the shortcut (He et al., CVPR 2016, Fig. 5)."""

    def __init__(self, inputs: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut if shortcut is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet50(nn.Module):
    """ResNet-50 without the classifier (He et al., CVPR 2016)."""

    channels = (256, 512, 1024, 2048)
    strides = (4, 8, 16, 32)
    block = Bottleneck

    def __init__(self, inputs: int = 3):
        super().__init__()
        self.conv1 = self._stem(inputs)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(64, 64, blocks=3, stride=1)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2)
        self.layer3 = self._stage(512, 256, blocks=6, stride=2)
        self.layer4 = self._stage(1024, 512, blocks=3, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stem(inputs: int) -> nn.Module:
        return nn.Conv2d(inputs, 64, 7, stride=2, padding=3, bias=False)

    @staticmethod
    def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def _stage(self, inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = self.block(inputs, planes, stride, self._shortcut(inputs, planes * 4, stride))
        return nn.Sequential(first, *(self.block(planes * 4, planes) for _ in range(blocks - 1)))

    def levels(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        f1 = self.layer1(x)
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        return [f1, f2, f3, self.layer4(f3)]


class Res2Net50(ResNet50):
    """Res2Net-50 v1b, 26w 4s: Inf-Net's default backbone, without the classifier.

    ResNet-50 with three changes: the blocks (see `Bottle2neck`), a stem of three 3x3 convolutions, shortcuts
    that average-pool before their 1x1 convolution (Gao et al., TPAMI 2021, and the released code of Inf-Net).
    """

    block = Bottle2neck

    @staticmethod
    def _stem(inputs: int) -> nn.Module:
        layers = []
        for channels, stride in ((inputs, 2), (32, 1)):
            layers += [nn.Conv2d(channels, 32, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Conv2d(32, 64, 3, padding=1, bias=False))

    @staticmethod
    def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )


class VGG16(nn.Module):
    """VGG-16 (Simonyan & Zisserman, ICLR 2015) as Inf-Net uses it: no batch norm, average pools.

    f1 to f4 are the ends of stages 2 to 5, so every map sits an octave higher than the ResNets'.
    """

    channels = (128, 256, 512, 512)
    strides = (2, 4, 8, 16)

    def __init__(self, inputs: int = 3):
        super().__init__()
        self.stages = nn.ModuleList()
        for outputs, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            layers: list[nn.Module] = [nn.AvgPool2d(2, stride=2)] if self.stages else []
            for _ in range(convs):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            self.stages.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def levels(self) -> list[nn.Module]:
        return list(self.stages[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[1:]


def _conv_same(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolve with TensorFlow's SAME padding, batch norm: for even sizes at stride 2 one side gets more.

    The published norm has momentum 0.01, for a hundred thousand steps; our runs have hundreds: torch's 0.1.
    """
    total = kernel - stride
    before, after = total // 2, total - total // 2
    if before == after:
        pad, conv_pad = nn.Identity(), before
    else:
        pad, conv_pad = nn.ZeroPad2d((before, after, before, after)), 0
    conv = nn.Conv2d(inputs, outputs, kernel, stride, conv_pad, groups=groups, bias=False)
    return nn.Sequential(pad, conv, nn.BatchNorm2d(outputs, eps=1e-3))


class InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excitation: widen 1x1, filter each channel, narrow 1x1; add if it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int):
        super().__init__()
        middle = inputs * expand
        self.expand = _conv_same(inputs, middle, 1) if expand > 1 else None
        self.depthwise = _conv_same(middle, middle, kernel, stride, groups=middle)
        self.project = _conv_same(middle, outputs, 1)
        self.relu = nn.ReLU6(inplace=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.relu(self.expand(x))
        out = self.project(self.relu(self.depthwise(out)))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le, ICML 2019; Lite: no squeeze-and-excitation, ReLU6), no classifier.

    A tenth of Res2Net-50's work, and its ImageNet weights come from the Python package index: the backbone
    with which fifty slices are enough on a laptop. f1 to f4 are the last maps at strides 4, 8, 16 and 32.
    """

    channels = (24, 40, 112, 320)
    strides = (4, 8, 16, 32)
    # blocks, kernel, stride, expansion, output channels of the seven stages
    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self, inputs: int = 3):
        super().__init__()
        self.stem = _conv_same(inputs, 32, 3, stride=2)
        self.relu = nn.ReLU6(inplace=True)
        self.blocks = nn.ModuleList()
        inputs, ends = 32, []
        for blocks, kernel, stride, expand, outputs in self.stages:
            for k in range(blocks):
                self.blocks.append(InvertedResidual(inputs, outputs, kernel, stride if k == 0 else 1, expand))
                inputs = outputs
            ends.append(len(self.blocks))
        self._taps = (ends[1], ends[2], ends[4], ends[6])

    def levels(self) -> list[nn.ModuleList]:
        return [self.blocks[start:end] for start, end in pairwise((0, *self._taps))]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.stem(x))
        features = []
        for level in self.levels():
            for block in level:
                x = block(x)
            features.append(x)
        return features


def _lite_name(name: str) -> str | None:
    """Translate an entry of the published EfficientNet-Lite state dict to ours; None for the classifier."""
    if name.startswith("_conv_stem."):
        return name.replace("_conv_stem", "stem.1")
    if name.startswith("_bn0."):
        return name.replace("_bn0", "stem.2")
    if not name.startswith("_blocks."):
        return None
    _, number, layer, entry = name.split(".")
    # in the first block, which does not expand, the published names still count norms from _bn1
    layers = {
        "_expand_conv": "expand.1",
        "_bn0": "expand.2",
        "_depthwise_conv": "depthwise.1",
        "_bn1": "depthwise.2",
        "_project_conv": "project.1",
        "_bn2": "project.2",
    }
    return f"blocks.{number}.{layers[layer]}.{entry}"


def _without_classifier(name: str) -> str | None:
    return None if name.startswith("fc.") else name


def vgg_place(stage: int, conv: int) -> str:
    """Name of our VGG-16 layer for convolution `conv` of stage `stage`, both counted from 1."""
    pool = 0 if stage == 1 else 1
    return f"stages.{stage - 1}.{pool + 2 * (conv - 1)}"


def _vgg_name(name: str) -> str | None:
    """Translate an entry of the published VGG-16 state dict (features.N.weight) to ours."""
    top, number, *entry = name.split(".")
    if top != "features":
        return None
    # the published list counts convolutions, ReLUs and pools in one row
    firsts = (0, 5, 10, 17, 24)
    stage = max(s for s, first in enumerate(firsts, 1) if first <= int(number))
    return f"{vgg_place(stage, (int(number) - firsts[stage - 1]) // 2 + 1)}.{entry[0]}"


# class, name of its ImageNet weights in data/catalog.yaml, translation of their entries
BACKBONES = {
    "res2net50": (Res2Net50, "res2net50", _without_classifier),
    "resnet50": (ResNet50, "resnet50", _without_classifier),
    "vgg16": (VGG16, "vgg16", _vgg_name),
    "efficientnet_lite0": (EfficientNetLite0, "efficientnet_lite0", _lite_name),
}


def dilate(net: nn.Module, output_stride: int) -> None:
    """Keep a backbone's maps at `output_stride` or finer, in place: its later strides become dilation.

    The "atrous" algorithm (Chen et al., TPAMI 2018, Sec. 3.1): where a layer no longer steps over every
    other pixel, those after it read every other pixel. The weights are the same, so are the pixels that a
    map had before, with new ones between them; only an average pool cannot read at a distance and is
    narrower than it was (Res2Net's shortcuts and VGG's pools vanish).
    """
    dilation = 1
    for level, stride in zip(net.levels(), net.strides, strict=True):
        if stride <= output_stride:
            continue
        for layer in level.modules():
            if isinstance(layer, nn.Conv2d):
                rate = dilation if layer.stride == (2, 2) else 2 * dilation
                layer.dilation = (rate, rate)
                layer.padding = tuple(rate * (k // 2) for k in layer.kernel_size)
                layer.stride = (1, 1)
            elif isinstance(layer, nn.AvgPool2d) and layer.stride == 2:
                layer.stride = 1
                layer.kernel_size = 1 if layer.kernel_size == 2 else layer.kernel_size
            elif isinstance(layer, nn.ZeroPad2d):
                layer.padding = (0, 0, 0, 0)  # the one-sided padding of a stride
        dilation *= 2
    net.strides = tuple(min(stride, output_stride) for stride in net.strides)


def backbone(
    name: str, pretrained: bool = False, inputs: int = 3, output_stride: int | None = None
) -> nn.Module:
    """Build a backbone by name, with ImageNet weights if asked.

    Parameters
    ----------
    name : str
        One of `BACKBONES`.
    pretrained : bool
        Fetch the ImageNet weights (data/catalog.yaml says from where) and load them strictly.
    inputs : int
        Channels of the image. ImageNet's kernels are for three; those of further channels (a prior) start at
        zero, so that the network begins as the one that ImageNet taught and learns by how much to listen to
        them. Without ImageNet weights all kernels start at random.
    output_stride : int, optional
        See `dilate`.

    Raises
    ------
    ValueError
        For an unknown name.
    covidnb.catalog.CatalogError
        Where the weights are neither at hand nor reachable.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown: choose one of {', '.join(BACKBONES)}")
    build, entry, translate = BACKBONES[name]
    net = build(inputs)
    if pretrained:
        from covidnb.catalog import fetch  # only here: a network can be built where no catalog is

        published = torch.load(fetch(entry), map_location="cpu", weights_only=True)
        weights = {ours: v for k, v in published.items() if (ours := translate(k)) is not None}
        stem = next(name for name, value in net.named_parameters() if value.ndim == 4)
        weights[stem] = F.pad(weights[stem], (0, 0, 0, 0, 0, inputs - 3))
        net.load_state_dict(weights)
    if output_stride is not None:
        dilate(net, output_stride)
    return net
