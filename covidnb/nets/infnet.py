"""Inf-Net (Fan et al., IEEE TMI 2020): parallel partial decoder, edge guidance, reverse attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covidnb.nets.backbones import backbone as build_backbone


class InfNetOutput(NamedTuple):
    """Logits (N, 1, H, W) at the input's size; None where a network has no such output."""

    global_map: Tensor | None
    side4: Tensor | None
    side3: Tensor | None
    side2: Tensor | None
    edge: Tensor | None

    @property
    def prediction(self) -> Tensor:
        """The finest map there is: S_2, or the global map of a network that ends with it."""
        return self.global_map if self.side2 is None else self.side2


def resize(x: Tensor, size, align_corners: bool = False) -> Tensor:
    """Resize bilinearly to `size` = (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class ConvNorm(nn.Module):
    """Bias-free convolution and batch norm; no activation (the released code declares one, never used)."""

    def __init__(self, inputs: int, outputs: int, kernel, dilation: int = 1):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(dilation * (k // 2) for k in kernel)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class ReceptiveFieldBlock(nn.Module):
    """RFB: four branches, three of them dilated by 3, 5 and 7, that bring a feature map to `channel`s."""

    def __init__(self, inputs: int, channel: int):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(ConvNorm(inputs, channel, 1))])
        for k in (3, 5, 7):
            self.branches.append(
                nn.Sequential(
                    ConvNorm(inputs, channel, 1),
                    ConvNorm(channel, channel, (1, k)),
                    ConvNorm(channel, channel, (k, 1)),
                    ConvNorm(channel, channel, 3, dilation=k),
                )
            )
        self.concat = ConvNorm(4 * channel, channel, 3)
        self.shortcut = ConvNorm(inputs, channel, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.concat(torch.cat([branch(x) for branch in self.branches], dim=1))
        return F.relu(joined + self.shortcut(x))


class PartialDecoder(nn.Module):
    """Parallel partial decoder: three high-level maps in, the coarse global map S_g at f2's size out."""

    def __init__(self, channel: int):
        super().__init__()
        self.up1, self.up2, self.up3, self.up4 = (ConvNorm(channel, channel, 3) for _ in range(4))
        self.up5 = ConvNorm(2 * channel, 2 * channel, 3)
        self.concat2 = ConvNorm(2 * channel, 2 * channel, 3)
        self.concat3 = ConvNorm(3 * channel, 3 * channel, 3)
        self.fuse = ConvNorm(3 * channel, 3 * channel, 3)
        self.head = nn.Conv2d(3 * channel, 1, 1)

    def forward(self, f2: Tensor, f3: Tensor, f4: Tensor) -> Tensor:
        def double(x: Tensor) -> Tensor:
            return resize(x, (2 * x.shape[-2], 2 * x.shape[-1]), align_corners=True)

        up4 = double(f4)
        f3_1 = self.up1(up4) * f3
        f2_1 = self.up2(double(up4)) * self.up3(double(f3)) * f2
        f3_2 = self.concat2(torch.cat([f3_1, self.up4(up4)], dim=1))
        f2_2 = self.concat3(torch.cat([f2_1, self.up5(double(f3_2))], dim=1))
        return self.head(self.fuse(f2_2))


class EdgeGuidance(nn.Module):
    """Low-level features to an edge guidance of 64 channels, and from it to the edge map."""

    def __init__(self, inputs: int):
        super().__init__()
        self.features = nn.Sequential(ConvNorm(inputs, 64, 1), ConvNorm(64, 64, 3), ConvNorm(64, 64, 3))
        self.head = ConvNorm(64, 1, 3)

    def forward(self, f1: Tensor) -> tuple[Tensor, Tensor]:
        guidance = self.features(f1)
        return guidance, self.head(guidance)


