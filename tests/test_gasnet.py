"""GASNet's networks: sizes, widths, what their parts are for; the baselines behind the same interface."""

import pytest
import torch

from covidnb.nets import Discriminator, Generator, Segmenter, volume_segmenter


def volume(*shape, batch=1, seed=0):
    return torch.rand(batch, 1, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_small_networks_take_small_volumes():
    x = volume(24, 64, 64, batch=2)
    probability = Segmenter(width=4)(x)
    assert probability.shape == x.shape and probability.min() > 0 and probability.max() < 1
    generated = Generator(width=4, levels=3)(x)
    assert generated.shape == x.shape and generated.abs().max() < 1
    verdict = Discriminator(width=4, levels=3, adaptive=True)(x)
    assert verdict.logit.shape == (2, 1) and verdict.attention.shape == (2, 1, 6, 8, 8)


def test_every_parameter_is_used():
    x = volume(16, 80, 80)
    for net in (Segmenter(4), Generator(4, levels=3), Discriminator(4, levels=3)):
        out = net(x[..., :64, :64] if isinstance(net, Generator) else x)
        sum(o.square().sum() for o in (out if isinstance(out, tuple) else [out])).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("net", "good", "bad", "wanted"),
    [
        (Segmenter(2), (8, 12, 4), (8, 12, 6), r"segmenter.*multiples of \(4, 4, 4\)"),
        (Generator(2), (32, 64, 64), (24, 64, 64), r"generator with 4 levels.*\(16, 32, 32\)"),
        (Discriminator(2, 3), (16, 80, 80), (16, 96, 80), r"\(N, 1, 16, 80, 80\).*adaptive=True"),
    ],
    ids=["segmenter", "generator", "discriminator"],
)
@torch.no_grad()
def test_other_sizes_are_refused(net, good, bad, wanted):
    net(volume(*good))
    for x in (volume(*bad), volume(*good)[:, 0], volume(*good).repeat(1, 2, 1, 1, 1)):
        with pytest.raises(ValueError, match=wanted):
            net(x)


def test_spectral_norm_bounds_the_trunk():
    """After some power iterations no convolution of the trunk stretches any weight direction beyond 1."""
    torch.manual_seed(0)
    net = Discriminator(4, levels=3).train()
    convs = [block[0] for block in (net.stem, *net.plane, *net.down)]
    with torch.no_grad():
        for conv in convs:
            conv.parametrizations.weight.original.mul_(30)
        for _ in range(30):
            net(volume(16, 80, 80))
    for conv in convs:
        largest = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
        assert largest.item() == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_bf16_keeps_probabilities_apart():
    """Under autocast the last sigmoid and tanh are in float32: no probability rounds to 1 before 1 - 1e-6."""
    net = Segmenter(4).eval()
    net.head.bias.fill_(12)
    with torch.autocast("cpu", torch.bfloat16):
        probability, generated = net(volume(8, 16, 16)), Generator(4, levels=2)(volume(8, 16, 16))
    assert probability.dtype == generated.dtype == torch.float32
    assert 0.99 < probability.max() < 1


def test_baselines_are_left_in_float32():
    """Autocast would round their logits to eight bits; and MONAI's U-Net learns NaN in bf16."""
    net = volume_segmenter("unet3d", 4).eval()
    x = volume(16, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    with torch.no_grad():
        torch.testing.assert_close(half, net(x), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["unet3d", "vnet"])
@torch.no_grad()
def test_baselines_take_what_the_segmenter_takes(name):
    net = volume_segmenter(name, width=4 if name == "unet3d" else None).eval()
    x = volume(20, 28, 36)
    probability = net(x)
    assert probability.shape == x.shape and probability.min() > 0 and probability.max() < 1
    whole = volume(16, 32, 32)
    assert torch.equal(net(whole), torch.sigmoid(net.net(whole)))


def test_names_of_networks():
    assert isinstance(volume_segmenter(width=3), Segmenter)
    with pytest.raises(ValueError, match="unet2d.*unet3d"):
        volume_segmenter("unet2d")
    with pytest.raises(ValueError, match="width=8"):
        volume_segmenter("vnet", width=8)
