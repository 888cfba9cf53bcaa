"""GASNet's training on the phantom: what each term reaches, the log, exact resume, scores on the scan."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from covidnb.losses import GASNET_WEIGHTS, SILENCES
from covidnb.metrics import volume_scores
from covidnb.training import gasnet
from covidnb.training.gasnet import (
    ABLATION,
    RECIPES,
    TERMS,
    Game,
    GasnetConfig,
    StepVolumes,
    configure,
    load_network,
    pools_of,
    train,
    verdicts,
    warnings_of,
)
from covidnb.training.infnet import InfNetConfig
from covidnb.training.loop import start_fabric
from covidnb.training.run import ConfigError, Run
from covidnb.training.volume_evaluation import evaluate_volumes
from covidnb.volumes import LungVolumes, list_volumes, scan_of
from covidnb.volumes.phantom import phantom_volumes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COVIDNB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield phantom_volumes((8, 32, 32), covid=2, healthy=2, validation=2)


@pytest.fixture(scope="module")
def tiny(root) -> GasnetConfig:
    """All terms from the first step on but one, in float32."""
    return configure(
        {
            "recipe": "glance",
            "data": str(root),
            "width": 4,
            "game_width": 4,
            "game_levels": 2,
            "steps": 6,
            "log_every": 2,
            "generated_to_d": 0.1,
            "adversarial_segmenter_from": 3,
            "paste_from": 0,
            "multiple_instance_from": 0,
            "precision": "32-true",
        }
    )


def game_of(config, saved=None):
    torch.set_num_threads(1)
    pools = pools_of(config, augment=True)
    shape = tuple(pools["labelled"][0]["image"].shape[1:])
    return Game(start_fabric(config), config, shape, saved), StepVolumes(config, pools)


def log_of(folder):
    """Columns of the log; None where a row has nothing."""
    with open(folder / "log.csv") as stream:
        rows = list(csv.DictReader(stream))
    return {
        name: [float(row[name]) if row[name] else None for row in rows]
        for name in rows[0]
        if name != "warning"
    }


def weights_of(net):
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


# --- config


def test_the_paper_is_the_default():
    config = configure({"recipe": "paper"})
    assert config == GasnetConfig()
    assert {term: getattr(config, term) for term in TERMS} == GASNET_WEIGHTS
    for name, silence in SILENCES.items():
        assert getattr(config, f"silence_{name}") == silence.below
    assert [config.weight("paste", step) for step in (4_999, 5_000)] == [0, 100]
    rates = [config.learning_rate("s", step) for step in (0, 9_999, 10_000, 20_000)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5])
    assert config.learning_rate("d", 14_999) == 1e-5 and config.learning_rate("g", 15_000) == 5e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_and_their_ablation(recipe):
    configs = gasnet.ablation({"recipe": recipe}, list(ABLATION))
    assert configs["gasnet"] == configure({"recipe": recipe})
    assert configs["labelled"].kinds == ("labelled",) and not configs["labelled"].plays
    assert configs["healthy"].kinds == ("labelled", "healthy")
    assert configs["gasnet"].kinds == ("labelled", "covid", "healthy") and configs["gasnet"].plays
    assert len({str(config) for config in configs.values()}) == len(configs), "a variant is no other"


@pytest.mark.parametrize(
    ("data", "recipe"),
    [("phantom", "glance"), ("implants", "laptop"), ("medseg2", "laptop"), ("my/volumes", "lite")],
)
def test_recipe_of_data(data, recipe):
    assert configure({"data": data}) == configure({"data": data, "recipe": recipe})


def test_unknown_variant_is_named():
    with pytest.raises(ConfigError, match="'variants': 'no mil' is not one of labelled, healthy"):
        gasnet.ablation({}, ["no mil"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("paste", -1.0), ("labelled", 0.0), ("size", [8, 32]), ("s_lr", 2.0), ("ema", 1.0)]
    + [("validate_every", 3), ("network", "unet"), ("adversarial_segmenter_from", -1)],
)
def test_wrong_value_names_the_field(name, value):
    with pytest.raises(ConfigError, match=f"'{name}'"):
        configure({name: value})


# --- what a step sees and does


def test_volumes_of_a_step_depend_on_seed_and_step_alone(tiny):
    config = replace(tiny, in_a_row=2, d_steps=2, batch=2)
    volumes, again = (StepVolumes(config, pools_of(config, augment=True)) for _ in range(2))
    last = [again[step] for step in (5, 3, 1)]  # in another order, as after a resume
    for step, expected in zip((1, 3, 5), reversed(last), strict=True):
        item = volumes[step]
        assert torch.equal(item["covid"]["image"], expected["covid"]["image"])
        assert torch.equal(item["turns"][3]["healthy"]["image"], expected["turns"][3]["healthy"]["image"])
    assert volumes[0]["turns"] == [] and len(item["turns"]) == 4
    images = item["labelled"]["image"]
    assert images.shape == (2, 1, 8, 32, 32) and not torch.equal(images[0], images[1])
    other = StepVolumes(replace(config, seed=1), volumes.pools)
    assert not torch.equal(other[5]["covid"]["image"], item["covid"]["image"])


@pytest.mark.parametrize("joint", [True, False])
def test_whom_the_game_reaches(tiny, joint):
    """The adversarial term alone: G learns from it, S from its step on, D from its own terms."""
    only = dict.fromkeys(TERMS, 0.0) | {"adversarial": 1.0, "labelled": 1e-30}
    config = replace(tiny, joint_step=joint, **only)
    game, volumes = game_of(config)
    batches = volumes[0]
    for step, reaches_s in ((0, False), (3, True)):
        game.optimizers.s.zero_grad()
        game.optimizers.g.zero_grad()
        before = weights_of(game.bare.d)
        masks = gasnet.find(game.nets.s, {"covid": batches["covid"]["image"]})
        gasnet.game_terms(config, step, game.nets, batches, masks["covid"]).total.backward()
        assert torch.equal(weights_of(game.bare.d), before)
        largest = max((p.grad.abs().max() for p in game.bare.s.parameters() if p.grad is not None), default=0)
        assert (largest > 0) == reaches_s
        assert max(p.grad.abs().max() for p in game.bare.g.parameters()) > 0
    before = [weights_of(net) for net in game.bare]
    game._step_of_d(0, batches["turns"][0])
    assert [torch.equal(weights_of(n), w) for n, w in zip(game.bare, before, strict=True)] == [
        True,
        True,
        False,
    ]
    game._step_of_s_and_g(0, batches)
    assert all(p.requires_grad for p in game.bare.d.parameters())


def test_terms_count_from_their_steps(tiny):
    config = replace(tiny, paste_from=2, healthy_from=1, adversarial_from=2, generated_to_d_from=1)
    game, volumes = game_of(config)
    seen = [set(game.step(step, volumes[step])) & set(TERMS) for step in range(3)]
    assert seen[0] == {"reconstruction", "multiple_instance", "labelled"}
    assert seen[1] - seen[0] == {"generated_to_d", "healthy"}
    assert seen[2] - seen[1] == {"adversarial", "paste"}


def test_weights_scale_the_loss(tiny):
    each = {"labelled": torch.tensor(2.0), "paste": torch.tensor(3.0)}
    config = replace(tiny, labelled=5.0, paste=0.5, paste_from=4)
    assert float(gasnet.weighed(config, 3, each).total) == 10
    assert float(gasnet.weighed(config, 4, each).total) == 11.5


def test_a_silenced_loss_hardly_pulls(tiny):
    game, volumes = game_of(replace(tiny, silence_discriminator=100.0, d_optimizer="rmsprop"))
    assert float(game._silenced(torch.tensor(2.0), "discriminator")) == pytest.approx(2e-6)
    assert float(game._silenced(torch.tensor(2.0), "segmentation")) == 2.0


def test_without_a_game_there_is_no_opponent(tiny):
    config = replace(tiny, **ABLATION["healthy"])
    game, volumes = game_of(config)
    assert game.bare.g is None and game.bare.d is None
    seen = game.step(0, volumes[0])
    assert {"labelled", "healthy", "share_labelled", "share_healthy"} == set(seen)


def test_running_mean_follows_slowly(tiny):
    game, volumes = game_of(replace(tiny, ema=0.9))
    game.step(0, volumes[0])
    first = weights_of(game.bare.s)
    assert torch.equal(weights_of(game.segmenter), first)
    game.step(1, volumes[1])
    expected = 0.9 * first + 0.1 * weights_of(game.bare.s)
    torch.testing.assert_close(weights_of(game.segmenter), expected)


# --- what goes wrong is said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"share_covid": 0.01}, "segmenter empty"),
        ({"share_healthy": 80.0}, "segmenter everywhere"),
        ({"change": 4.0}, "generator copying"),
        ({}, None),
    ],
)
def test_what_goes_wrong_is_named_with_a_remedy(row, said):
    fine = {"share_covid": 8.0, "share_healthy": 1.0, "share_labelled": 9.0, "change": 200.0}
    warnings = warnings_of(fine | row)
    assert [w.split(":")[0] for w in warnings] == ([said] if said else [])
    assert all("'" in w for w in warnings), "no parameter is named"


def test_an_empty_segmenter_is_in_the_log(tiny, tmp_path):
    config = replace(tiny, healthy=1e4, labelled=1e-6, s_lr=0.02, steps=12, adversarial=1e-9, paste=0.0)
    train(replace(config, multiple_instance=0.0), tmp_path)
    assert "segmenter empty" in (tmp_path / "log.csv").read_text().splitlines()[-1]


# --- runs


def test_run_folder(tiny, root, tmp_path):
    config = replace(tiny, validate_every=6)
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
        "predictions/validation01.nii.gz",
        "predictions/validation02.nii.gz",
        *(f"validation/step_000{k}.png" for k in (2, 4, 6)),
    }
    log = log_of(tmp_path)
    assert log["step"] == [2, 4, 6]
    assert log["Dice"][:2] == [None, None] and set(TERMS) - {"original_to_d"} < set(log)
    assert np.isfinite([log[name] for name in ("d_own", "d_original_to_d", "d_right", "change")]).all()
    assert Image.open(tmp_path / "validation" / "step_0006.png").size == (4 * 96, 3 * 96)
    card = (tmp_path / "model_card.md").read_text()
    assert "Not for diagnosis" in card and "5 volumes trained on, 2 volumes evaluated on" in card
    # stored weights, stored masks and stored scores belong together
    net, its_config = load_network(run.weights_path)
    assert its_config == config
    scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]
    assert scores == json.loads(json.dumps(evaluate_volumes(net, root)))
    assert scores["crop"]["mean"]["Dice"] == pytest.approx(log["Dice"][-1])
    scan = scan_of(root, "validation01")
    found = sitk.ReadImage(tmp_path / "predictions" / "validation01.nii.gz")
    assert found.GetSize() == scan.ct.GetSize()
    arrays = [sitk.GetArrayFromImage(image) for image in (found, scan.lesions)]
    expected = volume_scores(*arrays, scan.ct.GetSpacing()[::-1])["Dice"]
    row = next(r for r in scores["per_volume"] if (r["name"], r["grid"]) == ("validation01", "scan"))
    assert row["Dice"] == pytest.approx(expected)


def test_the_discriminator_judges_every_volume(tiny, root, tmp_path):
    run = train(replace(tiny, steps=2), tmp_path)
    rows = verdicts(run)
    names = [f.name for split in ("covid", "healthy", "validation") for f in list_volumes(root, split)]
    assert [row["name"] for row in rows] == names
    assert all(0 < row["diseased"] < 1 for row in rows)
    assert [row["share"] is None for row in rows] == [name.startswith("healthy") for name in names]
    saved = run.load_checkpoint()
    d = gasnet.build(run.config, (8, 32, 32)).d
    d.load_state_dict(saved["nets"]["d"])
    item = LungVolumes(list_volumes(root, "healthy"))[0]
    by_hand = torch.sigmoid(d.eval()(item["image"][None]).logit).item()
    assert rows[names.index(item["name"])]["diseased"] == pytest.approx(by_hand)
    alone = train(gasnet.ablation(asdict(replace(tiny, steps=2)), ["healthy"])["healthy"], tmp_path / "alone")
    with pytest.raises(ConfigError, match="no discriminator"):
        verdicts(alone)


def test_a_loss_that_is_no_number_stops_before_the_checkpoint(tiny, tmp_path, monkeypatch):
    step = Game.step

    def ruined(self, number, batches):
        seen = step(self, number, batches)
        return seen | {"labelled": torch.tensor(torch.nan)} if number == 3 else seen

    monkeypatch.setattr(Game, "step", ruined)
    with pytest.raises(ConfigError, match="step 4: the loss 'labelled' is nan.*lower learning rate"):
        train(tiny, tmp_path)
    assert [row["step"] for row in Run(tmp_path, tiny).load_checkpoint()["history"]] == [2]


def test_scan_no_longer_there_is_no_fault(tiny, root, tmp_path, monkeypatch):
    """Scores and masks are then the volume's own; a healthy volume has a share and no Dice."""
    import covidnb.volumes
    from covidnb.ct import CTError

    def gone(root, name):
        raise CTError("no such file")

    monkeypatch.setattr(covidnb.volumes, "scan_of", gone)
    net = gasnet.build(tiny, (8, 32, 32)).s
    scores = evaluate_volumes(net, root, tmp_path, split="healthy")
    assert scores["scan"]["volumes"] == 0 and set(scores["crop"]["mean"]) == {"share_found"}
    assert sitk.ReadImage(tmp_path / "healthy01.nii.gz").GetSize() == (32, 32, 8)