class ReverseAttention(nn.Module):
    """Refine a coarse map where it said "not lesion": A = 1 - sigmoid(coarse) weighs the features.

    A has one channel and the 1x1 projection no bias, so A * project(f) = project(A * f): attending after
    the projection is the same function with a fraction of the multiplications.
    Without `reverse` the features are taken as they are (A = 1); without `guided` no edge guidance joins.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        layers: int,
        kernel: int,
        head_kernel: int,
        *,
        guided: bool = True,
        reverse: bool = True,
    ):
        super().__init__()
        self.reverse = reverse
        self.project = ConvNorm(inputs, width, 1)
        widths = [width + 64 * guided] + [width] * (layers - 1)
        self.refine = nn.ModuleList(ConvNorm(w, width, kernel) for w in widths)
        self.head = ConvNorm(width, 1, head_kernel)

    def forward(self, features: Tensor, guidance: Tensor | None, coarse: Tensor) -> Tensor:
        size = features.shape[-2:]
        coarse = resize(coarse, size)
        x = self.project.conv(features)
        if self.reverse:
            x = (1 - torch.sigmoid(coarse)) * x
        x = self.project.bn(x)
        if guidance is not None:
            x = torch.cat([x, resize(guidance, size)], dim=1)
        for layer in self.refine:
            x = F.relu(layer(x))
        return self.head(x) + coarse


class InfNet(nn.Module):
    """Inf-Net: where the lesions are, coarse to fine.

    Parameters
    ----------
    backbone : str
        A name of `covidnb.nets.backbones.BACKBONES`; the paper's default is Res2Net-50.
    pretrained : bool
        Start the backbone from its ImageNet weights.
    channel : int
        Width of the receptive field blocks and the partial decoder.
    edge : bool
        Learn the lesions' outline from f1 and let it guide the refinement.
    reverse : bool
        Refine where the coarser map said "not lesion". With neither, the global map is the prediction.
    """

    def __init__(
        self,
        backbone: str = "res2net50",
        pretrained: bool = False,
        channel: int = 32,
        *,
        edge: bool = True,
        reverse: bool = True,
    ):
        super().__init__()
        self.backbone = build_backbone(backbone, pretrained)
        c1, c2, c3, c4 = self.backbone.channels
        self.rfb2, self.rfb3, self.rfb4 = (ReceptiveFieldBlock(c, channel) for c in (c2, c3, c4))
        self.decoder = PartialDecoder(channel)
        self.edge = EdgeGuidance(c1) if edge else None
        parts = {"guided": edge, "reverse": reverse}
        self.refines = edge or reverse
        if self.refines:
            self.reverse4 = ReverseAttention(c4, 256, layers=3, kernel=5, head_kernel=1, **parts)
            self.reverse3 = ReverseAttention(c3, 64, layers=2, kernel=3, head_kernel=3, **parts)
            self.reverse2 = ReverseAttention(c2, 64, layers=2, kernel=3, head_kernel=3, **parts)

    def forward(self, x: Tensor) -> InfNetOutput:
        """Segment a batch.

        Parameters
        ----------
        x : Tensor
            (N, 3, H, W), ImageNet-normalised; H and W multiples of 32.

        Returns
        -------
        InfNetOutput
            Five maps of logits, (N, 1, H, W) each.

        Raises
        ------
        ValueError
            For another number of channels or a size that 32 does not divide.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(
                f"Inf-Net takes (N, 3, H, W) with H and W multiples of 32, got {tuple(x.shape)}: "
                "resize the slice first"
            )
        f1, f2, f3, f4 = self.backbone(x)
        guidance, edge = self.edge(f1) if self.edge else (None, None)
        maps = [self.decoder(self.rfb2(f2), self.rfb3(f3), self.rfb4(f4)), None, None, None]
        if self.refines:
            maps[1] = self.reverse4(f4, guidance, maps[0])
            maps[2] = self.reverse3(f3, guidance, maps[1])
            maps[3] = self.reverse2(f2, guidance, maps[2])
        size = x.shape[-2:]
        return InfNetOutput(*(None if m is None else resize(m, size) for m in (*maps, edge)))
