"""Classes: labels and priors of a slice, losses, the released one-hot, the loop, its folder and resume."""

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
from discs import epochs_logged, tiny_infnet
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from covidnb.losses import multiclass_bce_loss, multiclass_dice_loss, one_hot
from covidnb.metrics import dice_at
from covidnb.nets import MultiClassUNet
from covidnb.slices import PARTS, SliceError, list_slices, read_classes, read_image, read_mask, resized_square
from covidnb.slices.multiclass import (
    MultiClassSlices,
    class_input,
    imperfect_prior,
    read_prior,
    write_classes,
)
from covidnb.training import infnet
from covidnb.training.multiclass import (
    MultiClassConfig,
    average,
    build,
    configure,
    grey_reference,
    load_network,
    predict_slice,
    probabilities,
    score,
    split_slices,
    train,
)
from covidnb.training.multiclass.maps import named_within
from covidnb.training.run import ConfigError, Run, parse_config
from covidnb.training.threshold import ConsolidationCut


def make_classes(root: Path, part: str, names: list[str], side: int = 64) -> None:
    """Write slices with a grey disc (GGO) around a bright one (consolidation), on a noisy ground."""
    rng = np.random.default_rng(len(names))
    y, x = np.mgrid[:side, :side]
    folder = root / PARTS[part]
    for kind in ("Imgs", "GT", *(["Prior"] if part == "multiclass_train" else [])):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name in names:
        cy, cx, r = rng.uniform(20, 44, 2).tolist() + [rng.uniform(10, 15)]
        distance = np.hypot(y - cy, x - cx)
        classes = (distance < r).astype(np.uint8) + (distance < r / 2)
        grey = np.clip(40 + 60 * classes + rng.normal(0, 10, (side, side)), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / "Imgs" / f"{name}.png")
        write_classes(folder / "GT" / f"{name}.png", classes)
        if part == "multiclass_train":
            mask = np.where(classes > 0, 255, 0).astype(np.uint8)
            Image.fromarray(mask).save(folder / "Prior" / f"{name}.png")