def test_a_missed_volume_counts_and_is_counted(root):
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.zeros_like(x)

    scores = evaluate_volumes(Blind(), root)["crop"]
    assert scores["missed"] == scores["volumes"] == 2 and scores["mean"]["Dice"] == 0
    assert "HD95" not in scores["mean"]


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint" / "last.pt", weights_only=True)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert key == "seconds" or assert_same(one[key], other[key]) is None
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "part", [{}, {"joint_step": False, "in_a_row": 2, "d_steps": 2, "d_optimizer": "rmsprop"}]
)
def test_interrupted_is_uninterrupted(tiny, tmp_path, monkeypatch, part):
    """All networks, optimisers and the running mean, to the last bit."""
    config = replace(tiny, **part)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        write = Run.save_checkpoint

        def stop_after(run, state):
            write(run, state)
            raise KeyboardInterrupt

        patch.setattr(Run, "save_checkpoint", stop_after)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "resumed")
    assert [row["step"] for row in checkpoint_of(tmp_path / "resumed")["history"]] == [2, 4]
    train(config, tmp_path / "resumed")
    states = [checkpoint_of(tmp_path / name) for name in ("whole", "resumed")]
    assert set(states[0]["optimizers"]) == set(states[0]["nets"]) == {"s", "g", "d"}
    assert_same(*states)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path):
    """SIGKILL at moments drawn from a seed; the weights at the end are the same to the last bit."""
    config = replace(tiny, steps=12, log_every=1)
    torch.set_num_threads(1)
    train(config, tmp_path / "whole")
    out, rng, kills = tmp_path / "killed", np.random.default_rng(3), 0
    settings = str(tmp_path / "whole" / "config.json")
    command = [sys.executable, "-m", "covidnb.training.gasnet", settings, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def rows():
        log = out / "log.csv"
        return len(log.read_text().splitlines()) if log.exists() else 0

    while kills < 3:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        before = rows()
        while rows() <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    for name in ("weights.safetensors", "predictions/validation02.nii.gz"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("network", ["unet3d", pytest.param("vnet", marks=pytest.mark.slow)])
def test_baselines_learn_by_the_same_loop(tiny, tmp_path, network):
    width = 4 if network == "unet3d" else None
    config = replace(tiny, network=network, width=width, steps=2, **ABLATION["healthy"])
    run = train(config, tmp_path)
    net, _ = load_network(run.weights_path)
    assert net(torch.zeros(1, 1, 8, 32, 32)).shape == (1, 1, 8, 32, 32)


def test_bf16_learns_what_float32_does(tiny, tmp_path, monkeypatch):
    """16 voxels deep: where maps are two deep, bf16 on a CPU gives a NaN gradient now and then."""
    monkeypatch.setenv("COVIDNB_CACHE", str(tmp_path))
    root, losses = phantom_volumes((16, 32, 32), covid=1, healthy=1, validation=1), []
    for precision in ("32-true", "bf16-mixed"):
        train(replace(tiny, data=str(root), steps=2, precision=precision), tmp_path / precision)
        log = log_of(tmp_path / precision)
        losses.append([log[name] for name in ("labelled", "healthy", "adversarial", "reconstruction")])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)


@pytest.mark.slow
def test_learns_the_labelled_lesions(tiny, root, tmp_path):
    config = replace(tiny, steps=80, log_every=80, width=6, **ABLATION["labelled"])
    net, _ = load_network(train(config, tmp_path).weights_path)
    scores = evaluate_volumes(net, root, split="labelled")["crop"]["mean"]
    assert scores["Dice"] > 0.5


def test_weights_of_another_method_are_refused(tmp_path):
    run = Run(tmp_path, GasnetConfig())
    run.save_weights(torch.nn.Linear(2, 2), built_by=InfNetConfig())
    with pytest.raises(ConfigError, match="holds a Linear, no segmenter of volumes"):
        load_network(run.weights_path)


def test_a_split_that_is_missing_is_named(tiny, root, tmp_path):
    from covidnb.volumes import VolumeError

    for kind in ("images", "lung"):
        (tmp_path / kind).mkdir()
        files = LungVolumes(list_volumes(root, "healthy")).files[0]
        path = files.image if kind == "images" else files.lungs
        (tmp_path / kind / path.name).write_bytes(path.read_bytes())
    with pytest.raises(VolumeError, match=r"labelled.txt does not exist"):
        train(replace(tiny, data=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
