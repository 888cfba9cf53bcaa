"""Run folders, exact resume and the Inf-Net loop on slices that the tests make."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from discs import epochs_logged, make_slices, tiny_infnet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from covidnb.files import whole
from covidnb.nets import InfNet
from covidnb.training import infnet
from covidnb.training.infnet import InfNetConfig, load_network, predict_slices, split_slices, train
from covidnb.training.loop import JointBatches, has_stalled
from covidnb.training.run import ConfigError, Run, check_finite, notebook_parameters, parse_config
from covidnb.training.threshold import GreyBand


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("discs")
    train_names = [f"patient{p}_{k}" for p in range(1, 6) for k in (1, 2)]
    make_slices(root, "TrainingSet/LungInfection-Train/Doctor-label", train_names)
    make_slices(root, "TestingSet/LungInfection-Test", ["patient9_1", "patient9_2", "patient9_3"])
    return root


@pytest.fixture(scope="module")
def tiny(discs) -> InfNetConfig:
    return tiny_infnet(discs)


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

    def test_released_schedule_stops_training(self):
        config = InfNetConfig(official_schedule=True)
        rates = [config.learning_rate(e) for e in (49, 50, 51, 53)]
        assert rates == pytest.approx([1e-4, 1e-5, 1e-6, 1e-8])

    @pytest.mark.parametrize(
        "values", [{"patience": 2, "fold": 0}, {"batch": 5, "devices": 2}, {"devices": 0}]
    )
    def test_values_that_need_others_are_refused(self, values):
        with pytest.raises(ConfigError, match="parameter '"):
            InfNetConfig(**values)

    def test_notebook_parameters_are_its_plain_values(self):
        names = {"data": "x", "epochs": 3, "_hidden": 1, "In": [], "Out": {}, "Path": Path, "fold": None}
        assert notebook_parameters(names) == {"data": "x", "epochs": 3, "fold": None}


def test_a_folder_goes_on_with_its_own_config_only(tmp_path):
    config = InfNetConfig(seed=3)
    Run(tmp_path, config).checkpoint_path.parent.mkdir()
    (tmp_path / "checkpoint" / "last.pt").touch()
    Run(tmp_path, config)
    with pytest.raises(ConfigError, match=r"was started with seed 3 \(now 4\): choose another folder"):
        Run(tmp_path, replace(config, seed=4))
    # a config of an older version, which had no such field, was as its default
    old = json.loads((tmp_path / "config.json").read_text())
    del old["clamp"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    Run(tmp_path, config)
    with pytest.raises(ConfigError, match="was started with clamp 0.5"):
        Run(tmp_path, replace(config, clamp=1.0))


def test_a_loss_that_is_no_number_is_refused():
    check_finite({"total": 1.0}, "epoch 1")
    with pytest.raises(ConfigError, match="epoch 7: the loss 'edge' is inf.*precision 32-true"):
        check_finite({"total": 1.0, "edge": float("inf")}, "epoch 7")


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
        write = Path.write_bytes

        def full(path, content):
            write(path, bytes(content)[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"no room to write .*last\.pt: free some space"):
            run.save_checkpoint({"epoch": 2})
        with pytest.raises(OSError, match=r"no room to write .*weights\.safetensors"):
            run.save_weights(torch.nn.Linear(2, 2))
        assert run.load_checkpoint() == {"epoch": 1}
        assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"config.json", "last.pt"}

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
        with pytest.raises(ConfigError, match="holds a Linear, not one of InfNet, UNet"):
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
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {
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


@pytest.mark.parametrize(
    "part",
    [{"network": "unet", "width": 8}, {"network": "unet++", "width": 4}]
    + [{"edge": e, "reverse": r} for e, r in ((False, False), (True, False), (False, True))],
)
def test_baselines_and_parts_learn_by_the_same_loop(tiny, tmp_path, part):
    config = replace(tiny, epochs=6, drop_epoch=6, lr=3e-3, **part)
    run = train(config, tmp_path)
    losses = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    assert losses["total"][-1] < 0.9 * losses["total"][0]
    net, its_config = load_network(run.weights_path)
    assert its_config == config
    _, held_out = split_slices(config)
    assert predict_slices(net, held_out, 64)[0].shape == (64, 64)


def test_parts_have_the_outputs_that_they_name():
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for edge, reverse in ((False, False), (True, False), (False, True), (True, True)):
            out = InfNet("efficientnet_lite0", edge=edge, reverse=reverse).eval()(x)
            assert (out.edge is not None) == edge
            assert (out.side2 is not None) == (edge or reverse)
            assert out.prediction is (out.side2 if edge or reverse else out.global_map)


def test_validation_is_logged_and_pictured(tiny, tmp_path):
    config = replace(tiny, epochs=3, fold=1, validate_every=2, size=32)
    train(config, tmp_path)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0].endswith("meanDic,dice_at_0.5") and rows[1].endswith(",,") and not rows[2].endswith(",")
    pictures = list((tmp_path / "validation").iterdir())
    assert [p.name for p in pictures] == ["epoch_0002.png"]
    width, height = Image.open(pictures[0]).size
    assert height == 3 * 128 and width == 128 * len(split_slices(config)[1])


@pytest.mark.parametrize(
    ("scores", "patience", "stalled"),
    [([], 1, False), ([0.1, 0.3, 0.2], 1, True), ([0.1, 0.3, 0.2], 2, False), ([0.5, 0.1, 0.1], 0, False)]
    + [([0.3, 0.1, 0.2], 2, True), ([0.1, 0.2, 0.3], 1, False)],
)
def test_stalls_after_patience(scores, patience, stalled):
    rows = [row for s in scores for row in ({"meanDic": s}, {"total": 1.0})]
    assert has_stalled(rows, patience) == stalled


def test_early_stop_keeps_the_best_weights(tiny, tmp_path, monkeypatch):
    """The held-out fold improves once; the run stops two validations later with the weights of that epoch."""
    scores, seen = iter([0.2, 0.5, 0.4, 0.3, 0.9]), []

    def validate(files, size, net):
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"meanDic": next(scores), "dice_at_0.5": 0.0}, np.zeros((3, 3, 3), np.uint8)

    monkeypatch.setattr(infnet, "validate", validate)
    config = replace(tiny, epochs=9, fold=1, validate_every=1, patience=2, size=32)
    run = train(config, tmp_path)
    assert epochs_logged(tmp_path) == 4
    stored = load_network(run.weights_path)[0].state_dict()
    assert all(torch.equal(stored[k], seen[1][k]) for k in stored)
    weights = run.weights_path.read_bytes()
    (tmp_path / "metrics.json").unlink()
    train(config, tmp_path)  # a crash before the scores: the stop and the best weights are remembered
    assert epochs_logged(tmp_path) == 4 and run.weights_path.read_bytes() == weights


def test_warm_start_goes_on_from_other_weights(tiny, tmp_path):
    first = train(replace(tiny, epochs=1, size=32), tmp_path / "first")
    second = replace(tiny, epochs=1, size=32, start=str(first.weights_path), lr=1e-9)
    stored = load_network(train(second, tmp_path / "second").weights_path)[0].state_dict()
    for name, value in load_network(first.weights_path)[0].named_parameters():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="'start': .* has edge True, this run False"):
        train(replace(second, edge=False), tmp_path / "third")


def test_bf16_learns_what_float32_does(tiny, tmp_path):
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        train(replace(tiny, epochs=2, precision=precision), tmp_path / precision)
        losses.append(np.genfromtxt(tmp_path / precision / "log.csv", delimiter=",", names=True)["total"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_lack_of_memory_is_advice(tiny, tmp_path, monkeypatch):
    def hungry(*_):
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(infnet, "training_step", hungry)
    with pytest.raises(ConfigError, match="out of memory with 'batch' 5 .* try batch 2, precision"):
        train(tiny, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


class TestJointBatches:
    @given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
    def test_shares_make_up_the_joint_batches(self, length, batch, world, epoch):
        def drawn(rank, world):
            batches = JointBatches(length, batch, 7, rank, world)
            batches.epoch = epoch
            return list(batches)

        joint = drawn(0, 1)
        assert sorted(k for some in joint for k in some) == list(range(length))
        shares = [drawn(rank, world) for rank in range(world)]
        for whole_batch, *parts in zip(joint, *shares, strict=True):
            assert len({len(part) for part in parts}) == 1  # nobody waits for the others in vain
            together = [k for part in parts for k in part]
            assert set(together) == set(whole_batch) and len(together) - len(whole_batch) < world

    def test_epochs_differ_and_repeat(self):
        batches = JointBatches(20, 4, 0)
        first = list(batches)
        batches.epoch = 1
        assert list(batches) != first
        batches.epoch = 0
        assert list(batches) == first


@pytest.mark.slow
def test_two_processes_learn_as_one(tiny, tmp_path):
    """Under torchrun, by gloo: the same losses as one process with the joint batch, batch norms included."""
    config = replace(tiny, epochs=4, batch=10, lr=1e-4)  # small steps: rounding does not grow
    train(config, tmp_path / "one")
    train(replace(config, devices=2), tmp_path / "two")
    one, two = (
        np.genfromtxt(tmp_path / name / "log.csv", delimiter=",", names=True) for name in ("one", "two")
    )
    np.testing.assert_allclose(two["total"], one["total"], rtol=2e-3)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["slices"]["evaluated"] == 3


@pytest.mark.slow
def test_two_processes_take_the_same_first_step(tmp_path):
    """A step of two processes equals the joint step to rounding: loss, gradients, running statistics."""
    script = tmp_path / "step.py"
    script.write_text(JOINT_STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(script)], check=True, stderr=subprocess.DEVNULL)


JOINT_STEP = """
import torch
from lightning_fabric import Fabric
from covidnb.losses import infnet_loss
from covidnb.nets import InfNet
from covidnb.training.loop import join_batch_norms

