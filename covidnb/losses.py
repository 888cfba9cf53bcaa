"""The papers' losses, term by term."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
