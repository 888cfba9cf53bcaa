"""Pseudo-labels: rounds, their order and cost, exact resume, drift, and training on the labels."""

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
from discs import make_slices, tiny_infnet
from PIL import Image

from covidnb.slices import list_slices, semiseg_root
from covidnb.training import infnet, semi_infnet
from covidnb.training.infnet import InfNetConfig, load_network, split_slices, train
from covidnb.training.run import ConfigError, parse_config
from covidnb.training.semi_infnet import (
    Drift,
    PropagationConfig,
    check_drift,
    plan,
    propagate,
    to_learn_from,
)


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    root = tmp_path_factory.mktemp("discs")
    make_slices(
        root, "TrainingSet/LungInfection-Train/Doctor-label", [f"a{p}_{k}" for p in "12345" for k in "12"]
    )
    make_slices(root, "TestingSet/LungInfection-Test", ["b_1", "b_2"])
    make_slices(
        root, "TrainingSet/LungInfection-Train/Pseudo-label", [f"c_{k}" for k in range(12)], labels=False
    )
    return root


@pytest.fixture(scope="module")
def started(discs, tmp_path_factory):
    """An Inf-Net that has learnt the discs."""
    config = tiny_infnet(discs, epochs=14, lr=3e-3, drop_epoch=11)
    return train(config, tmp_path_factory.mktemp("start") / "run")


@pytest.fixture(scope="module")
def small(discs, started) -> PropagationConfig:
    return PropagationConfig(
        start=str(started.weights_path), data=str(discs), per_round=4, epochs=1, size=64, batch=8, lr=1e-4
    )


@pytest.fixture(scope="module")
def propagated(small, tmp_path_factory):
    return propagate(small, tmp_path_factory.mktemp("propagated") / "run")


def log(run):
    return np.genfromtxt(run.folder / "log.csv", delimiter=",", names=True, dtype=None, encoding="utf8")


class TestConfig:
    def test_start_is_required(self):
        with pytest.raises(ConfigError, match="'start' must name"):
            PropagationConfig()

    @pytest.mark.parametrize(
        ("name", "value"), [("per_round", 0), ("share_limits", (2.0, 1.0)), ("order", "best"), ("size", 50)]
    )
    def test_wrong_values_name_the_field(self, name, value):
        with pytest.raises(ConfigError, match=f"'{name}'"):
            parse_config(PropagationConfig, {"start": "w", name: value})

    def test_labels_need_their_part(self):
        with pytest.raises(ConfigError, match="'labels' names pseudo-labels: set part"):
            InfNetConfig(labels="runs/x/labels")


class TestPlan:
    def test_stages_follow_one_another(self):
        configs = plan({"recipe": "lite", "seed": 3, "pseudo": {"epochs": 2}}, "runs/x")
        assert list(configs) == ["infnet", "propagation", "pseudo", "doctor"]
        assert configs["propagation"].start == str(Path("runs/x/infnet/weights.safetensors"))
        assert configs["pseudo"].labels == str(Path("runs/x/propagation/labels"))
        assert configs["doctor"].start == str(Path("runs/x/pseudo/weights.safetensors"))
        assert {c.seed for c in configs.values()} == {3} and configs["pseudo"].epochs == 2
        assert configs["doctor"].epochs < configs["infnet"].epochs
        brief = plan({"recipe": "laptop"}, "runs/x")
        assert brief["doctor"].lr < brief["infnet"].lr

    def test_what_is_there_is_not_made_again(self):
        configs = plan({"start": "w.safetensors", "labels": "authors", "data": "covid-semiseg"}, "runs/x")
        assert list(configs) == ["pseudo", "doctor"] and configs["pseudo"].labels == ""
        assert plan({"start": "w.safetensors"}, "x")["propagation"].start == "w.safetensors"

    def test_the_paper_s_recipe_is_the_default_of_each(self):
        configs = plan({"recipe": "paper"}, "x")
        assert configs["propagation"] == PropagationConfig(start=configs["propagation"].start)
        assert configs["infnet"] == InfNetConfig()

    @pytest.mark.parametrize(
        "values", [{"labels": "mine"}, {"recipe": "huge"}, {"epoch": 3}, {"pseudo": {"rounds": 2}}]
    )
    def test_unknown_values_are_refused(self, values):
        with pytest.raises(ConfigError):
            plan(values, "x")


def test_paper_learns_from_all_incremental_from_a_sample():
    config = PropagationConfig(start="w", replay=10)
    old, new = list(range(50)), [60, 61]
    assert to_learn_from(config, 3, old, new) == old + new
    sample = replace(config, strategy="incremental")
    drawn = to_learn_from(sample, 3, old, new)
    assert len(drawn) == 12 and drawn[-2:] == new and set(drawn[:10]) <= set(old)
    assert drawn == to_learn_from(sample, 3, old, new) != to_learn_from(sample, 4, old, new)


@pytest.mark.slow
def test_every_slice_is_labelled_once(small, propagated):
    rows = log(propagated)
    pool = {f.name for f in list_slices(semiseg_root(small.data), "pseudo")}
    named = [name for names in rows["names"] for name in names.split()]
    assert sorted(named) == sorted(pool) and list(rows["labelled"]) == [4, 8, 12]
    assert list(rows["learnt_from"]) == [14, 18, 22]
    labels = {p.stem: np.asarray(Image.open(p)) for p in (propagated.folder / "labels").iterdir()}
    assert labels.keys() == pool
    assert all(len(np.unique(label)) > 2 for label in labels.values())  # soft
    shares = [np.mean([(labels[name] > 127).mean() for name in names.split()]) for names in rows["names"]]
    np.testing.assert_allclose(rows["share"], shares)


