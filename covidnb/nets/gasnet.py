"""GASNet (Xu et al. 2020): a segmenter, and the generator and discriminator that teach it with volume labels.

Volumes are (N, 1, D, H, W) in [-1, 1]. Instance norm has no weights of its own in any of the three networks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def full_precision(x: Tensor) -> Tensor:
    """In float32 at least: near 0 and 1 bf16 has no digits left for a probability, and no gradient."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_volume(x: Tensor, multiples: tuple[int, int, int], network: str) -> None:
    """Refuse an input that is no single-channel volume, or whose sides do not halve often enough."""
    if x.ndim != 5 or x.shape[1] != 1 or any(n % m for n, m in zip(x.shape[2:], multiples, strict=True)):
        raise ValueError(
            f"{network} takes (N, 1, D, H, W) with D, H, W multiples of {multiples}, got {tuple(x.shape)}"
        )


def conv_norm(inputs: int, outputs: int, kernel, stride=1, padding=1, bias: bool = False) -> list[nn.Module]:
    """Convolution, instance norm, leaky ReLU (0.01)."""
    conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=bias)
    return [conv, nn.InstanceNorm3d(outputs), nn.LeakyReLU(inplace=True)]


class SeparableBlock(nn.Sequential):
    """Twice: 1x3x3 convolution in the slice, 3x1x1 across slices, instance norm, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int):
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            in_slice = nn.Conv3d(width, outputs, (1, 3, 3), padding=(0, 1, 1), bias=False)
            layers += [in_slice, *conv_norm(outputs, outputs, (3, 1, 1), padding=(1, 0, 0))]
        super().__init__(*layers)


class Segmenter(nn.Module):
    """S: a volume in, the probability of lesion in each voxel out.

    Parameters
    ----------
    width : int
        Channels of the first of three levels, doubled twice. Released: 20.
    """

    def __init__(self, width: int = 20):
        super().__init__()
        w1, w2, w3 = width, 2 * width, 4 * width
        self.stem = nn.Sequential(*conv_norm(1, w1, 3, bias=True))
        self.level = nn.ModuleList(SeparableBlock(w, w) for w in (w1, w2, w3))
        self.down = nn.ModuleList(
            nn.Sequential(*conv_norm(a, b, 3, stride=2)) for a, b in ((w1, w2), (w2, w3))
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode="trilinear"), *conv_norm(a, b, 3))
            for a, b in ((w3, w2), (w2, w1))
        )
        self.merge = nn.ModuleList(SeparableBlock(2 * w, w) for w in (w2, w1))
        self.head = nn.Conv3d(w1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Segment (N, 1, D, H, W), sides multiples of 4: probabilities, float32, of the same shape."""
        check_volume(x, (4, 4, 4), "the segmenter")
        skips = [self.level[0](self.stem(x))]
        for down, level in zip(self.down, self.level[1:], strict=True):
            skips.append(level(down(skips[-1])))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        return torch.sigmoid(full_precision(self.head(x)))


