"""The papers' losses, term by term."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from covidnb.nets.gasnet import full_precision
from covidnb.nets.infnet import InfNetOutput


def boundary_weight(mask: Tensor) -> Tensor:
    """Weigh each pixel by how much it differs from its 31 x 31 surroundings: 1 to 6, high at boundaries.

    w = 1 + 5 |mean31(G) - G|, zeros beyond the border counted in the mean (Fan et al., TMI 2020, after
    F3Net). A mean over a square is a mean over columns of means over rows: 62 additions instead of 961.

    Parameters
    ----------
    mask : Tensor
        (N, 1, H, W) in [0, 1].
    """
    rows = F.avg_pool2d(mask, (1, 31), stride=1, padding=(0, 15))
    return 1 + 5 * (F.avg_pool2d(rows, (31, 1), stride=1, padding=(15, 0)) - mask).abs()


def structure_loss(
    logits: Tensor, mask: Tensor, official: bool = False, weight: Tensor | None = None
) -> Tensor:
    """Weighted BCE plus weighted IoU, mean over the batch (Fan et al., TMI 2020, the segmentation loss).

    Parameters
    ----------
    logits, mask : Tensor
        (N, 1, H, W); the mask in [0, 1].
    official : bool
        As the released code computes it: its `reduce='none'` is a true value, so the BCE is averaged before
        the weights could reach it.
    weight : Tensor, optional
        `boundary_weight(mask)` where the caller has it already (four side outputs share one mask).
    """
    if logits.shape != mask.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and mask {tuple(mask.shape)} differ in shape")
    logits = logits.to(mask.dtype)  # sums over a picture lose their last digits in bf16
    w = boundary_weight(mask) if weight is None else weight
    dims = (1, 2, 3)
    if official:
        bce = F.binary_cross_entropy_with_logits(logits, mask)
    else:
        pixelwise = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        bce = (w * pixelwise).sum(dims) / w.sum(dims)
    p = torch.sigmoid(logits)
    inter = (w * p * mask).sum(dims)
    union = (w * (p + mask)).sum(dims) - inter
    return (bce + 1 - (inter + 1) / (union + 1)).mean()


class InfNetLoss(NamedTuple):
    """The five terms and their sum, scalars; None for an output that the network does not have."""

    total: Tensor
    global_map: Tensor | None
    side4: Tensor | None
    side3: Tensor | None
    side2: Tensor | None
    edge: Tensor | None


def infnet_loss(out: InfNetOutput, mask: Tensor, edge: Tensor, official: bool = False) -> InfNetLoss:
    """Deep supervision of Inf-Net: BCE on the edge, structure loss on S_g, S_4, S_3, S_2 (TMI 2020).

    Parameters
    ----------
    out : InfNetOutput
        The network's logits.
    mask, edge : Tensor
        (N, 1, H, W) in [0, 1]: the lesions, and their outlines.
    official : bool
        See `structure_loss`.
    """
    weight = boundary_weight(mask)
    terms = [None if m is None else structure_loss(m, mask, official, weight) for m in out[:4]]
    outline = out.edge
    if outline is not None:
        outline = F.binary_cross_entropy_with_logits(outline.to(edge.dtype), edge)
    terms.append(outline)
    return InfNetLoss(sum(term for term in terms if term is not None), *terms)


# ------------------------------------------------------------------------------- GGO and consolidation
#
# Fan et al., TMI 2020, and what we learn with instead. Slices are (N, 3, H, W), one channel a class.


def one_hot(classes: Tensor, official: bool = False) -> Tensor:
    """Class indices as one map a class, float32.

    Parameters
    ----------
    classes : Tensor
        (N, H, W), integers: 0 background, 1 GGO, 2 consolidation.
    official : bool
        As the released code makes it: its index is one too small, so the whole array is shifted by one place
        in memory. GGO lands in channel 0, consolidation in channel 1, background in channel 2 of the pixel
        before, which therefore may have two classes or none.

    Returns
    -------
    Tensor
        (N, 3, H, W).
    """
    hot = F.one_hot(classes, 3)
    if official:
        hot = hot.flatten(1).roll(-1, dims=1).view_as(hot)
    return hot.permute(0, 3, 1, 2).float()


class MultiClassLoss(NamedTuple):
    """The terms and their sum, scalars; `dice` is None for the paper's loss, which has no such term."""

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor | None


