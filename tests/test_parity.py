"""Our networks and losses against numbers from the authors' own programs (tests/fixtures/parity)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from covidnb.losses import infnet_loss
from covidnb.nets import InfNet, MultiClassUNet, load_official
from covidnb.nets.checkpoints import _infnet_entry

pytestmark = pytest.mark.parity
FIXTURES = Path(__file__).parent / "fixtures" / "parity"


def normal(name, shape):
    seed = zlib.crc32(name.encode()) % 2**32
    return np.random.RandomState(seed).standard_normal(shape)


def regenerate(name, shape):
    """The value of one state-dict entry by the rules of the fixtures' README."""
    n = normal(name, shape)
    if name.endswith("num_batches_tracked"):
        value = np.zeros(shape)
    elif name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(n)
    elif name.endswith("running_mean"):
        value = 0.1 * n
    elif len(shape) >= 2:
        value = n * np.sqrt(1 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * n
    elif name.endswith(("weight_u", "weight_v")):
        value = n / np.linalg.norm(n)
    else:
        value = 0.1 * n
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@pytest.fixture(scope="module")
def described():
    return json.loads((FIXTURES / "infnet.json").read_text())


@pytest.fixture(scope="module")
def numbers():
    with np.load(FIXTURES / "infnet.npz") as stored:
        return {name: stored[name] for name in stored.files}


def official_weights(described, network):
    return {k: regenerate(k, s) for k, s in described[network]["state_dict"].items()}


@pytest.fixture(scope="module")
def weights(described):
    return official_weights(described, "infnet_res2net50")


@pytest.fixture
def net(weights):
    net = InfNet("res2net50")
    load_official(net, weights)
    return net


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


CLASSIFIER = 2048 * 1000 + 1000  # ImageNet's, carried along unused
SECOND_TAIL = sum(9 * a * b + b for a, b in ((256, 512), *[(512, 512)] * 5))  # VGG's, likewise
UNUSED = {
    "res2net50": (["resnet.fc.weight", "resnet.fc.bias"], CLASSIFIER),
    "resnet50": ([], 0),
    "vgg16": (
        [
            f"vgg.conv{stage}_2.conv{stage}_{k}_2.{entry}"
            for stage in (4, 5)
            for k in (1, 2, 3)
            for entry in ("weight", "bias")
        ],
        SECOND_TAIL,
    ),
}


@pytest.mark.parametrize("backbone", UNUSED)
def test_infnet_outputs_and_parameter_count(described, numbers, backbone):
    network = f"infnet_{backbone}"
    net = InfNet(backbone)
    unused, unused_parameters = UNUSED[backbone]
    dropped = load_official(net, official_weights(described, network))
    assert sorted(dropped) == sorted(unused)
    ours = sum(p.numel() for p in net.parameters())
    assert ours + unused_parameters == described[network]["parameters"]
    x = torch.from_numpy(normal("x2d", (1, 3, 128, 128)).astype(np.float32))
    with torch.no_grad():
        out = net.eval()(x)
    for k, values in enumerate(out):
        assert relative(values, numbers[f"{network}.out{k}"]) < 1e-4


@pytest.mark.parametrize("official", [False, True], ids=["paper", "official"])
def test_infnet_losses(net, numbers, official):
    x = torch.from_numpy(normal("train_x", (2, 3, 128, 128)).astype(np.float32))
    mask, edge = (torch.from_numpy(numbers[f"infnet_train.{k}"]).float() for k in ("gt", "edge"))
    with torch.no_grad():
        loss = infnet_loss(net.train()(x), mask, edge, official=official)
    ours = [float(v) for v in (loss.edge, loss.side2, loss.side3, loss.side4, loss.global_map)]
    key = "official" if official else "paper"
    assert relative(ours, numbers[f"infnet_train.{key}.losses_edge_s2_s3_s4_s5"]) < 1e-4


def gradient_norms(weights, numbers, names, dtype):
    net = InfNet("res2net50")
    load_official(net, weights)
    net = net.to(dtype).train()
    x = torch.from_numpy(normal("train_x", (2, 3, 128, 128)).astype(np.float32)).to(dtype)
    mask, edge = (torch.from_numpy(numbers[f"infnet_train.{k}"]).to(dtype) for k in ("gt", "edge"))
    infnet_loss(net(x), mask, edge).total.backward()
    # the translation that loads the authors' weights tells which of our gradients is which
    grads = {name: p.grad for name, p in net.named_parameters()}
    return np.array([float(grads[_infnet_entry(name)].norm()) for name in names])


def test_infnet_gradient_norms(described, weights, numbers):
    """Equal up to float32's own rounding, which batch norm over two tiny maps makes large here.

    With the authors' order of summation (two threads on the machine that made the fixtures) ours agree to
    1e-4; in another order float32 moves by 2e-3. So float64, which has no such noise, is compared, and may be
    as far from the fixture as float32 is from float64.
    """
    names, theirs = described["infnet_grad_names"], numbers["infnet_train.paper.grad_norms"]
    exact = gradient_norms(weights, numbers, names, torch.float64)
    single = gradient_norms(weights, numbers, names, torch.float32)
    noise = relative(single, exact)
    assert noise < 1e-2
    assert relative(exact, theirs) < 1e-4 + 2 * noise


def test_multiclass_unet_outputs_and_parameter_count():
    described = json.loads((FIXTURES / "multiclass_unet.json").read_text())
    net = MultiClassUNet()
    assert load_official(net, official_weights(described, "multiclass_unet")) == []
    assert (
        sum(p.numel() for p in net.parameters()) == described["multiclass_unet"]["parameters"] == 17_269_251
    )
    x = torch.from_numpy(normal("x6", (1, 6, 128, 128)).astype(np.float32))
    with torch.no_grad(), np.load(FIXTURES / "multiclass_unet.npz") as theirs:
        assert relative(net.eval()(x), theirs["multiclass_unet.out0"]) < 1e-4


def test_load_official_names_the_faults(weights):
    weights = dict(weights)
    del weights["ParDec.conv5.bias"]
    weights["ra2_conv4.conv.weight"] = torch.zeros(1, 64, 1, 1)
    weights["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        load_official(InfNet("res2net50"), weights)
    message = str(caught.value)
    assert "missing: decoder.head.bias" in message
    assert "ra2_conv4.conv.weight is (1, 64, 1, 1), expected (1, 64, 3, 3)" in message
    assert "unknown: extra.weight" in message
