"""What the discriminator of a finished run goes by: lesions, or the scanner that sick volumes come from."""

import torch

from covidnb.training.gasnet.config import root_of
from covidnb.training.gasnet.game import build
from covidnb.training.run import ConfigError, Run


@torch.no_grad()
def verdicts(run: Run, splits: tuple[str, ...] = ("covid", "healthy", "validation")) -> list[dict]:
    """Let D judge the volumes of a run, as they are.

    Where sick and healthy volumes come from different scanners, D can win without looking at a lesion, and
    the generator then learns to change the scanner. A volume of the sick ones' scanner without lesions tells:
    so does one of the healthy ones' scanner with lesions.

    Returns
    -------
    list of dict
        A row for each volume: "name", "split", "diseased", the probability of disease to D, and "share", the
        infected share of the lungs in percent, None where no lesions were drawn.

    Raises
    ------
    ConfigError
        Where the run has no discriminator, or has not begun.
    """
    from covidnb.metrics import infected_share
    from covidnb.volumes import LungVolumes, list_volumes

    saved = run.load_checkpoint()
    if saved is None or "d" not in saved["nets"]:
        raise ConfigError(
            f"{run.folder} has no discriminator: it is not begun, or a variant without the game"
        )
    root, d, rows = root_of(run.config), None, []
    for split in splits:
        for files in list_volumes(root, split):
            item = LungVolumes([files], lesions=files.lesions is not None, depth=run.config.depth)[0]
            if d is None:
                d = build(run.config, tuple(item["image"].shape[1:])).d
                d.load_state_dict(saved["nets"]["d"])
                d.eval()
            share = None
            if files.lesions is not None:
                share = infected_share(item["lesions"][0].numpy(), item["lungs"][0].numpy())
            diseased = float(torch.sigmoid(d(item["image"][None]).logit))
            rows.append({"name": files.name, "split": split, "diseased": diseased, "share": share})
    return rows