@pytest.fixture(scope="module")
def rings(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rings")
    make_classes(root, "multiclass_train", [f"patient{p}_{k}" for p in range(1, 6) for k in (1, 2)])
    make_classes(root, "multiclass_test", ["patient9_1", "patient9_2", "patient9_3"])
    return root


@pytest.fixture(scope="module")
def tiny(rings) -> MultiClassConfig:
    return MultiClassConfig(
        data=str(rings),
        network="fcn8s",
        backbone="efficientnet_lite0",
        pretrained=False,
        prior_noise=0.5,
        eval_prior="label",
        size=64,
        batch=5,
        epochs=4,
        optimizer="adam",
        lr=2e-3,
        drop_epoch=3,
        loss="dice",
        augment=True,
    )


def planes(rings: Path) -> tuple:
    """Image, prior and classes of one slice."""
    item = list_slices(rings, "multiclass_train")[0]
    return read_image(item.image), read_prior(item, "label"), read_classes(item.mask)


class TestPriors:
    def test_strength_0_changes_nothing(self):
        prior = np.random.default_rng(0).random((20, 30)).astype(np.float32)
        np.testing.assert_array_equal(imperfect_prior(prior, 0, np.random.default_rng(1)), prior)

    def test_a_stronger_one_is_further_from_the_truth(self):
        y, x = np.mgrid[:128, :128]
        truth = (np.hypot(y - 50, x - 40) < 20) | (np.hypot(y - 90, x - 90) < 12)

        def dice(strength):
            maps = [imperfect_prior(truth, strength, np.random.default_rng(k)) >= 0.5 for k in range(20)]
            return np.mean([2 * (m & truth).sum() / (m.sum() + truth.sum()) for m in maps])

        found = [dice(strength) for strength in (0.1, 0.5, 1.0, 2.0)]
        assert found == sorted(found, reverse=True)
        assert found[0] > 0.9 and 0.6 < found[2] < 0.9

    @settings(deadline=None, max_examples=20)
    @given(hnp.arrays(bool, (24, 32)), st.floats(0.01, 3), st.integers(0, 99))
    def test_any_mask_stays_a_map(self, mask, strength, seed):
        """Also an empty and a full one."""
        drawn = [
            imperfect_prior(m, strength, np.random.default_rng(seed))
            for m in (mask, mask & False, mask | True, mask)
        ]
        for m in drawn:
            assert m.dtype == np.float32 and m.shape == mask.shape and m.min() >= 0 and m.max() <= 1
        np.testing.assert_array_equal(drawn[0], drawn[3])

    def test_maps_of_a_run_are_read_by_name_and_missed_by_name(self, rings, tmp_path):
        item = list_slices(rings, "multiclass_test")[1]
        soft = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
        Image.fromarray(soft).save(tmp_path / "patient9_2.png")
        np.testing.assert_array_equal(read_prior(item, tmp_path), soft)
        np.testing.assert_array_equal(read_prior(item, "label") > 0, read_classes(item.mask) > 0)
        with pytest.raises(SliceError, match="patient9_1.png does not exist.*predictions/"):
            read_prior(list_slices(rings, "multiclass_test")[0], tmp_path)


class TestSlices:
    def test_items(self, rings):
        grey, prior, classes = planes(rings)
        files = list_slices(rings, "multiclass_train")
        item = MultiClassSlices(files, 64)[0]
        assert item["image"].shape == (6, 64, 64) and item["image"].dtype == torch.float32
        torch.testing.assert_close(item["image"], class_input(grey, prior, 64))
        assert item["classes"].dtype == torch.int64
        np.testing.assert_array_equal(item["classes"], classes)
        alone = MultiClassSlices(files, 64, prior=None)[0]
        torch.testing.assert_close(alone["image"], item["image"][:3])

    def test_resized_labels_hold_no_class_that_is_not_beside(self, rings, tmp_path):
        """Between background and consolidation lies no GGO, as it does where indices are interpolated."""
        folder = tmp_path / PARTS["multiclass_train"]
        classes = np.zeros((50, 70), np.uint8)
        classes[10:30, 20:50] = 2
        for kind in ("Imgs", "GT"):
            (folder / kind).mkdir(parents=True)
        Image.fromarray(classes).save(folder / "Imgs" / "p_1.png")
        write_classes(folder / "GT" / "p_1.png", classes)
        slices = MultiClassSlices(list_slices(tmp_path, "multiclass_train"), 32, augment=True)
        for epoch in range(8):
            slices.set_epoch(epoch)
            assert set(slices[0]["classes"].unique().tolist()) == {0, 2}

    def test_draws_depend_on_seed_epoch_and_index_alone(self, rings):
        files = list_slices(rings, "multiclass_train")
        first, second = (MultiClassSlices(files, 64, noise=1.0, augment=True, seed=7) for _ in range(2))
        first.set_epoch(3), second.set_epoch(3)
        ahead = first[4]
        for index in (0, 9, 4):
            again = second[index]
        assert all(torch.equal(ahead[key], again[key]) for key in ("image", "classes"))
        second.set_epoch(4)
        assert not torch.equal(ahead["image"], second[4]["image"])

    def test_noise_touches_the_prior_alone(self, rings):
        files = list_slices(rings, "multiclass_train")
        clean, noisy = (MultiClassSlices(files, 64, noise=noise, augment=True) for noise in (0.0, 1.0))
        changed = 0
        for k in range(len(files)):
            assert torch.equal(clean[k]["image"][:3], noisy[k]["image"][:3])
            assert torch.equal(clean[k]["classes"], noisy[k]["classes"])
            changed += not torch.equal(clean[k]["image"][3:], noisy[k]["image"][3:])
        assert changed == len(files)

    def test_prior_of_another_size_is_refused(self, rings, tmp_path):
        Image.fromarray(np.zeros((10, 12), np.uint8)).save(tmp_path / "patient1_1.png")
        with pytest.raises(SliceError, match="prior of patient1_1.*12 x 10 and 64 x 64"):
            MultiClassSlices(list_slices(rings, "multiclass_train"), 64, prior=tmp_path)[0]


class TestLosses:
    @settings(deadline=None, max_examples=20)
    @given(hnp.arrays(np.int64, (2, 5, 6), elements=st.integers(0, 2)))
    def test_released_one_hot_is_off_by_one_in_memory(self, classes):
        """Against the released index arithmetic, written out pixel by pixel."""
        expected = np.zeros((2, 5 * 6 * 3))
        for n, labels in enumerate(classes.reshape(2, -1)):
            for pixel, label in enumerate(labels):
                expected[n, pixel * 3 + label - 1] = 1  # -1: the last place, as the released code has it
        expected = expected.reshape(2, 5, 6, 3).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(one_hot(torch.from_numpy(classes), official=True), expected)

    def test_rotated_channels_are_read_back(self, rings):
        """A network that learnt the released one-hot perfectly is right but at the lesions' left rims."""
        classes = torch.tensor(planes(rings)[2])[None].long()
        logits = 10 * one_hot(classes, official=True) - 5
        config = MultiClassConfig(channel_order="official")
        found = probabilities(logits, config).argmax(1)
        # a pixel whose right neighbour is background was given that class too
        rim = (classes[:, :, :-1] > 0) & (classes[:, :, 1:] == 0)
        clear = torch.ones_like(classes, dtype=bool)
        clear[:, :, :-1] &= ~rim
        # and a background pixel beside a lesion was given none
        clear[:, :, :-1] &= ~((classes[:, :, :-1] == 0) & (classes[:, :, 1:] > 0))
        assert clear.float().mean() > 0.9
        assert torch.equal(found[clear], classes[clear])
        plain = probabilities(logits, MultiClassConfig()).argmax(1)
        assert (plain[clear] == classes[clear]).float().mean() < 0.1

    def test_authors_network_is_read_in_its_order(self, rings):
        grey, prior, _ = planes(rings)
        torch.manual_seed(0)
        net = MultiClassUNet()
        plain = predict_slice(net, MultiClassConfig(size=64), grey, prior)
        official = predict_slice(net, MultiClassConfig(size=64, channel_order="official"), grey, prior)
        np.testing.assert_array_equal(official, plain[[2, 0, 1]])

    def test_bce_is_the_papers(self):
        logits, classes = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
        p = torch.sigmoid(logits)
        g = torch.stack([classes == k for k in range(3)], 1).float()
        expected = -(g * p.log() + (1 - g) * (1 - p).log()).mean()
        torch.testing.assert_close(multiclass_bce_loss(logits, classes).total, expected)

    def test_dice_loss_falls_with_the_error_and_weighs_classes(self):
        classes = torch.randint(3, (2, 16, 16))
        right = 20 * one_hot(classes)
        loss = multiclass_dice_loss(right, classes, (1, 1, 1))
        assert loss.total < 1e-3
        wrong = multiclass_dice_loss(right.roll(1, 1), classes, (1, 1, 1))
        assert wrong.dice > 0.9 and wrong.total == wrong.cross_entropy + wrong.dice
        heavy = multiclass_dice_loss(right.roll(1, 1), classes, (1, 1, 3)).cross_entropy
        share = (classes == 2).float().mean()
        torch.testing.assert_close(heavy / wrong.cross_entropy, 1 + 2 * share)


class Spot(torch.nn.Module):
    """Repeat the slice as logits, with one pixel of its own whatever the slice is turned to."""

    def __init__(self, height: float):
        super().__init__()
        self.height = torch.nn.Parameter(torch.tensor(height))

    def forward(self, x):
        logits = x[:, :3].clone()
        logits[:, :, 1, 2] += self.height
        return logits


def test_flips_average_over_eight_positions_turned_back(rings):
    grey = planes(rings)[0]
    plain, flips = (MultiClassConfig(prior="none", size=64, flips=f) for f in (False, True))
    once = predict_slice(Spot(0.0), plain, grey)
    np.testing.assert_allclose(predict_slice(Spot(0.0), flips, grey), once, atol=1e-6)
    spotted = [np.abs(predict_slice(Spot(50.0), config, grey) - once)[0] for config in (plain, flips)]
    assert [(s > 1e-3).sum() for s in spotted] == [1, 8]
    places = {(y, x) for a, b in ((1, 2), (2, 1)) for y in (a, 63 - a) for x in (b, 63 - b)}
    assert set(zip(*map(list, np.nonzero(spotted[1] > 1e-3)), strict=True)) == places


def test_consolidation_cut_is_the_best_of_all():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40), np.uint8) for _ in range(3)]
    classes = [rng.integers(0, 3, (40, 40)).astype(np.uint8) for _ in range(2)] + [
        np.ones((40, 40), np.uint8)
    ]
    cut = ConsolidationCut.fit(images, classes)

    def dice(grey):
        found = [ConsolidationCut(grey, 0).predict(i, c > 0) for i, c in zip(images, classes, strict=True)]
        return np.mean(
            [
                2 * ((f == k) & (c == k)).sum() / max(1, (f == k).sum() + (c == k).sum())
                for k in (1, 2)
                for f, c in zip(found, classes, strict=True)
            ]
        )

    assert cut.dice == pytest.approx(dice(cut.grey))
    assert cut.dice == pytest.approx(max(dice(grey) for grey in range(257)))


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "field"),
        [
            ({"size": 100}, "size"),
            ({"class_weights": [1, 2]}, "class_weights"),
            ({"prior_noise": -1.0}, "prior_noise"),
            ({"prior": "none", "eval_prior": "label"}, "eval_prior"),
            ({"channel_order": "official", "loss": "dice"}, "channel_order"),
            ({"network": "segnet"}, "network"),
            ({"output_stride": 32}, "output_stride"),
            ({"validate_every": 2}, "validate_every"),
        ],
    )
    def test_wrong_value_names_the_field(self, values, field):
        with pytest.raises(ConfigError, match=f"'{field}'"):
            parse_config(MultiClassConfig, values)

    def test_recipes(self):
        assert configure({"recipe": "paper"}) == MultiClassConfig()
        assert configure({}).size == 160 and configure({"data": "covid-semiseg"}).size == 224
        with pytest.raises(ConfigError, match="'recipe'"):
            configure({"recipe": "best"})

    def test_paper(self):
        config = MultiClassConfig()
        assert (config.optimizer, config.lr, config.momentum) == ("sgd", 1e-2, 0.7)
        assert (config.batch, config.epochs, config.size, config.loss) == (16, 200, 352, "bce")
        assert config.learning_rate(199) == 1e-2
        assert isinstance(build(config), MultiClassUNet)

    def test_prior_of_the_evaluated_slices_is_never_assumed(self, tiny, tmp_path):
        with pytest.raises(ConfigError, match="'eval_prior' is missing"):
            train(replace(tiny, eval_prior=""), tmp_path / "a")
        with pytest.raises(SliceError, match="patient9_1.png does not exist"):
            train(replace(tiny, eval_prior=str(tmp_path)), tmp_path / "b")


