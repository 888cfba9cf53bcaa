"""FCN8s (Long, Shelhamer & Darrell, CVPR 2015): the simplest network that labels every pixel."""

import torch.nn.functional as F
from torch import Tensor, nn

from covidnb.nets.backbones import backbone as build_backbone
from covidnb.nets.infnet import ConvNorm, resize


class FCN8s(nn.Module):
    """Scores of each class at strides 32, 16 and 8, added up coarse to fine; logits at the input's size.

    As in the original, the finer scores start at zero, so that learning begins with the coarse ones. Where it
    convolves with VGG's two fully connected layers (119 M parameters, made for ImageNet's 1,000 classes), one
    3x3 convolution of `width` channels stands; where it learns its up-sampling from a bilinear start, ours
    stays bilinear.

    Parameters
    ----------
    backbone : str
        A name of `covidnb.nets.backbones.BACKBONES`; the original's is VGG-16. Its maps are one octave finer
        than the scores; they are pooled, which makes them the original's pool3, pool4 and pool5.
    pretrained : bool
        Start the backbone from its ImageNet weights.
    inputs : int
        3 for a slice, 6 for a slice and its infection prior; `covidnb.nets.backbones.backbone` says how the
        kernels of the prior start.
    classes : int
        Channels of the output.
    width : int
        Channels of the last layer before the scores at stride 32.
    """

    def __init__(
        self,
        backbone: str = "vgg16",
        pretrained: bool = False,
        inputs: int = 3,
        classes: int = 3,
        width: int = 512,
    ):
        super().__init__()
        self.backbone = build_backbone(backbone, pretrained, inputs)
        _, c8, c16, c32 = self.backbone.channels
        self.top = nn.Sequential(ConvNorm(c32, width, 3), nn.ReLU(inplace=True), nn.Dropout2d(0.5))
        self.scores = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in (width, c16, c8))
        for skip in self.scores[1:]:
            nn.init.zeros_(skip.weight)
            nn.init.zeros_(skip.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Label a batch (N, inputs, H, W), ImageNet-normalised: logits (N, classes, H, W)."""
        f8, f16, f32 = (
            F.avg_pool2d(f, wanted // stride)
            for f, stride, wanted in zip(
                self.backbone(x)[1:], self.backbone.strides[1:], (8, 16, 32), strict=True
            )
        )
        fused = None
        for score, f in zip(self.scores, (self.top(f32), f16, f8), strict=True):
            finer = score(f)
            fused = finer if fused is None else finer + resize(fused, finer.shape[-2:])
        return resize(fused, x.shape[-2:])