def multiclass_bce_loss(logits: Tensor, classes: Tensor, official: bool = False) -> MultiClassLoss:
    """Binary cross-entropy of every class against the rest: the multi-class loss of Fan et al., TMI 2020.

    Parameters
    ----------
    logits : Tensor
        (N, 3, H, W).
    classes, official
        See `one_hot`.
    """
    target = one_hot(classes, official)
    bce = F.binary_cross_entropy_with_logits(logits.float(), target)
    return MultiClassLoss(bce, bce, None)


def multiclass_dice_loss(logits: Tensor, classes: Tensor, weights: Sequence[float]) -> MultiClassLoss:
    """Softmax cross-entropy with class weights plus the soft Dice loss of the lesion classes.

    The Dice term, 1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), is taken slice by slice and class by class,
    as the scores are, so a lesion of few pixels counts as much as a large one.

    Parameters
    ----------
    logits : Tensor
        (N, 3, H, W).
    classes : Tensor
        (N, H, W), see `one_hot`.
    weights : three floats
        Of the pixels of each class in the cross-entropy.
    """
    logits = logits.float()  # sums over a picture lose their last digits in bf16
    pixelwise = F.cross_entropy(logits, classes, reduction="none")
    cross_entropy = (logits.new_tensor(weights)[classes] * pixelwise).mean()
    p, g = (maps[:, 1:] for maps in (logits.softmax(1), one_hot(classes)))
    dims = (2, 3)
    overlap = (2 * (p * g).sum(dims) + 1) / ((p + g).sum(dims) + 1)
    dice = (1 - overlap).mean()
    return MultiClassLoss(cross_entropy + dice, cross_entropy, dice)


# ---------------------------------------------------------------------------------------------- GASNet
#
# Xu et al. 2020, and the authors' code where it says more than the paper. S gives a probability m, l is the
# lung mask, D gives a logit (above 0: diseased). Volumes are (N, 1, D, H, W); every term is a scalar without
# its weight.

# what the released code multiplies each term by
GASNET_WEIGHTS = {
    "adversarial": 1,
    "generated_to_d": 1,
    "original_to_d": 1,
    "reconstruction": 100,
    "paste": 100,
    "multiple_instance": 1000,
    "healthy": 100,
    "labelled": 500,
}

TINY = 1e-9  # added inside logarithms, as released


class Silence(NamedTuple):
    """Where a loss has fallen below `below`, it is multiplied by `scale`: it is won, and stops pulling."""

    below: float
    scale: float


# constants of the released code: of one term, and of the sums that a step of S and G, S or D goes down
SILENCES = {
    "original_to_d": Silence(0.1, 1e-4),
    "adversarial": Silence(0.16, 1e-3),
    "segmentation": Silence(0.064, 1e-2),
    "discriminator": Silence(0.16, 1e-6),
}


def silenced(loss: Tensor, silence: Silence | None) -> Tensor:
    """Scale a loss down once it is small; None leaves it alone."""
    if silence is None:
        return loss
    return torch.where(loss < silence.below, loss * silence.scale, loss)


def _probability(probability: Tensor, target: Tensor) -> Tensor:
    """The probability in float32 at least; refused where its shape is not the target's."""
    if probability.shape != target.shape:
        shapes = f"{tuple(probability.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"probability {shapes} differ in shape")
    return full_precision(probability)


def focal_loss(probability: Tensor, target: Tensor) -> Tensor:
    """GASNet's focal loss where much is unlabelled: -[y log p (2 - p)^2 + (1 - y) log(1 - p) (1 + p)^2].

    Summed over the voxels that count and divided by their number. Unlike the usual focal factors these go
    from 4 for a wrong voxel to 1 for a right one: none is let off.

    Parameters
    ----------
    probability, target : Tensor
        Of one shape; the target 0 or 1, any other value is ignored.
    """
    p = _probability(probability, target)
    ones, zeros = target == 1, target == 0
    lesion = torch.log(p + TINY) * (2 - p) ** 2
    rest = torch.log(1 - p + TINY) * (1 + p) ** 2
    counted = (ones.sum() + zeros.sum()).clamp(min=1)
    return -(ones * lesion + zeros * rest).sum() / counted