def test_scores_say_what_they_are_of(rings):
    files = list_slices(rings, "multiclass_test")
    truths = [read_classes(f.mask) for f in files]
    perfect = [np.stack([t == k for k in range(3)]).astype(np.float32) for t in truths]
    scores = score(perfect, files)
    for name in ("GGO", "consolidation"):
        assert scores[name]["dice_of_argmax"] == scores[name]["dice_where_present"] == 1
        # a perfect map of 0 and 1 has Dice 1 at all thresholds but 0, where everything is predicted
        assert 0.995 < scores[name]["toolbox_of_argmax"]["meanDic"] < 1
        assert scores[name]["slices_with"] == 3
    confusion = np.array(scores["confusion"])
    assert confusion.sum() == 3 * 64 * 64 and np.trace(confusion) == confusion.sum()
    # all consolidation called GGO: what is left of GGO is its share of the lesion
    mixed = [np.stack([t == 0, t > 0, t > 2]).astype(np.float32) for t in truths]
    scores = score(mixed, files)
    share = [(t == 1).sum() / (t > 0).sum() for t in truths]
    assert scores["GGO"]["dice_of_argmax"] == pytest.approx(np.mean([2 * s / (1 + s) for s in share]))
    assert scores["consolidation"]["dice_of_argmax"] == 0
    assert np.array(scores["confusion"])[2].tolist() == [0, sum((t == 2).sum() for t in truths), 0]
    json.dumps(scores, allow_nan=False)


