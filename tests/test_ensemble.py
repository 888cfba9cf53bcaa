"""Averages of maps over networks and over a slice's positions."""

import json

import numpy as np
import pytest
from discs import make_slices, tiny_infnet
from scipy.special import logit

from covidnb.nets import InfNet
from covidnb.slices import list_slices, read_image
from covidnb.training import ensemble
from covidnb.training.ensemble import EnsembleConfig, average_maps, evaluate, sharpened
from covidnb.training.infnet import load_network, predict_slices, split_slices
from covidnb.training.run import ConfigError, Run
from covidnb.training.semi_infnet import plan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("discs")
    make_slices(root, "TrainingSet/LungInfection-Train/Doctor-label", [f"a{k}_1" for k in range(5)])
    make_slices(root, "TestingSet/LungInfection-Test", ["b_1", "b_2"])
    return root


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """Two untrained networks, the second of fold 1."""
    paths = []
    for fold in (None, 1):
        config = tiny_infnet(data, fold=fold)
        run = Run(tmp_path_factory.mktemp("run"), config)
        run.save_weights(InfNet(config.backbone))
        paths.append(str(run.weights_path))
    return paths


def test_positions_are_undone(monkeypatch):
    """A network that answers with the slice itself gives the slice back, whatever its shape."""
    monkeypatch.setattr(
        ensemble, "predict_greys", lambda net, greys, size: [g / np.float32(255) for g in greys]
    )
    grey = np.random.default_rng(0).integers(0, 256, (5, 8), np.uint8)
    np.testing.assert_allclose(average_maps(None, [grey], 64, flips=True)[0], grey / 255, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 8.0])
def test_sharpening_multiplies_logits_and_moves_no_pixel_across_the_cut(factor):
    p = np.linspace(0, 1, 101, dtype=np.float32)
    got = sharpened(p, factor)
    assert ((got > 0.5) == (p > 0.5))[p != 0.5].all() and got[0] == 0 and got[-1] == 1
    inner = slice(20, 81)
    np.testing.assert_allclose(logit(got[inner]), factor * logit(p[inner]), rtol=1e-3, atol=1e-5)


def test_mean_of_networks_is_scored(data, weights, tmp_path):
    ensemble.main([str(tmp_path), *weights, "--data", str(data)])
    files = list_slices(data, "test")
    maps = [predict_slices(load_network(path)[0], files, 64) for path in weights]
    stored = read_image(tmp_path / "predictions" / "b_2.png")
    np.testing.assert_allclose(stored, 255 * (maps[0][1] + maps[1][1]) / 2, atol=0.51)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["slices"] == {"evaluated": 2} and 0 <= result["scores"]["meanDic"] <= 1


def test_teachers_label_the_pool_for_a_student(data, weights, tmp_path):
    make_slices(data, "TrainingSet/LungInfection-Train/Pseudo-label", ["c_1", "c_2", "c_3"])
    ensemble.main([str(tmp_path), weights[0], "--data", str(data), "--pool", "--sharpen", "2"])
    pool = list_slices(data, "pseudo")
    (mine,) = predict_slices(load_network(weights[0])[0], pool[1:2], 64)
    labels = tmp_path / "labels"
    np.testing.assert_allclose(read_image(labels / "c_2.png"), 255 * sharpened(mine, 2), atol=0.51)
    assert "scores" not in json.loads((tmp_path / "metrics.json").read_text())
    student = plan({"data": str(data), "start": weights[0], "labels": str(labels)}, tmp_path)
    assert list(student) == ["pseudo", "doctor"]
    learnt, _ = split_slices(student["pseudo"])
    assert [f.mask.parent for f in learnt] == [labels] * 3


def test_slices_that_were_learnt_are_not_scored(data, weights, tmp_path):
    with pytest.raises(ConfigError, match="held out fold None, not 1"):
        evaluate(EnsembleConfig(weights=tuple(weights), data=str(data), fold=1), tmp_path)
    with pytest.raises(ConfigError, match="'weights' needs at least one"):
        EnsembleConfig()


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(SystemExit, match="error: .*none.safetensors"):
        ensemble.main([str(tmp_path / "out"), str(tmp_path / "none.safetensors")])
    assert not (tmp_path / "out").exists()
