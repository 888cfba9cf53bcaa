"""The baselines: shapes, sizes, refusals."""

import pytest
import torch

from covidnb.nets import MultiClassUNet, UNet, UNetPlusPlus


@pytest.mark.parametrize(
    ("build", "inputs", "classes"), [(UNet, 3, 1), (UNetPlusPlus, 3, 1), (MultiClassUNet, 6, 3)]
)
def test_logits_have_the_size_of_the_input(build, inputs, classes):
    net = build().eval()
    with torch.no_grad():
        assert net(torch.randn(1, inputs, 48, 64)).shape == (1, classes, 48, 64)
    with pytest.raises(ValueError, match="multiples of 16"):
        net(torch.randn(1, inputs, 50, 64))


def test_every_parameter_of_unetplusplus_is_used():
    net = UNetPlusPlus(width=4)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