@pytest.mark.slow
def test_first_labels_are_the_start_s_and_later_ones_are_not(small, propagated):
    pool = {f.name: f for f in list_slices(semiseg_root(small.data), "pseudo")}
    net, config = load_network(small.start)
    rows = log(propagated)
    for number, equal in ((0, True), (2, False)):
        names = rows["names"][number].split()
        maps = infnet.predict_slices(net, [pool[name] for name in names], config.size)
        stored = [np.asarray(Image.open(propagated.folder / "labels" / f"{name}.png")) for name in names]
        same = [np.array_equal(np.round(255 * m), s) for m, s in zip(maps, stored, strict=True)]
        assert all(same) == equal


@pytest.mark.slow
def test_the_last_slices_are_watched(small, propagated):
    watched = sorted(p.name for p in (propagated.folder / "watch").iterdir())
    assert len(watched) == 4 and set(watched) == set(log(propagated)["names"][2].split())
    rounds = [p.name for p in sorted((propagated.folder / "watch" / watched[0]).iterdir())]
    assert rounds == ["round_0001.png", "round_0002.png", "round_0003.png"]


@pytest.mark.slow
def test_weights_are_an_infnet_and_labels_can_be_learnt_from(small, propagated, discs, tmp_path):
    net, config = load_network(propagated.weights_path)
    assert config.size == 64 and config.backbone == "efficientnet_lite0"
    stage = replace(config, part="pseudo", labels=str(propagated.folder / "labels"), epochs=1)
    files, held_out = split_slices(stage)
    assert len(files) == 12 and all(f.mask.parent.name == "labels" for f in files) and len(held_out) == 2
    first = train(stage, tmp_path / "pseudo")
    second = train(replace(config, start=str(first.weights_path), epochs=1), tmp_path / "doctor")
    assert second.weights_path.exists()
    with pytest.raises(ConfigError, match="come without labels"):
        split_slices(replace(stage, labels=""))
    with pytest.raises(ConfigError, match="has no NAME.png"):
        split_slices(replace(stage, labels=str(tmp_path)))


@pytest.mark.slow
def test_hard_labels_and_confident_order(small, tmp_path):
    run = propagate(replace(small, cut=0.5, order="confident", pool=8), tmp_path)
    doubt = log(run)["doubt"]
    assert len(doubt) == 2
    values = {v for p in (tmp_path / "labels").iterdir() for v in np.unique(np.asarray(Image.open(p)))}
    assert values == {0, 255}
    higher = propagate(replace(small, cut=0.9, order="confident", pool=8), tmp_path / "higher")
    assert log(higher)["share"][0] < log(run)["share"][0]
    with pytest.raises(ConfigError, match="'cut' must lie between 0 and 1"):
        replace(small, cut=1.0)
    # of its eight slices the first round took those that the start was surest of
    pool = {f.name: f for f in list_slices(semiseg_root(small.data), "pseudo")}
    net, config = load_network(small.start)
    first, second = (names.split() for names in log(run)["names"])
    sure, unsure = (
        [
            np.minimum(p, 1 - p).mean()
            for p in infnet.predict_slices(net, [pool[n] for n in names], config.size)
        ]
        for names in (first, second)
    )
    assert max(sure) <= min(unsure)


def test_drift_is_told_by_round():
    rows = [{"round": k + 1, "shares": [0.1] * 5} for k in range(4)]
    check_drift(rows, 0.1, (0.05, 4.0))
    check_drift(rows[:3], 1e-9, (0.05, 4.0))  # too few to judge
    empty = rows + [{"round": 5, "shares": [0.0] * 20}]
    with pytest.raises(Drift, match="round 5: the labels have emptied.*a lower 'cut'"):
        check_drift(empty, 0.1, (0.05, 4.0))
    flood = rows + [{"round": 5, "shares": [0.9] * 20}]
    with pytest.raises(Drift, match="flooded.*a higher 'cut'"):
        check_drift(flood, 0.1, (0.05, 4.0))


@pytest.mark.slow
def test_a_drifting_propagation_stops_and_stays_stopped(small, tmp_path, monkeypatch):
    monkeypatch.setattr(semi_infnet, "RECENT", 4)
    config = replace(small, share_limits=(0.0, 1e-6))
    for _ in range(2):
        with pytest.raises(Drift, match="round 1: the labels have flooded"):
            propagate(config, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(small, propagated, tmp_path):
    """SIGKILL after the first round and in the second; labels and weights are the same to the last bit."""
    settings, out = tmp_path / "config.json", tmp_path / "run"
    settings.write_text((propagated.folder / "config.json").read_text())
    command = [sys.executable, "-m", "covidnb.training.semi_infnet", str(settings), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (out / "log.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    names = ["weights.safetensors", *(f"labels/c_{k}.png" for k in range(12))]
    for name in names:
        assert (out / name).read_bytes() == (propagated.folder / name).read_bytes(), name
    assert len(log(propagated)) == len((out / "log.csv").read_text().splitlines()) - 1
