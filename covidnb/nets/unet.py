"""U-Net and U-Net++: the baselines for infection, and the multi-class network of Semi-Inf-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, middle: int | None = None):
        middle = middle or outputs
        layers: list[nn.Module] = []
        for a, b in ((inputs, middle), (middle, outputs)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        super().__init__(*layers)


def double(x: Tensor) -> Tensor:
    """Up-sample bilinearly by two."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def check_divisible(x: Tensor, by: int, network: str) -> None:
    """Refuse an input whose sides do not halve often enough."""
    if x.ndim != 4 or x.shape[2] % by or x.shape[3] % by:
        raise ValueError(f"{network} takes (N, C, H, W) with H and W multiples of {by}, got {tuple(x.shape)}")


class UNet(nn.Module):
    """U-Net (Ronneberger et al., MICCAI 2015) with bilinear up-sampling; logits at the input's size.

    Parameters
    ----------
    inputs : int
        Channels of the input.
    classes : int
        Channels of the output.
    width : int
        Channels of the first level: then twice, four times, eight times, and eight times again at the bottom.
    """

    def __init__(self, inputs: int = 3, classes: int = 1, width: int = 64):
        super().__init__()
        w = width
        widths = (w, 2 * w, 4 * w, 8 * w, 8 * w)
        self.inc = DoubleConv(inputs, w)
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        # each level up takes what comes from below and its skip; the last one keeps its width
        outs = (4 * w, 2 * w, w, w)
        self.up = nn.ModuleList(
            DoubleConv(2 * skip, out, middle=skip) for skip, out in zip(widths[-2::-1], outs, strict=True)
        )
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_divisible(x, 16, "U-Net")
        skips = [self.inc(x)]
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up in self.up:
            x = up(torch.cat([skips.pop(), double(x)], dim=1))
        return self.head(x)


class MultiClassUNet(UNet):
    """The network that tells ground glass from consolidation: slice and prior in, three classes out.

    17,269,251 parameters (Fan et al., TMI 2020). Input (N, 6, H, W): the slice and its infection prior, three
    channels each; 3 for the slice alone. Output: logits of background, ground-glass opacity, consolidation.
    """

    def __init__(self, inputs: int = 6, width: int = 64):
        super().__init__(inputs, classes=3, width=width)


class UNetPlusPlus(nn.Module):
    """U-Net++ (Zhou et al., DLMIA 2018) without deep supervision: every skip is a row of dense blocks.

    Node x[i][j] sits at depth i and sees all nodes x[i][:j] of its depth and x[i+1][j-1] from below.
    """

    def __init__(self, inputs: int = 3, classes: int = 1, width: int = 32):
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        self.nodes = nn.ModuleDict()
        for i, w in enumerate(widths):
            self.nodes[f"{i}_0"] = DoubleConv(inputs if i == 0 else widths[i - 1], w)
            for j in range(1, 5 - i):
                self.nodes[f"{i}_{j}"] = DoubleConv(j * w + widths[i + 1], w)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_divisible(x, 16, "U-Net++")
        rows: list[list[Tensor]] = []
        for i in range(5):
            x = self.nodes[f"{i}_0"](x if i == 0 else F.max_pool2d(rows[-1][0], 2))
            rows.append([x])
        for j in range(1, 5):
            for i in range(5 - j):
                below = double(rows[i + 1][j - 1])
                rows[i].append(self.nodes[f"{i}_{j}"](torch.cat([*rows[i], below], dim=1)))
        return self.head(rows[0][-1])