def step(net, x, m, backward):
    loss = infnet_loss(net(x), m, m).total
    backward(loss)
    return loss.detach()

torch.manual_seed(0)
x, m = torch.randn(4, 3, 64, 64), (torch.rand(4, 1, 64, 64) > 0.7).float()
alone = InfNet("efficientnet_lite0").double()
shared = InfNet("efficientnet_lite0").double()
shared.load_state_dict(alone.state_dict())
expected = step(alone, x.double(), m.double(), torch.Tensor.backward)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
join_batch_norms(shared)
net = fabric.setup(shared)
mine = slice(fabric.global_rank, None, 2)
loss = fabric.all_reduce(step(net, x[mine].double(), m[mine].double(), fabric.backward))
torch.testing.assert_close(loss, expected)
for (name, p), q in zip(shared.named_parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)
for (name, p), q in zip(shared.named_buffers(), alone.buffers(), strict=True):
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=name)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler (g++)")
def test_compiled_network_learns_the_same(tiny, tmp_path):
    part = {"network": "unet", "width": 2, "size": 32, "epochs": 1}
    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        run = train(replace(tiny, compile=compiled, **part), folder)
        losses.append(float(np.genfromtxt(folder / "log.csv", delimiter=",", names=True)["total"]))
        assert load_network(run.weights_path)[0].head.weight.shape == (1, 2, 1, 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
