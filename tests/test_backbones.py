"""Feature maps of the backbones, and ImageNet weights from the package index."""

import pytest
import torch

from covidnb.nets import InfNet
from covidnb.nets.backbones import BACKBONES, EfficientNetLite0, _lite_name, backbone


@pytest.mark.parametrize("name", BACKBONES)
def test_feature_maps_have_the_promised_channels_and_strides(name):
    net = backbone(name).eval()
    with torch.no_grad():
        features = net(torch.randn(1, 3, 64, 96))
    for f, channels, stride in zip(features, net.channels, net.strides, strict=True):
        assert f.shape == (1, channels, 64 // stride, 96 // stride)


def test_lite0_has_the_published_size():
    # 4.652 M with the classifier's 1280 x 320 head, norm and 1000 classes, which a segmenter does not need
    head = 1280 * 320 + 2 * 1280 + 1280 * 1000 + 1000
    assert sum(p.numel() for p in EfficientNetLite0().parameters()) + head == 4_652_008


def test_unknown_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match="'resnet18' is unknown: choose one of res2net50"):
        backbone("resnet18")


def test_wrong_input_sizes_are_refused():
    net = InfNet("efficientnet_lite0")
    for shape in [(1, 3, 100, 96), (1, 1, 96, 96), (3, 96, 96)]:
        with pytest.raises(ValueError, match="multiples of 32"):
            net(torch.zeros(shape))


def test_published_entries_all_find_a_place():
    ours = set(EfficientNetLite0().state_dict())
    assert _lite_name("_fc.weight") is None and _lite_name("_conv_head.weight") is None
    assert _lite_name("_blocks.3._depthwise_conv.weight") in ours


@pytest.mark.network
def test_imagenet_weights_give_the_published_features():
    """Mean and deviation of the deepest map on a fixed input, as the weights' own package computes them."""
    net = backbone("efficientnet_lite0", pretrained=True).eval()
    x = torch.linspace(-2, 2, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.no_grad():
        f4 = net(x)[-1]
    assert f4.mean().item() == pytest.approx(-0.0287564, rel=1e-3)
    assert f4.std().item() == pytest.approx(1.6436746, rel=1e-3)