def test_one_grey_value_is_scored_within_the_prior(rings, tmp_path):
    files, held_out = (list_slices(rings, part) for part in ("multiclass_train", "multiclass_test"))
    perfect = grey_reference(files, held_out, "label")
    assert perfect["consolidation"]["dice_of_argmax"] > 0.8 and 100 < perfect["grey"] < 160
    for f in held_out:  # a prior without lesion
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / f"{f.name}.png")
    blind = grey_reference(files, held_out, tmp_path)
    assert blind["GGO"]["dice_of_argmax"] == 0 and blind["grey"] == perfect["grey"]


@pytest.mark.parametrize("network", ["unet", "fcn8s", "deeplab"])
@pytest.mark.parametrize("prior", ["label", "none"])
def test_every_network_takes_a_step(tiny, tmp_path, network, prior):
    config = replace(
        tiny,
        network=network,
        width=8,
        prior=prior,
        eval_prior="label" if prior == "label" else "",
        epochs=1,
        loss="bce",
        optimizer="sgd",
        size=32,
    )
    run = train(config, tmp_path)
    net, its_config = load_network(run.weights_path)
    assert its_config == config
    grey, label, _ = planes(Path(tiny.data))
    maps = predict_slice(net, config, grey, label if prior == "label" else None)
    assert maps.shape == (3, 64, 64) and maps.min() >= 0 and maps.max() <= 1
    with pytest.raises(ValueError, match="takes"):
        predict_slice(net, config, grey, None if prior == "label" else label)


