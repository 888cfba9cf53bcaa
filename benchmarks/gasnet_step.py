"""One training iteration of GASNet: the plain formulation against ours, in one run.

Plain: contiguous NCDHW in float32, the segmenter called once for each kind of volume. Ours: one pass for the
volumes of all kinds, channels last, bf16 autocast. The same networks, volumes and losses; each variant adds
one change. An iteration is a step of S and G in the game, one of S's own and one of D, all terms counting.

    python benchmarks/gasnet_step.py --size 32 160 160
"""

import argparse
from unittest import mock

import torch
from in_turn import print_ratios

from covidnb.training.gasnet import KINDS, TERMS, Game, GasnetConfig, configure
from covidnb.training.gasnet import game as game_module
from covidnb.training.loop import start_fabric


def one_by_one(s, volumes):
    """What S finds, a pass for each kind."""
    return {kind: s(volume) for kind, volume in volumes.items()}


# name, how S is called, memory format, precision
VARIANTS = [
    ("plain", one_by_one, torch.contiguous_format, "32-true"),
    ("+ one pass for all kinds", game_module.find, torch.contiguous_format, "32-true"),
    ("+ channels last", game_module.find, torch.channels_last_3d, "32-true"),
    ("+ bf16 autocast", game_module.find, torch.channels_last_3d, "bf16-mixed"),
]


def config_of(precision: str) -> GasnetConfig:
    """The paper's networks and weights, one volume of each kind, every term from the first step on."""
    return configure(
        {
            "recipe": "paper",
            "batch": 1,
            "in_a_row": 1,
            "d_steps": 1,
            "paste_from": 0,
            "multiple_instance_from": 0,
            "precision": precision,
        }
    )


def volumes_of(shape: tuple[int, int, int]) -> dict:
    """Smooth noise in half a volume of lung, a bright block as lesion; for S and G, and for D's turn."""
    generator = torch.Generator().manual_seed(1)
    batches = {}
    for kind in KINDS:
        coarse = torch.randn(1, 1, *[n // 8 for n in shape], generator=generator)
        image = torch.nn.functional.interpolate(coarse, shape, mode="trilinear").tanh()
        lungs, lesions = torch.zeros_like(image), torch.zeros_like(image)
        lungs[..., shape[2] // 2 :] = 1
        lesions[..., shape[1] // 4 : shape[1] // 2, -shape[2] // 4 :] = 1
        batches[kind] = {"image": image, "lungs": lungs, "lesions": lesions}
    return batches | {"turns": [{kind: batches[kind] for kind in ("covid", "healthy")}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(32, 160, 160))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    shape = tuple(asked.size)
    batches = volumes_of(shape)
    steps = []
    for _, find, memory_format, precision in VARIANTS:
        config = config_of(precision)
        game = Game(start_fabric(config), config, shape, None)
        for net in game.bare:
            net.to(memory_format=memory_format)

        def step(game=game, config=config, find=find):
            with mock.patch.object(game_module, "find", find):
                seen = game.step(0, batches)
            return sum(float(config.weight(name, 0) * seen[name].detach()) for name in TERMS if name in seen)

        steps.append(step)
    title = f"{' x '.join(map(str, shape))}, batch 1"
    names = [name for name, *_ in VARIANTS]
    print_ratios(title, ("seconds an iteration", "first loss of S and G"), names, steps, asked.rounds)


if __name__ == "__main__":
    main()
