"""GASNet's networks and losses against numbers from the authors' own programs (tests/fixtures/parity)."""

import json

import numpy as np
import pytest
import torch
from test_parity import FIXTURES, normal, official_weights, relative

from covidnb.losses import balanced_focal_loss, focal_loss
from covidnb.nets import Discriminator, Generator, Segmenter, load_official

pytestmark = pytest.mark.parity

NETWORKS = {"segmenter": Segmenter, "generator": Generator, "discriminator": Discriminator}
# declared by the authors and never used: the fourth level; side outputs; a last block and two heads
UNUSED = {
    "segmenter": ("max_cov4", "cov4", "up_cov3", "de_cov3"),
    "generator": ("out_4", "out_3", "out_2"),
    "discriminator": ("cov13", "out_conv", "flat_conv2"),
}
TRAINED = {"segmenter": 2_001_501, "generator": 10_565_219, "discriminator": 14_313_028}


@pytest.fixture(scope="module")
def described():
    return json.loads((FIXTURES / "gasnet.json").read_text())


@pytest.fixture(scope="module")
def numbers():
    with np.load(FIXTURES / "gasnet.npz") as stored:
        return {name: stored[name] for name in stored.files}


def loaded(described, name):
    net = NETWORKS[name]()
    dropped = load_official(net, official_weights(described, f"gasnet_{name}"))
    return net.eval(), dropped


def volume(name, *shape):
    return torch.from_numpy(normal(name, (1, 1, *shape)).astype(np.float32))


@pytest.mark.parametrize("name", NETWORKS)
def test_entries_and_parameter_counts(described, name):
    entries = described[f"gasnet_{name}"]["state_dict"]
    net, dropped = loaded(described, name)
    assert sorted(dropped) == sorted(k for k in entries if k.split(".")[0] in UNUSED[name])
    unused = sum(np.prod(entries[k], dtype=int) for k in dropped if not k.endswith(("_u", "_v")))
    ours = sum(p.numel() for p in net.parameters())
    assert ours + unused == described[f"gasnet_{name}"]["parameters"] == TRAINED[name]


@torch.no_grad()
def test_segmenter(described, numbers):
    out = loaded(described, "segmenter")[0](volume("x3d", 16, 64, 64))
    assert relative(out, numbers["gasnet_segmenter.out0"]) < 1e-4


@torch.no_grad()
def test_generator(described, numbers):
    out = loaded(described, "generator")[0](volume("x3d_g", 32, 96, 96))
    assert relative(out[:, :, ::4], numbers["gasnet_generator.out0"]) < 1e-4  # every fourth slice is stored


@pytest.mark.parametrize("adaptive", [False, True])
@torch.no_grad()
def test_discriminator(described, numbers, adaptive):
    """Pooling changes nothing at the size that the authors' discriminator takes."""
    net = loaded(described, "discriminator")[0]
    net.adaptive = adaptive
    logit, attention = net(volume("x3d_d", 32, 160, 160))
    assert relative(logit, numbers["gasnet_discriminator.out0"]) < 1e-4
    assert relative(attention, numbers["gasnet_discriminator.out1"]) < 1e-4


def test_faults_are_named(described):
    weights = official_weights(described, "gasnet_discriminator")
    del weights["cov5.0.weight_u"]
    weights["layer.weight"] = torch.zeros(1, 512)
    weights["cov7.0.bias"] = torch.zeros(64)
    with pytest.raises(ValueError) as caught:
        load_official(Discriminator(), weights)
    message = str(caught.value)
    assert "missing: plane.1.0.parametrizations.weight.0._u" in message
    assert "layer.weight is (1, 512), expected (1, 25600)" in message
    assert "unknown: cov7.0.bias" in message


def test_focal_losses(numbers):
    p = torch.sigmoid(torch.from_numpy(normal("seg_logits", (2, 8, 16, 16)).astype(np.float32)))
    with_ignored = torch.from_numpy(numbers["gasnet_loss.t2"])
    labels = torch.from_numpy((normal("seg_t", (2, 8, 16, 16)) > 0.8).astype(np.float32))
    assert (with_ignored == 2).any()
    assert relative(focal_loss(p, with_ignored), numbers["gasnet_loss.focal_ignore"]) < 1e-5
    assert relative(balanced_focal_loss(p, labels), numbers["gasnet_loss.balanced_focal"]) < 1e-5