def balanced_focal_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Focal loss with the few lesion voxels lifted: -2 mean[w y log p (1 - p)^2 + (1 - y) log(1 - p) p^2].

    w = #zeros / (#ones + 1), counted over the batch.

    Parameters
    ----------
    probability, target : Tensor
        Of one shape; the target 0 or 1.
    """
    p = _probability(probability, target)
    ones, zeros = target == 1, target == 0
    weight = zeros.sum() / (ones.sum() + 1)
    lesion = torch.log(p + TINY) * (1 - p) ** 2
    rest = torch.log(1 - p + TINY) * p**2
    return -2 * (weight * ones * lesion + zeros * rest).mean()


def compose(volume: Tensor, generated: Tensor, mask: Tensor, lungs: Tensor) -> Tensor:
    """The synthetic volume x~ = m l G(x) + (1 - m l) x: lesions replaced by what G made of them.

    With a healthy volume in place of `volume` and a diseased one in place of `generated` it pastes lesions:
    h (1 - m l) + x m l, the input of `paste_loss`; the released code takes the lungs of the healthy volume.
    """
    inside = mask * lungs
    return generated * inside + volume * (1 - inside)


def _judged(logit: Tensor, diseased: bool) -> Tensor:
    """BCE of D's verdict against one label for all volumes of a batch."""
    logit = full_precision(logit)
    return F.softplus(-logit if diseased else logit).mean()


def adversarial_loss(composed: Tensor) -> Tensor:
    """For S and G: D shall call the synthetic volume healthy, BCE(D(x~), 0).

    Not the saturating form of the first GANs: its gradient is largest while D is not fooled.
    """
    return _judged(composed, diseased=False)


def generated_to_d_loss(generated: Tensor, diseased: bool = False, progress: float = 0.0) -> Tensor:
    """`genImgToD`: what G makes of a diseased volume is judged as a whole, not only where S found lesions.

    Parameters
    ----------
    generated : Tensor
        D's logits of G(x).
    diseased : bool
        False for the step of S and G, BCE(D(G(x)), 0); True for D's, BCE(D(G(x)), 1) x (1 - progress).
    progress : float
        Share of the iterations that are over, t / T; it counts for D alone.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress}: the share of the iterations that are over is from 0 to 1")
    loss = _judged(generated, diseased)
    return loss * (1 - progress) if diseased else loss


def original_to_d_loss(original: Tensor, silence: Silence | None = SILENCES["original_to_d"]) -> Tensor:
    """`origImgToD`, for D: the diseased volume as it came is diseased, BCE(D(x), 1)."""
    return silenced(_judged(original, diseased=True), silence)


def discriminator_loss(composed: Tensor, healthy: Tensor) -> Tensor:
    """D's own: the synthetic volume is diseased and the healthy one is not, BCE(D(x~), 1) + BCE(D(h), 0)."""
    return _judged(composed, diseased=True) + _judged(healthy, diseased=False)


def reconstruction_loss(generated: Tensor, healthy: Tensor) -> Tensor:
    """`recons`, for G: nothing is to be healed in a healthy volume, mean |G(h) - h|."""
    return (generated - healthy).abs().mean()


def paste_target(mask: Tensor, lungs: Tensor) -> Tensor:
    """What S shall find of a pasted lesion: 1 where m l > 0.8, 0 where m l <= 0.2, 2 (ignored) between."""
    inside = mask * lungs
    return torch.where(inside > 0.8, 1, torch.where(inside > 0.2, 2, 0))


def paste_loss(found: Tensor, mask: Tensor, lungs: Tensor) -> Tensor:
    """`perception`, for S: a lesion pasted into healthy lungs must be found where it was pasted.

    Parameters
    ----------
    found : Tensor
        S's probability in `compose(healthy, sick, mask, lungs)`, that volume and the mask being detached.
    mask : Tensor
        S's probability in the diseased volume; no gradient goes to it.
    lungs : Tensor
        The mask that the pasting used.
    """
    return focal_loss(found, paste_target(mask.detach(), lungs))


def multiple_instance_loss(probability: Tensor, lungs: Tensor, official: bool = False) -> Tensor:
    """`MIL`, for S: a diseased volume has a lesion somewhere, so the largest m l of each must be 1; BCE.

    Parameters
    ----------
    probability, lungs : Tensor
        (N, 1, D, H, W).
    official : bool
        With the released second sigmoid, as if m were a logit: the loss never falls below 0.313.
    """
    largest = (probability * lungs).flatten(1).amax(1)
    if official:
        return _judged(largest, diseased=True)
    return -torch.log(full_precision(largest) + TINY).mean()


def healthy_loss(probability: Tensor) -> Tensor:
    """For S: nothing is lesion in a healthy volume, the focal loss against 0."""
    return focal_loss(probability, torch.zeros_like(probability))


def labelled_loss(probability: Tensor, lesions: Tensor) -> Tensor:
    """For S: the lesions of the one voxel-labelled volume, the balanced focal loss (0 or 1 in each voxel)."""
    return balanced_focal_loss(probability, lesions)
