"""GASNet's losses, term by term: plain formulas, what they reward, where their gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from covidnb.losses import (
    GASNET_WEIGHTS,
    SILENCES,
    Silence,
    adversarial_loss,
    balanced_focal_loss,
    compose,
    discriminator_loss,
    focal_loss,
    generated_to_d_loss,
    healthy_loss,
    labelled_loss,
    multiple_instance_loss,
    original_to_d_loss,
    paste_loss,
    paste_target,
    reconstruction_loss,
    silenced,
)

SHAPE = (2, 1, 3, 4, 5)
seeds = st.integers(0, 999)


def uniform(seed, low=0.0, high=1.0, shape=SHAPE, dtype=torch.float64):
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return low + (high - low) * drawn


def labels(seed, classes=2):
    drawn = torch.randint(classes, SHAPE, generator=torch.Generator().manual_seed(seed))
    drawn.flatten()[:2] = torch.tensor([0, 1])  # both are there
    return drawn


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_focal_loss_voxel_by_voxel(seed):
    p, target = uniform(seed, 0.01, 0.99), labels(seed, classes=3)
    total, counted = 0.0, 0
    for q, t in zip(p.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t == 1:
            total -= math.log(q) * (2 - q) ** 2
        elif t == 0:
            total -= math.log(1 - q) * (1 + q) ** 2
        counted += t < 2
    assert focal_loss(p, target).item() == pytest.approx(total / counted, rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_balanced_focal_loss_voxel_by_voxel(seed):
    p, target = uniform(seed, 0.01, 0.99), labels(seed)
    weight = (target == 0).sum().item() / ((target == 1).sum().item() + 1)
    total = 0.0
    for q, t in zip(p.flatten().tolist(), target.flatten().tolist(), strict=True):
        total -= weight * math.log(q) * (1 - q) ** 2 if t else math.log(1 - q) * q**2
    assert balanced_focal_loss(p, target).item() == pytest.approx(2 * total / p.numel(), rel=1e-6)


@pytest.mark.parametrize("loss", [focal_loss, balanced_focal_loss, labelled_loss])
def test_focal_gradients(loss):
    p, target = uniform(3, 0.05, 0.95).requires_grad_(), labels(3)
    assert gradcheck(lambda q: loss(q, target), (p,))
    (slope,) = torch.autograd.grad(loss(p, target), p)
    assert (slope[target == 1] < 0).all() and (slope[target == 0] > 0).all()
    exact = target.double()
    assert loss(exact, target) < 1e-8 < loss(0.5 * torch.ones_like(p), target)


@pytest.mark.parametrize("loss", [focal_loss, balanced_focal_loss])
def test_certain_and_wrong_is_costly_but_finite(loss):
    """Also in bf16 from a network without its own care for precision."""
    p = torch.tensor([1.0, 0.0]).bfloat16().requires_grad_()
    value = loss(p, torch.tensor([0, 1]))
    value.backward()
    assert 5 < value.item() < 200 and value.dtype == torch.float32 and p.grad.isfinite().all()
    with pytest.raises(ValueError, match="differ in shape"):
        loss(uniform(0), torch.zeros(2, 3, 4, 5))


def test_ignored_voxels_teach_nothing():
    p, target = uniform(1, 0.1, 0.9).requires_grad_(), labels(1, classes=3)
    (slope,) = torch.autograd.grad(focal_loss(p, target), p)
    assert (slope[target == 2] == 0).all() and (slope[target < 2] != 0).all()
    nothing_counts = focal_loss(p, torch.full(SHAPE, 2))
    assert nothing_counts.item() == 0


def test_the_balance_outweighs_a_large_background():
    """Calling everything background is cheap by the focal loss and dear by the balanced one."""
    target = torch.zeros(1, 1, 10, 10, 10)
    target[..., :2, :2, :2] = 1  # 8 of 1000
    background, half = torch.full_like(target, 0.01), torch.full_like(target, 0.5)
    assert focal_loss(background, target) < focal_loss(half, target)
    assert balanced_focal_loss(background, target) > balanced_focal_loss(half, target)


def test_compose_replaces_the_mask_within_the_lungs():
    x, g = uniform(0, -1, 1), uniform(1, -1, 1)
    mask, lungs = labels(2).double(), labels(3).double()
    inside = (mask * lungs).bool()
    composed = compose(x, g, mask, lungs)
    assert torch.equal(composed[inside], g[inside]) and torch.equal(composed[~inside], x[~inside])


def test_pasted_lesions_are_recognised_or_not():
    m = torch.tensor([0.0, 0.2, 0.21, 0.8, 0.81, 1.0])
    assert paste_target(m, torch.ones(6)).tolist() == [0, 0, 2, 2, 1, 1]
    assert paste_target(m, torch.zeros(6)).tolist() == [0] * 6
    found, missed = torch.tensor([0.05, 0.1, 0.9, 0.1, 0.9, 0.95]), torch.full((6,), 0.05)
    assert paste_loss(found, m, torch.ones(6)) < 0.2 < paste_loss(missed, m, torch.ones(6))


def test_paste_loss_teaches_the_second_look_only():
    """The mask that was pasted is the truth here: no gradient reaches it."""
    first, second = (uniform(k, 0.01, 0.99).requires_grad_() for k in (0, 1))
    paste_loss(second, first, torch.ones(SHAPE)).backward()
    assert first.grad is None and second.grad is not None


def test_multiple_instance_loss_looks_at_the_largest_voxel_of_each_volume():
    p, lungs = uniform(5, 0.1, 0.6).requires_grad_(), torch.ones(SHAPE)
    with torch.no_grad():
        p[0, 0, 1, 1, 1], p[1, 0, 2, 2, 2], p[0, 0, 0, 0, 0] = 0.8, 0.7, 0.99
    lungs[0, 0, 0, 0, 0] = 0  # the most certain voxel is outside the lungs
    loss = multiple_instance_loss(p, lungs)
    assert loss.item() == pytest.approx(-(math.log(0.8) + math.log(0.7)) / 2)
    loss.backward()
    assert p.grad.nonzero().tolist() == [[0, 0, 1, 1, 1], [1, 0, 2, 2, 2]]


def test_a_second_sigmoid_keeps_the_released_loss_from_zero():
    found = torch.ones(SHAPE)
    assert multiple_instance_loss(found, found).item() == pytest.approx(0, abs=1e-6)
    released = multiple_instance_loss(found, found, official=True)
    assert released.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1))))


def test_reconstruction_and_healthy():
    x, g = uniform(0, -1, 1), uniform(1, -1, 1)
    assert reconstruction_loss(g, x).item() == pytest.approx((g - x).abs().mean().item())
    p = uniform(2)
    assert healthy_loss(p).item() == pytest.approx(focal_loss(p, torch.zeros(SHAPE)).item())
    assert healthy_loss(torch.zeros(SHAPE)) < 1e-8


def test_the_game_pulls_both_ways():
    """What D learns to call diseased, S and G learn to make it call healthy."""
    logit = torch.tensor([[0.3], [-1.2]], requires_grad=True)
    healthy = torch.tensor([[0.1], [0.2]])
    theirs = torch.autograd.grad(adversarial_loss(logit), logit)[0]
    its_own = torch.autograd.grad(discriminator_loss(logit, healthy), logit)[0]
    assert (theirs > 0).all() and (its_own < 0).all()
    expected = F.softplus(-logit).mean() + F.softplus(healthy).mean()
    assert discriminator_loss(logit, healthy).item() == pytest.approx(expected.item())
    assert adversarial_loss(logit).item() == pytest.approx(F.softplus(logit).mean().item())


def test_generated_volumes_count_less_and_less_for_d():
    logit = torch.tensor([[0.4]])
    assert generated_to_d_loss(logit).item() == pytest.approx(adversarial_loss(logit).item())
    for progress in (0.0, 0.25, 1.0):
        expected = (1 - progress) * F.softplus(-logit).item()
        ours = generated_to_d_loss(logit, diseased=True, progress=progress)
        assert ours.item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="progress=1.5"):
        generated_to_d_loss(logit, diseased=True, progress=1.5)


def test_silence():
    assert silenced(torch.tensor(0.159), Silence(0.16, 1e-6)).item() == pytest.approx(0.159e-6)
    assert silenced(torch.tensor(0.16), Silence(0.16, 1e-6)).item() == pytest.approx(0.16)
    assert silenced(torch.tensor(0.1), None).item() == pytest.approx(0.1)
    sure, unsure = torch.tensor([[6.0]]), torch.tensor([[1.0]])
    plain = F.softplus(-sure).item()
    assert original_to_d_loss(sure).item() == pytest.approx(plain * 1e-4)
    assert original_to_d_loss(sure, silence=None).item() == pytest.approx(plain)
    assert original_to_d_loss(unsure).item() == pytest.approx(F.softplus(-unsure).item())
    assert set(SILENCES) == {"adversarial", "segmentation", "discriminator", "original_to_d"}


def test_released_weights():
    assert GASNET_WEIGHTS == {
        "adversarial": 1,
        "generated_to_d": 1,
        "original_to_d": 1,
        "reconstruction": 100,
        "paste": 100,
        "multiple_instance": 1000,
        "healthy": 100,
        "labelled": 500,
    }