@pytest.mark.slow
def test_learns_rings_and_fills_the_run_folder(tiny, tmp_path):
    config = replace(tiny, fold=0, epochs=30, drop_epoch=25, validate_every=15)
    run = train(config, tmp_path)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files >= {
        "config.json",
        "log.csv",
        "checkpoint/last.pt",
        "weights.safetensors",
        "metrics.json",
        "model_card.md",
        "predictions/patient1_1.png",
        "predictions/patient1_2.png",
        "validation/epoch_0015.png",
    }
    scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]
    assert scores["one grey value"]["GGO"]["slices_with"] == 2
    assert scores["GGO"]["dice_of_argmax"] > 0.7 and scores["consolidation"]["dice_of_argmax"] > 0.6
    # the stored weights are those that made the stored maps
    _, held_out = split_slices(config)
    net, its_config = load_network(run.weights_path)
    again = predict_slice(net, its_config, read_image(held_out[0].image), read_prior(held_out[0], "label"))
    np.testing.assert_array_equal(read_classes(tmp_path / "predictions" / "patient1_1.png"), again.argmax(0))
    card = (tmp_path / "model_card.md").read_text()
    assert "Not for diagnosis" in card and "GGO, toolbox_of_argmax, meanDic" in card


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path):
    """SIGKILL after the second and the fourth epoch; dropout and noise go on as if nothing had happened."""
    config = replace(tiny, epochs=6, drop_epoch=4)
    train(config, tmp_path / "whole")
    out, settings_file = tmp_path / "killed", tmp_path / "whole" / "config.json"
    command = [sys.executable, "-m", "covidnb.training.multiclass", str(settings_file), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for epochs in (2, 4):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while epochs_logged(out) < epochs:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    for name in ("weights.safetensors", "predictions/patient9_2.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert epochs_logged(out) == 6


@pytest.mark.slow
def test_two_processes_learn_as_one(tiny, tmp_path):
    """The U-Net: dropout, which the others have, is drawn by each process for itself."""
    config = replace(tiny, network="unet", width=8, fold=0, batch=4, epochs=2, validate_every=1)
    logs = []
    for devices in (1, 2):
        train(replace(config, devices=devices), tmp_path / str(devices))
        logs.append(np.genfromtxt(tmp_path / str(devices) / "log.csv", delimiter=",", names=True))
    for name in ("total", "cross_entropy", "dice"):
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-3)


def test_weights_of_infnet_make_the_prior(tiny, tmp_path):
    """And are refused where they have learnt the slices that are held out."""
    source = tiny_infnet(tiny.data, fold=1)
    run = Run(tmp_path / "infnet", source)
    run.save_weights(infnet.build(source))
    config = replace(tiny, epochs=1, fold=1, eval_prior=str(run.weights_path))
    train(config, tmp_path / "run")
    made = {p.stem: read_mask(p) for p in (tmp_path / "run" / "prior").iterdir()}
    assert set(made) == {"patient2_1", "patient2_2"}
    with pytest.raises(ConfigError, match="held out fold 1, not 0: its maps"):
        train(replace(config, fold=0), tmp_path / "other")
    train(replace(config, fold=None), tmp_path / "test")  # the test part, nobody has learnt from
    assert {p.stem for p in (tmp_path / "test" / "prior").iterdir()} == {f"patient9_{k}" for k in (1, 2, 3)}


def stored(config: MultiClassConfig, folder: Path, seed: int) -> str:
    """Weights of an untrained network on classes, as a run would have stored them; returns their path."""
    torch.manual_seed(seed)
    run = Run(folder, config)
    run.save_weights(build(config))
    return str(run.weights_path)


def test_average_of_networks_under_another_prior(tiny, tmp_path, capsys):
    small = replace(tiny, network="unet", width=4, size=32, seed=0)
    weights = [stored(small, tmp_path / str(seed), seed) for seed in (0, 1)]
    _, held_out = split_slices(small)
    for f in held_out:  # the left half of each slice
        half = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((64, 1), np.uint8)
        (tmp_path / "halves").mkdir(exist_ok=True)
        Image.fromarray(half).save(tmp_path / "halves" / f"{f.name}.png")
    asked = ["--data", small.data, "--prior", str(tmp_path / "halves")]
    average.main([str(tmp_path / "both"), *weights, *asked, "--lesions", "prior"])
    printed = json.loads(capsys.readouterr().out)
    networks, by_hand = [load_network(path) for path in weights], []
    for f in held_out:
        prior = read_prior(f, tmp_path / "halves")
        each = [predict_slice(*network, read_image(f.image), prior) for network in networks]
        by_hand.append(np.mean([named_within(one, prior >= 128) for one in each], axis=0))
        classes = read_classes(tmp_path / "both" / "predictions" / f"{f.name}.png")
        np.testing.assert_array_equal(classes > 0, prior >= 128)
        np.testing.assert_array_equal(classes, by_hand[-1].argmax(0))
    expected = score(by_hand, held_out)
    for kind in ("GGO", "consolidation"):
        assert printed[kind]["dice_where_present"] == expected[kind]["dice_where_present"]
    assert "one grey value" in json.loads((tmp_path / "both" / "metrics.json").read_text())["scores"]
    average.main([str(tmp_path / "glass"), *weights, *asked, "--lesions", "prior", "--consolidation", "1e-6"])
    for f, maps in zip(held_out, by_hand, strict=True):  # all lesion, nearly none of it consolidation
        glass = read_classes(tmp_path / "glass" / "predictions" / f"{f.name}.png")
        np.testing.assert_array_equal(glass > 0, maps.argmax(0) > 0)
        np.testing.assert_array_equal(glass == 2, (1e-6 * maps[2] > maps[1]) & (maps[0] == 0))
    average.main([str(tmp_path / "free"), *weights, *asked])
    free = read_classes(tmp_path / "free" / "predictions" / f"{held_out[-1].name}.png")
    np.testing.assert_array_equal(free, np.mean(each, axis=0).argmax(0))


def test_average_refuses_what_would_be_no_score(tiny, tmp_path):
    weights = stored(replace(tiny, network="unet", width=4, fold=1), tmp_path / "run", 0)
    with pytest.raises(ConfigError, match="'prior' is 'none', but the network of .* takes an"):
        average.evaluate(average.AverageConfig((weights,), data=tiny.data), tmp_path / "out")
    with pytest.raises(ConfigError, match="held out fold 1, not 0: its maps"):
        average.evaluate(average.AverageConfig((weights,), "label", data=tiny.data, fold=0), tmp_path / "out")
    with pytest.raises(SliceError, match="does not exist: a folder of priors"):
        average.evaluate(
            average.AverageConfig((stored(tiny, tmp_path / "any", 0),), str(tmp_path), data=tiny.data),
            tmp_path / "out",
        )
    with pytest.raises(ConfigError, match="holds a network, not maps"):
        average.evaluate(average.AverageConfig((weights,), weights, data=tiny.data), tmp_path / "out")
    with pytest.raises(SystemExit, match="error: .*none.safetensors"):
        average.main([str(tmp_path / "out"), str(tmp_path / "none.safetensors")])
    with pytest.raises(ConfigError, match="'consolidation' must be positive"):
        average.AverageConfig((weights,), "label", consolidation=0.0)
    with pytest.raises(ConfigError, match="at least one weights"):
        average.AverageConfig()
    with pytest.raises(ConfigError, match="'lesions': the network was to learn without"):
        MultiClassConfig(prior="none", lesions="prior")
    assert not (tmp_path / "out").exists()


@given(
    hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=32)),
    hnp.arrays(bool, (4, 5)),
)
def test_named_within_names_all_of_the_lesion_and_nothing_else(maps, lesion):
    named = named_within(maps, lesion)
    classes = named.argmax(0)
    np.testing.assert_array_equal(classes > 0, lesion)
    np.testing.assert_allclose(named.sum(0), 1, rtol=1e-5)
    sure = lesion & (np.abs(maps[1] - maps[2]) > 1e-6)
    np.testing.assert_array_equal(classes[sure], 1 + (maps[2] > maps[1])[sure])


def test_other_weights_are_refused(tmp_path):
    source = tiny_infnet(tmp_path)
    run = Run(tmp_path, source)
    run.save_weights(infnet.build(source))
    with pytest.raises(ConfigError, match="InfNet that knows no classes"):
        load_network(run.weights_path)


def test_real_priors_are_the_doctors_labels(data_dir):
    for item in list_slices(data_dir / "covid-semiseg", "multiclass_train"):
        np.testing.assert_array_equal(read_prior(item, "label") > 0, read_classes(item.mask) > 0)


def test_real_priors_lose_what_is_said(data_dir):
    """Mean Dice of the doctors' labels with what `imperfect_prior` makes of them, one draw of each."""
    files = list_slices(data_dir / "covid-semiseg", "multiclass_train")
    labels = [resized_square(read_prior(item, "label"), 256) / 255 for item in files]
    for strength, expected in ((0.5, 0.82), (1.0, 0.67)):
        rng = np.random.default_rng(0)
        maps = [imperfect_prior(label, strength, rng) for label in labels]
        assert dice_at(maps, labels) == pytest.approx(expected, abs=0.03)
