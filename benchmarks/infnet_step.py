"""One training step of Inf-Net: the released formulation against ours, in one run.

Released: contiguous NCHW in float32, attention before the 1 x 1 projection (on 2048, 1024 and 512 channels),
one 31 x 31 pooling for each of the four side outputs. Ours: channels last, bf16 autocast, attention after the
projection, one separable pooling for all four. Same function, same loss; each variant adds one change.

    python benchmarks/infnet_step.py --backbone res2net50 --size 352 --batch 4
"""

import argparse
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from in_turn import print_ratios

from covidnb.losses import infnet_loss, structure_loss
from covidnb.nets import InfNet
from covidnb.nets.infnet import ReverseAttention, resize


class AttendFirst(ReverseAttention):
    """The released order: every channel is multiplied by the attention, then projected."""

    def forward(self, features, guidance, coarse):
        size = features.shape[-2:]
        coarse = resize(coarse, size)
        x = self.project((1 - torch.sigmoid(coarse)).expand_as(features) * features)
        x = torch.cat([x, resize(guidance, size)], dim=1)
        for layer in self.refine:
            x = F.relu(layer(x))
        return self.head(x) + coarse


def released_loss(out, mask, edge):
    """The loss of the paper with one square pooling for each side output."""
    sides = []
    for logits in out[:4]:
        weight = 1 + 5 * (F.avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
        sides.append(structure_loss(logits, mask, weight=weight))
    return sum(sides) + F.binary_cross_entropy_with_logits(out.edge, edge)


def our_loss(out, mask, edge):
    return infnet_loss(out, mask, edge).total


def build(backbone: str, attend_first: bool, channels_last: bool) -> InfNet:
    torch.manual_seed(0)
    net = InfNet(backbone)
    if attend_first:
        for module in (net.reverse4, net.reverse3, net.reverse2):
            module.__class__ = AttendFirst
    return net.to(memory_format=torch.channels_last) if channels_last else net


# name, attention first, channels last, loss, bf16
VARIANTS = [
    ("released formulation", True, False, released_loss, False),
    ("+ one separable pooling", True, False, our_loss, False),
    ("+ attention after projection", False, False, our_loss, False),
    ("+ channels last", False, True, our_loss, False),
    ("+ bf16 autocast", False, True, our_loss, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="res2net50")
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    shape = (asked.batch, 1, asked.size, asked.size)
    image = torch.randn(asked.batch, 3, asked.size, asked.size, generator=generator)
    mask = F.interpolate(torch.rand(asked.batch, 1, 11, 11, generator=generator), shape[2:], mode="bilinear")
    mask = (mask > 0.6).float()
    edge = (F.max_pool2d(mask, 3, 1, 1) - mask).clamp(0, 1)
    steps = []
    for _, attend_first, channels_last, loss_of, bf16 in VARIANTS:
        net = build(asked.backbone, attend_first, channels_last)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
        x = image.contiguous(memory_format=torch.channels_last) if channels_last else image

        def step(net=net, optimizer=optimizer, x=x, loss_of=loss_of, bf16=bf16):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                out = net(x)
            loss = loss_of(out, mask, edge)
            loss.backward()
            optimizer.step()
            return loss.item()

        steps.append(step)
    title = f"{asked.backbone}, {asked.size} x {asked.size}, batch {asked.batch}"
    names = [name for name, *_ in VARIANTS]
    print_ratios(title, ("seconds a step", "loss of the first step"), names, steps, asked.rounds)


if __name__ == "__main__":
    main()