class Generator(nn.Module):
    """G: a volume in, the volume without lesions out, in [-1, 1].

    Parameters
    ----------
    width : int
        Channels of the first level, doubled at each. Released: 32.
    levels : int
        Halvings below the first level, of depth too. Released: 4.
    """

    def __init__(self, width: int = 32, levels: int = 4):
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList(
            [nn.Sequential(*conv_norm(1, width, (1, 4, 4), (1, 2, 2), (0, 1, 1), True))]
        )
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            self.down.append(nn.Sequential(*conv_norm(a, b, 3, stride=2, bias=True)))
        self.up = nn.ModuleList()
        for i in reversed(range(levels)):
            inputs = widths[i + 1] if i == levels - 1 else 2 * widths[i + 1]
            conv, norm, _ = conv_norm(inputs, widths[i], 3)
            twice = nn.Upsample(scale_factor=2, mode="trilinear")
            self.up.append(nn.Sequential(twice, conv, norm, nn.ReLU(inplace=True)))
        self.head = nn.Sequential(
            nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"),
            nn.Conv3d(2 * width, 1, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Generate from (N, 1, D, H, W); with four levels D is a multiple of 16, H and W are of 32."""
        side = 2 ** len(self.up)
        check_volume(x, (side, 2 * side, 2 * side), f"the generator with {len(self.up)} levels")
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up in self.up:
            x = torch.cat([up(x), skips.pop()], dim=1)
        return torch.tanh(full_precision(self.head(x)))


class DiscriminatorOutput(NamedTuple):
    """`logit` (N, 1), above 0 where the volume looks diseased; `attention` (N, 1, d, h, w) in [0, 1].

    No loss of the paper's or of the released code trains the attention.
    """

    logit: Tensor
    attention: Tensor


class Discriminator(nn.Module):
    """D: does a volume look diseased (1) or healthy (0)? Spectral norm on every convolution of the trunk.

    Parameters
    ----------
    width : int
        Channels of the first level, doubled at each. Released: 32.
    levels : int
        Halvings below the first level, of depth too. Released: 4.
    adaptive : bool
        Average-pool what the trunk yields to the 2 x 5 x 5 that the last layer was made for, so that other
        sizes than the released 32 x 160 x 160 can be judged, with the same weights. Released: no.
    """

    GRID = (2, 5, 5)  # positions that the last layer sees

    def __init__(self, width: int = 32, levels: int = 4, adaptive: bool = False):
        super().__init__()
        self.adaptive = adaptive
        first = spectral_norm(nn.Conv3d(1, width, (1, 4, 4), (1, 2, 2), (0, 1, 1)))
        self.stem = nn.Sequential(first, nn.LeakyReLU(0.1, inplace=True))
        widths = [width * 2**i for i in range(levels + 1)]
        self.plane = nn.ModuleList(self._conv(w, w, (1, 3, 3), 1, (0, 1, 1)) for w in widths[:-1])
        self.down = nn.ModuleList(
            self._conv(a, b, 4, 2, 1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.attention = nn.Sequential(nn.Conv3d(widths[2], 1, 1), nn.Sigmoid())
        depth, height, across = self.GRID
        self.head = nn.Linear(widths[-1] * depth * height * across, 1)

    @staticmethod
    def _conv(inputs: int, outputs: int, kernel, stride, padding) -> nn.Sequential:
        conv = spectral_norm(nn.Conv3d(inputs, outputs, kernel, stride, padding))
        return nn.Sequential(conv, nn.InstanceNorm3d(outputs), nn.LeakyReLU(0.1, inplace=True))

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge (N, 1, 32, 160, 160), or another size with `adaptive`."""
        self._check(x)
        x = self.stem(x)
        for level, (plane, down) in enumerate(zip(self.plane, self.down, strict=True)):
            x = down(plane(x))
            if level == 1:
                attention = self.attention(x)
        if self.adaptive:
            x = F.adaptive_avg_pool3d(x, self.GRID)
        return DiscriminatorOutput(full_precision(self.head(x.flatten(1))), attention)

    def _check(self, x: Tensor) -> None:
        scale = 2 ** len(self.down)
        expected = tuple(n * s for n, s in zip(self.GRID, (scale, 2 * scale, 2 * scale), strict=True))
        if x.ndim != 5 or x.shape[1] != 1 or not self.adaptive and tuple(x.shape[2:]) != expected:
            raise ValueError(
                f"this discriminator takes (N, 1, {', '.join(map(str, expected))}), got {tuple(x.shape)}: "
                "build it with adaptive=True for other sizes"
            )


class Padded(nn.Module):
    """A network of logits behind the segmenter's interface: any size in, probabilities of that size out.

    The volume is padded by its border to multiples of 16, which four halvings need, and cut back. Autocast is
    off inside: where maps are two voxels deep, as they are below four halvings, torch 2.13's convolutions in
    bf16 on a CPU give a NaN gradient now and then.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        check_volume(x, (1, 1, 1), "this network")
        depth, height, width = x.shape[2:]
        after = [(0, -n % 16) for n in (width, height, depth)]
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            padded = F.pad(full_precision(x), [n for pair in after for n in pair], mode="replicate")
            return torch.sigmoid(self.net(padded)[:, :, :depth, :height, :width])


def volume_segmenter(name: str = "gasnet", width: int | None = None) -> nn.Module:
    """GASNet's segmenter, or a baseline from MONAI with the same interface.

    Parameters
    ----------
    name : str
        "gasnet"; "unet3d", the 3-D U-Net (Cicek et al., MICCAI 2016); "vnet" (Milletari et al., 3DV 2016).
    width : int, optional
        Channels of the first level: 20 and 32 where not given. V-Net's are always 16.

    Returns
    -------
    nn.Module
        (N, 1, D, H, W) in, probabilities (float32) of that shape out.

    Raises
    ------
    ValueError
        An unknown name, or a width for V-Net.
    """
    if name == "gasnet":
        return Segmenter(width or 20)
    if name == "unet3d":
        from monai.networks.nets import BasicUNet  # here: the papers' networks work without MONAI

        w = width or 32
        return Padded(BasicUNet(3, 1, 1, features=(w, w, 2 * w, 4 * w, 8 * w, w)))
    if name == "vnet":
        from monai.networks.nets import VNet

        if width is not None:
            raise ValueError(f"width={width}: V-Net has 16 channels; leave the width out")
        return Padded(VNet(3, 1, 1))
    raise ValueError(f"unknown network {name!r}: choose 'gasnet', 'unet3d' or 'vnet'")
