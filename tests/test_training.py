"""Run folders, exact resume and the Inf-Net loop on slices that the tests make."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from covidnb.files import whole
from covidnb.training import run as run_module
from covidnb.training.infnet import InfNetConfig, load_network, predict_slices, split_slices, train
from covidnb.training.run import ConfigError, Run, notebook_parameters, parse_config
from covidnb.training.threshold import GreyBand


def make_slices(root: Path, part: str, names: list[str], side: int = 64) -> None:
    """Write discs brighter than a noisy ground in the COVID-SemiSeg layout."""
    rng = np.random.default_rng(len(names))
    y, x = np.mgrid[:side, :side]
    for kind in ("Imgs", "GT"):
        (root / part / kind).mkdir(parents=True, exist_ok=True)
    for name in names:
        cy, cx, r = rng.uniform(16, 48, 2).tolist() + [rng.uniform(6, 14)]
        lesion = (y - cy) ** 2 + (x - cx) ** 2 < r**2
        grey = np.clip(60 + 90 * lesion + rng.normal(0, 12, (side, side)), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(root / part / "Imgs" / f"{name}.png")
        Image.fromarray(lesion.astype(np.uint8) * 255).save(root / part / "GT" / f"{name}.png")


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("discs")
    train_names = [f"patient{p}_{k}" for p in range(1, 6) for k in (1, 2)]
    make_slices(root, "TrainingSet/LungInfection-Train/Doctor-label", train_names)
    make_slices(root, "TestingSet/LungInfection-Test", ["patient9_1", "patient9_2", "patient9_3"])
    return root


@pytest.fixture(scope="module")
def tiny(discs) -> InfNetConfig:
    return InfNetConfig(
        data=str(discs),
        backbone="efficientnet_lite0",
        pretrained=False,
        size=64,
        scales=(1.0,),
        batch=5,
        epochs=4,
        lr=1e-3,
        drop_epoch=3,
        augment=True,
    )


class TestConfig:
    def test_unknown_name_is_refused_with_the_nearest(self):
        with pytest.raises(ConfigError, match="unknown parameter 'epoch': did you mean 'epochs'"):
            parse_config(InfNetConfig, {"epoch": 3})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("epochs", "many"), ("epochs", 2.5), ("lr", "1e-4"), ("pretrained", 1), ("scales", [1, "x"])]
        + [("precision", "fp8"), ("fold", "0"), ("batch", True)],
    )
    def test_wrong_type_names_the_field(self, name, value):
        with pytest.raises(ConfigError, match=f"parameter '{name}' must be"):
            parse_config(InfNetConfig, {name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("epochs", 0), ("size", 100), ("scales", []), ("lr", -1.0), ("validate_every", 5)],
    )
    def test_wrong_value_names_the_field(self, name, value):
        with pytest.raises(ConfigError, match=f"'{name}'"):
            parse_config(InfNetConfig, {name: value})

    def test_whole_numbers_and_lists_are_taken(self):
        config = parse_config(InfNetConfig, {"scales": [1, 1.25], "fold": 2})
        assert config.scales == (1, 1.25) and config.fold == 2

    def test_paper_schedule(self):
        config = InfNetConfig()
        assert [config.side(s) for s in config.scales] == [256, 352, 448]
        rates = [config.learning_rate(e) for e in (0, 49, 50, 99)]
        assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])

    def test_notebook_parameters_are_its_plain_values(self):
        names = {"data": "x", "epochs": 3, "_hidden": 1, "In": [], "Out": {}, "Path": Path, "fold": None}
        assert notebook_parameters(names) == {"data": "x", "epochs": 3, "fold": None}


class TestRunFolder:
    def test_another_config_is_refused_by_field(self, tmp_path):
        Run(tmp_path, InfNetConfig()).save_checkpoint({"history": []})
        with pytest.raises(ConfigError, match=r"epochs 100 \(now 7\)"):
            Run(tmp_path, InfNetConfig(epochs=7))

    def test_a_folder_that_learnt_nothing_starts_again_with_any_config(self, tmp_path):
        Run(tmp_path, InfNetConfig(pretrained=True))
        Run(tmp_path, InfNetConfig(pretrained=False))
        assert json.loads((tmp_path / "config.json").read_text())["pretrained"] is False

    def test_unreadable_checkpoint_is_named(self, tmp_path):
        run = Run(tmp_path, InfNetConfig())
        run.checkpoint_path.parent.mkdir()
        run.checkpoint_path.write_bytes(b"half a checkpoint")
        with pytest.raises(ConfigError, match="last.pt cannot be read .* delete it"):
            run.load_checkpoint()

    def test_full_disk_keeps_the_older_checkpoint(self, tmp_path, monkeypatch):
        run = Run(tmp_path, InfNetConfig())
        run.save_checkpoint({"epoch": 1})

        def full(state, path):
            Path(path).write_bytes(b"beginning")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(run_module.torch, "save", full)
        with pytest.raises(OSError, match=r"last\.pt.*free some space"):
            run.save_checkpoint({"epoch": 2})
        assert run.load_checkpoint() == {"epoch": 1}
        assert [p.name for p in run.checkpoint_path.parent.iterdir()] == ["last.pt"]

    def test_a_failed_write_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError), whole(tmp_path / "deep" / "file.json") as part:
            part.write_text("half")
            raise RuntimeError
        assert list((tmp_path / "deep").iterdir()) == []

    def test_same_weights_are_the_same_file(self, tmp_path):
        written = set()
        for k in range(6):
            run = Run(tmp_path / str(k), InfNetConfig())
            run.save_weights(torch.nn.Conv2d(1, 2, 1).apply(lambda m: torch.nn.init.ones_(m.weight)))
            written.add(run.weights_path.read_bytes()[:200])
        assert len(written) == 1

    def test_weights_of_another_network_are_refused(self, tmp_path):
        run = Run(tmp_path, InfNetConfig())
        run.save_weights(torch.nn.Linear(3, 3))
        with pytest.raises(ConfigError, match="holds a Linear, not an InfNet"):
            load_network(run.weights_path)

    def test_other_files_are_refused_as_weights(self, tmp_path):
        path = tmp_path / "w.safetensors"
        with pytest.raises(ConfigError, match="no such file"):
            load_network(path)
        path.write_bytes(b"not weights at all")
        with pytest.raises(ConfigError, match="no safetensors file"):
            load_network(path)
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(ConfigError, match="does not say which network"):
            load_network(path)


class TestThreshold:
    def test_fit_is_the_best_band_of_all(self):
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (24, 24), np.uint8) for _ in range(3)]
        truths = [(rng.random((24, 24)) > 0.8).astype(np.uint8) * 255 for _ in range(3)]
        band = GreyBand.fit(images, truths)

        def dice(low, high):
            scores = []
            for image, truth in zip(images, truths, strict=True):
                p, g = GreyBand(low, high, 0).predict(image) > 0, truth > 128
                scores.append(2 * (p & g).sum() / (p.sum() + g.sum()))
            return np.mean(scores)

        assert band.dice == pytest.approx(dice(band.low, band.high))
        tried = [(low, high) for low in range(0, 256, 16) for high in range(low, 256, 16)]
        assert band.dice >= max(dice(low, high) for low, high in tried)


def test_split_by_fold_shares_no_patient(tiny):
    trained, held_out = split_slices(replace(tiny, fold=1))
    patients = [{f.name.split("_")[0] for f in part} for part in (trained, held_out)]
    assert patients[0].isdisjoint(patients[1]) and len(trained) + len(held_out) == 10


@pytest.mark.slow
def test_learns_discs_and_fills_the_run_folder(tiny, tmp_path):
    config = replace(tiny, epochs=30, drop_epoch=25)
    run = train(config, tmp_path)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "log.csv",
        "checkpoint/last.pt",
        "weights.safetensors",
        "metrics.json",
        "model_card.md",
        "predictions/patient9_1.png",
        "predictions/patient9_2.png",
        "predictions/patient9_3.png",
    }
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["scores"]["dice_at_0.5"] > 0.7
    # the stored weights are those that made the stored maps
    _, held_out = split_slices(config)
    net, its_config = load_network(run.weights_path)
    assert its_config == config
    again = predict_slices(net, held_out, config.size)
    stored = np.asarray(Image.open(tmp_path / "predictions" / "patient9_1.png"))
    assert np.abs(np.round(again[0] * 255) - stored).max() <= 1
    assert "Not for diagnosis" in (run.folder / "model_card.md").read_text()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path):
    """SIGKILL at moments drawn from a seed; the weights at the end are the same to the last bit."""
    config = replace(tiny, epochs=6, drop_epoch=4)
    train(config, tmp_path / "whole")
    settings = tmp_path / "config.json"
    settings.write_text((tmp_path / "whole" / "config.json").read_text())
    out, rng, kills = tmp_path / "killed", np.random.default_rng(3), 0
    command = [sys.executable, "-m", "covidnb.training.infnet", str(settings), str(out)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    while kills < 3:
        process = subprocess.Popen(command, env=os.environ | threads, stderr=subprocess.DEVNULL)
        rows = epochs_logged(out)
        while epochs_logged(out) == rows and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command, env=os.environ | threads, check=True, stderr=subprocess.DEVNULL)
    assert kills == 3
    for name in ("weights.safetensors", "predictions/patient9_2.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert epochs_logged(out) == 6


def epochs_logged(folder: Path) -> int:
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0
