"""DeepLabV3+ (Chen et al., ECCV 2018): dilated features, several receptive fields, a light decoder."""

import torch
from torch import Tensor, nn

from covidnb.nets.backbones import backbone as build_backbone
from covidnb.nets.infnet import resize

RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # of the pyramid's 3x3 convolutions, by output stride


class ConvNormReLU(nn.Sequential):
    """Bias-free convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, groups: int = 1):
        padding = dilation * (kernel // 2)
        conv = nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SeparableConv(nn.Sequential):
    """Atrous separable convolution: a (dilated) 3x3 filter for each channel, then 1x1 across channels."""

    def __init__(self, inputs: int, outputs: int, dilation: int = 1):
        super().__init__(
            ConvNormReLU(inputs, inputs, 3, dilation, groups=inputs), ConvNormReLU(inputs, outputs)
        )


class SpatialPyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and the mean of the map, joined by 1x1.

    The mean has no batch norm, unlike the original's: a batch of one slice would have no variance there.
    """

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList([ConvNormReLU(inputs, outputs)])
        self.branches.extend(SeparableConv(inputs, outputs, rate) for rate in rates)
        self.mean = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, outputs, 1), nn.ReLU(inplace=True)
        )
        self.project = nn.Sequential(ConvNormReLU((len(rates) + 2) * outputs, outputs), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        seen = [branch(x) for branch in self.branches]
        return self.project(torch.cat([*seen, self.mean(x).expand_as(seen[0])], dim=1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ with atrous separable convolutions, on any of our backbones; logits at the input's size.

    Parameters
    ----------
    backbone : str
        A name of `covidnb.nets.backbones.BACKBONES` (the original's are ResNet-101 and Xception).
    pretrained : bool
        Start the backbone from its ImageNet weights.
    inputs : int
        3 for a slice, 6 for a slice and its infection prior; `covidnb.nets.backbones.backbone` says how the
        kernels of the prior start.
    classes : int
        Channels of the output.
    output_stride : int
        8 or 16: the input's size over that of the backbone's last map. At 8 the map is four times as large,
        and the pyramid's rates are doubled.

    Raises
    ------
    ValueError
        For another output stride.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        pretrained: bool = False,
        inputs: int = 3,
        classes: int = 3,
        output_stride: int = 16,
    ):
        super().__init__()
        if output_stride not in RATES:
            raise ValueError(f"DeepLabV3+ has output stride 8 or 16, not {output_stride}")
        self.backbone = build_backbone(backbone, pretrained, inputs, output_stride)
        self.low_level = self.backbone.strides.index(4)
        self.pyramid = SpatialPyramid(self.backbone.channels[-1], 256, RATES[output_stride])
        self.reduce = ConvNormReLU(self.backbone.channels[self.low_level], 48)
        self.decoder = nn.Sequential(SeparableConv(256 + 48, 256), SeparableConv(256, 256))
        self.head = nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Label a batch (N, inputs, H, W), ImageNet-normalised: logits (N, classes, H, W)."""
        features = self.backbone(x)
        low = self.reduce(features[self.low_level])
        high = resize(self.pyramid(features[-1]), low.shape[-2:])
        return resize(self.head(self.decoder(torch.cat([high, low], dim=1))), x.shape[-2:])
