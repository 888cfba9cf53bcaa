"""FCN8s and DeepLabV3+: sizes, strides, dilation, parameter counts, and how a prior enters them."""

import pytest
import torch

from covidnb import catalog
from covidnb.nets import DeepLabV3Plus, FCN8s
from covidnb.nets.backbones import BACKBONES, backbone

LITE = "efficientnet_lite0"


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("build", [FCN8s, DeepLabV3Plus])
def test_logits_have_the_size_of_the_input(build, name):
    net = build(name, inputs=6, classes=4).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 6, 64, 96)).shape == (1, 4, 64, 96)


@pytest.mark.parametrize("inputs", [3, 6])
def test_slices_of_any_size_are_taken(inputs):
    for net in (FCN8s(LITE, inputs=inputs), DeepLabV3Plus(LITE, inputs=inputs, output_stride=8)):
        with torch.no_grad():
            assert net.eval()(torch.randn(2, inputs, 70, 51)).shape == (2, 3, 70, 51)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_no_map_is_coarser_than_the_output_stride(name, output_stride):
    plain, dilated = backbone(name), backbone(name, output_stride=output_stride)
    assert dilated.strides == tuple(min(s, output_stride) for s in plain.strides)
    with torch.no_grad():
        features = dilated.eval()(torch.randn(1, 3, 64, 96))
    for f, channels, stride in zip(features, dilated.channels, dilated.strides, strict=True):
        assert f.shape == (1, channels, 64 // stride, 96 // stride)
    assert count(dilated) == count(plain)
    # wherever a stride went, the layers after it read from as far away as before
    last = [m for m in dilated.levels()[-1].modules() if isinstance(m, torch.nn.Conv2d)]
    reach = plain.strides[-1] // dilated.strides[-1]
    assert max(layer.dilation[0] for layer in last) == reach


@pytest.mark.parametrize(("name", "first"), [("resnet50", 0), (LITE, -1)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_only_fills_in_between(name, first, output_stride):
    """The pixels of the strided map are all in the dilated one: a stride, not a layer, was taken away."""
    torch.manual_seed(0)
    plain, dilated = backbone(name).eval(), backbone(name, output_stride=output_stride).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for strided, dense, step in zip(plain(x), dilated(x), plain.strides, strict=True):
            step = max(1, step // output_stride)
            offset = first % step  # a symmetric stride keeps the first pixel, TensorFlow's SAME the last
            assert torch.allclose(dense[..., offset::step, offset::step], strided, rtol=1e-4, atol=1e-4)


def test_parameter_counts():
    resnet = 25_557_032 - 2_049_000  # published, less the classifier
    norm = 2
    top = 2048 * 512 * 9 + norm * 512 + 512 * 3 + 3
    assert count(FCN8s("resnet50")) == resnet + top + (1024 * 3 + 3) + (512 * 3 + 3)

    def separable(a, b):
        return a * 9 + norm * a + a * b + norm * b

    pyramid = 2048 * 256 + norm * 256 + 3 * separable(2048, 256) + (2048 * 256 + 256)
    pyramid += 5 * 256 * 256 + norm * 256
    decoder = 256 * 48 + norm * 48 + separable(304, 256) + separable(256, 256) + 256 * 3 + 3
    for output_stride in (8, 16):
        net = DeepLabV3Plus("resnet50", output_stride=output_stride)
        assert count(net) == resnet + pyramid + decoder
    # the prior costs the kernels of three more channels in the stem
    assert count(DeepLabV3Plus("resnet50", inputs=6)) == resnet + pyramid + decoder + 3 * 64 * 7 * 7


def test_pyramid_doubles_its_rates_at_output_stride_8():
    for output_stride, rates in ((16, [6, 12, 18]), (8, [12, 24, 36])):
        net = DeepLabV3Plus(LITE, output_stride=output_stride)
        depthwise = [branch[0][0] for branch in net.pyramid.branches[1:]]
        assert [layer.dilation[0] for layer in depthwise] == rates


def test_unknown_output_stride_is_refused():
    with pytest.raises(ValueError, match="8 or 16, not 32"):
        DeepLabV3Plus(LITE, output_stride=32)


@pytest.mark.parametrize("build", [FCN8s, DeepLabV3Plus])
def test_every_parameter_learns_from_one_slice(build):
    """Also a batch of one, which batch norm on a 1x1 map would refuse."""
    net = build(LITE, inputs=6)
    net(torch.randn(1, 6, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if name.startswith("score"))


@pytest.mark.parametrize("name", ["resnet50", "res2net50"])
def test_imagenet_network_starts_deaf_to_the_prior(name, tmp_path, monkeypatch):
    """Published weights (a local file in their format) fill the slice's kernels; the prior's are zero."""
    taught = backbone(name).eval()
    published = dict(taught.state_dict()) | {
        "fc.weight": torch.zeros(1000, 2048),
        "fc.bias": torch.zeros(1000),
    }
    torch.save(published, tmp_path / "imagenet.pth")
    monkeypatch.setattr(catalog, "fetch", lambda entry: tmp_path / "imagenet.pth")
    six = backbone(name, pretrained=True, inputs=6).eval()
    image, prior = torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(six(torch.cat([image, prior], 1)), taught(image), strict=True):
            assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    six(torch.cat([image, prior], 1))[-1].sum().backward()
    stem = next(p for p in six.parameters() if p.ndim == 4)
    assert stem.shape[1] == 6 and stem.grad[:, 3:].abs().sum() > 0
