"""The losses against their plain formulations, and what they reward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from covidnb.losses import boundary_weight, infnet_loss, structure_loss
from covidnb.nets import InfNetOutput

sizes = st.integers(1, 70)


def disc(side=96, radius=20):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((y - side / 2) ** 2 + (x - side / 2) ** 2 < radius**2).float()[None, None]


@settings(deadline=None, max_examples=20)
@given(height=sizes, width=sizes, seed=st.integers(0, 99))
def test_boundary_weight_equals_one_square_pooling(height, width, seed):
    mask = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(seed))
    plain = 1 + 5 * (F.avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
    assert torch.allclose(boundary_weight(mask), plain, atol=1e-5)


def test_weight_is_highest_at_the_boundary():
    weight = boundary_weight(disc())[0, 0]
    inside, rim, far = weight[48, 48], weight[48, 48 - 19], weight[48, 2]
    assert rim > inside and rim > far and weight.min() >= 1 and weight.max() <= 6


def test_only_the_paper_weighs_the_cross_entropy():
    """An error at the boundary costs more than one far from it as written, the same as released."""
    mask, logits = disc(), 8 * (2 * disc() - 1)
    rim, far = logits.clone(), logits.clone()
    rim[..., 48, 29:31] = -8  # two lesion pixels at the rim missed
    far[..., 4, 4:6] = 8  # two pixels of ground far away called lesion

    def bce_part(x, official):
        iou = structure_loss(x, mask, official) - structure_loss(logits, mask, official)
        p, w = torch.sigmoid(x), boundary_weight(mask)
        inter, total = (w * p * mask).sum(), (w * (p + mask)).sum()
        sharp = torch.sigmoid(logits)
        inter0, total0 = (w * sharp * mask).sum(), (w * (sharp + mask)).sum()
        return iou - ((inter0 + 1) / (total0 - inter0 + 1) - (inter + 1) / (total - inter + 1))

    assert bce_part(rim, False) > 1.5 * bce_part(far, False)
    assert bce_part(rim, True) == pytest.approx(bce_part(far, True).item(), rel=1e-2)


def test_loss_falls_to_zero_at_the_truth_and_gradients_flow():
    mask = disc()
    assert structure_loss(40 * (2 * mask - 1), mask) < 1e-4
    logits = torch.zeros_like(mask).requires_grad_()
    structure_loss(logits, mask).backward()
    assert (logits.grad[mask > 0] < 0).all() and (logits.grad[mask == 0] > 0).all()


def test_terms_add_up():
    maps = [torch.randn(2, 1, 64, 64) for _ in range(5)]
    mask, edge = (torch.rand(2, 1, 64, 64) > 0.7).float(), (torch.rand(2, 1, 64, 64) > 0.9).float()
    loss = infnet_loss(InfNetOutput(*maps), mask, edge)
    assert loss.total == pytest.approx(sum(loss[1:]).item())
    assert loss.side2 == pytest.approx(structure_loss(maps[3], mask).item())
    assert loss.edge == pytest.approx(F.binary_cross_entropy_with_logits(maps[4], edge).item())


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        structure_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))


def test_bf16_logits_are_summed_in_full_precision():
    mask, logits = disc(), torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert structure_loss(logits, mask).item() == pytest.approx(structure_loss(logits.float(), mask).item())
