"""Slice scores against the authors' toolbox and against 256 plain passes; volumes against geometry."""

import csv
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from covidnb import metrics
from covidnb.metrics import (
    dice_at,
    infected_share,
    s_measure,
    score_folders,
    slice_scores,
    stretch,
    threshold_curves,
    volume_scores,
)

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "metrics"
COLUMNS = {  # the toolbox's name: ours
    "S": "Sm",
    "meanE": "meanEm",
    "maxE": "maxEm",
    "meanDice": "meanDic",
    "maxDice": "maxDic",
    "meanSen": "meanSen",
    "meanSpe": "meanSpe",
    "MAE": "MAE",
}
plain_curves = runpy.run_path(str(ROOT / "benchmarks" / "metrics.py"))["plain_curves"]


@pytest.fixture(scope="module")
def toolbox():
    """Predictions, truths and the toolbox's rows: eight slices, then all of them together."""
    arrays = np.load(FIXTURES / "toolbox.npz")
    with open(FIXTURES / "toolbox.csv") as file:
        return arrays["pred"], arrays["gt"], list(csv.DictReader(file))


def assert_row(scores, row):
    for column, name in COLUMNS.items():
        assert scores[name] == pytest.approx(float(row[column]), abs=1e-6, nan_ok=True), (row["case"], name)


# --- slices


@pytest.mark.parity
def test_equals_the_toolbox(toolbox):
    preds, truths, rows = toolbox
    scores = slice_scores(preds, truths)
    assert len(scores["per_slice"]) == len(rows) - 1 == 8
    for entry, row in zip([*scores["per_slice"], scores], rows, strict=True):
        assert_row(entry, row)
    assert math.isnan(scores["meanSpe"])  # the slice that is lesion all over


def test_input_forms_agree(toolbox):
    preds, truths, _ = toolbox
    expected = slice_scores(preds[:5], truths[:5])
    assert slice_scores(list(preds[:5] / 255), truths[:5] > 128) == expected
    assert slice_scores(preds[:5], (truths[:5] > 128).astype(np.int64)) == expected
    assert slice_scores(preds[:5], truths[:5] / 255) == expected


def test_slices_of_different_sizes_count_alike():
    rng = np.random.default_rng(0)
    preds = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 30), (7, 90))]
    truths = [pred > 100 for pred in preds]
    scores = slice_scores(preds, truths)
    alone = [slice_scores([pred], [truth]) for pred, truth in zip(preds, truths, strict=True)]
    for name in ("meanDic", "Sm", "MAE"):
        assert scores[name] == pytest.approx(np.mean([entry[name] for entry in alone]))
    assert scores["maxDic"] <= np.mean([entry["maxDic"] for entry in alone])  # one threshold for all slices


GRID = hnp.arrays(
    np.uint8, (5, 7), elements=st.sampled_from([0, 1, 50, 51, 101, 102, 127, 128, 204, 254, 255])
)
# values on, just below and just above a threshold
EDGES = np.concatenate([[np.nextafter(t, 0), t, np.nextafter(t, 1)] for t in metrics.THRESHOLDS]).clip(0, 1)
SOFT = hnp.arrays(np.float64, (5, 7), elements=st.one_of(st.floats(0, 1), st.sampled_from(EDGES.tolist())))
TRUTH = hnp.arrays(bool, (5, 7))


@settings(deadline=None, max_examples=100)
@given(st.one_of(GRID, SOFT), TRUTH)
@example(np.full((5, 7), 77, np.uint8), np.eye(5, 7, dtype=bool))
@example(np.zeros((5, 7)), np.ones((5, 7), bool))
@example(EDGES[-35:].reshape(5, 7), np.zeros((5, 7), bool))
def test_histogram_equals_256_passes(pred, truth):
    soft = stretch(pred / 255 if pred.dtype == np.uint8 else pred)
    expected = plain_curves(soft, truth)
    for name, curve in threshold_curves(pred, truth).items():
        np.testing.assert_allclose(curve, expected[name], rtol=0, atol=1e-12, err_msg=name)


def test_every_threshold_is_met_to_the_last_bit():
    # a pixel on each threshold and a neighbour on either side of it: Dice at threshold i counts them
    for truth in (np.ones(EDGES.shape, bool), np.arange(EDGES.size) % 2 == 0):
        soft, truth = EDGES[None], truth[None]
        expected = plain_curves(soft, truth)
        for name, curve in threshold_curves(soft, truth).items():
            np.testing.assert_allclose(curve, expected[name], rtol=0, atol=1e-12, err_msg=name)


@settings(deadline=None, max_examples=50)
@given(SOFT, TRUTH)
def test_scores_stay_in_range(pred, truth):
    scores = slice_scores([pred], [truth])
    for name in ("meanDic", "meanSen", "maxDic", "Sm", "MAE"):
        assert 0 <= scores[name] <= 1 + 1e-12, name
    assert scores["maxEm"] <= 35 / 34 + 1e-12  # the toolbox divides by one pixel less


@settings(deadline=None, max_examples=50)
@given(GRID, TRUTH)
def test_flipping_both_changes_no_count(pred, truth):
    scores = slice_scores([pred], [truth])
    mirrored = slice_scores([pred[:, ::-1]], [truth[:, ::-1]])
    for name in ("meanDic", "meanSen", "meanEm", "MAE"):  # S-measure may: its centre rounds half up
        assert scores[name] == pytest.approx(mirrored[name], abs=1e-12)


def test_stretching_gives_a_healthy_slice_full_confidence():
    faint = np.zeros((4, 4))
    faint[1, 1] = 1e-4
    assert stretch(faint).max() == 1
    assert (stretch(np.full((4, 4), 0.3)) == 0.3).all()


def test_specificity_is_zero_where_nothing_is_found():
    truth = np.zeros((4, 4), bool)
    truth[0] = True
    missed = np.zeros((4, 4), np.uint8)
    missed[3, 3] = 255
    assert (threshold_curves(missed, truth)["Spe"][:-1] == 0).all()


def test_s_measure_of_a_mask_in_the_last_column():
    truth = np.zeros((6, 6), bool)
    truth[:, -1] = True
    assert s_measure(truth.astype(float), truth) == pytest.approx(1)
    corner = np.zeros((6, 6), bool)
    corner[5, 5] = True  # a single pixel has no standard deviation
    assert s_measure(corner.astype(float), corner) == pytest.approx(1)


def test_dice_at_takes_the_map_as_it_is():
    truth = np.zeros((2, 4), bool)
    truth[0] = True
    pred = np.where(truth, 127, 0).astype(np.uint8)
    assert dice_at([pred], [truth]) == 0  # 127/255 < 0.5, although stretching would make it 1
    assert dice_at([pred], [truth], threshold=127 / 255) == 1
    assert slice_scores([pred], [truth])["maxDic"] == 1
    pred[0, :2] = 128
    assert dice_at([pred], [truth]) == pytest.approx(2 * 2 / (2 + 4))
    empty = np.zeros((2, 4), bool)
    assert dice_at([empty, pred], [empty, empty]) == 0.5


@pytest.mark.parametrize(
    ("preds", "truths", "message"),
    [
        ([np.zeros((3, 3))] * 2, [np.zeros((3, 3))], "2 predictions, 1 truths"),
        ([], [], "no slices"),
        ([np.zeros((3, 3)), np.zeros((3, 4))], [np.zeros((3, 3))] * 2, r"slice 1: .*\(3, 4\).*\(3, 3\)"),
        (np.zeros((3, 3)), np.zeros((3, 3)), r"slice 0: .*\(H, W\)"),
        ([np.full((3, 3), np.nan)], [np.zeros((3, 3))], "prediction 0 has NaN"),
        ([np.full((3, 3), 1.5)], [np.zeros((3, 3))], r"prediction 0 .*outside \[0, 1\]"),
        ([np.full((3, 3), -2.0)], [np.zeros((3, 3))], r"prediction 0 .*outside \[0, 1\]"),
        ([np.zeros((3, 3), np.int64)], [np.zeros((3, 3))], "prediction 0 is int64"),
        ([np.zeros((3, 3))], [np.full((3, 3), 2)], "truth 0 is no mask"),
        ([np.zeros((3, 3))], [np.full((3, 3), np.nan)], "truth 0 has NaN"),
    ],
)
def test_bad_slices_are_named(preds, truths, message):
    for score in (slice_scores, dice_at):
        with pytest.raises(ValueError, match=message):
            score(preds, truths)


# --- folders


def save(folder, **pictures):
    folder.mkdir(exist_ok=True)
    for stem, array in pictures.items():
        Image.fromarray(array).save(folder / f"{stem}.png")
    return folder


def run(*folders):
    command = [sys.executable, "-m", "covidnb.metrics", *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parity
def test_folders_give_the_toolbox_figures_as_json(tmp_path, toolbox):
    preds, truths, rows = toolbox
    save(tmp_path / "pred", **{str(i): pred for i, pred in enumerate(preds)})
    save(tmp_path / "truth", **{str(i): truth for i, truth in enumerate(truths)})
    done = run(tmp_path / "pred", tmp_path / "truth")
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout, parse_constant=pytest.fail)  # NaN is no JSON
    assert scores["meanSpe"] is None
    assert scores["slices"] == 8
    assert scores["dice_at_0.5"] == pytest.approx(dice_at(preds, truths))
    for entry, row in zip(scores["per_slice"], rows, strict=False):
        assert entry["name"] == row["case"]
        assert_row(entry | {"meanSpe": math.nan if entry["meanSpe"] is None else entry["meanSpe"]}, row)


def test_one_bit_masks_jpeg_and_natural_order(tmp_path):
    truth = np.zeros((20, 20), bool)
    truth[5:15, 5:15] = True
    names = ["10", "2", "a1"]
    save(tmp_path / "truth", **dict.fromkeys(names, truth))
    (tmp_path / "pred").mkdir()
    for name in names:
        Image.fromarray(truth.astype(np.uint8) * 255).convert("RGB").save(
            tmp_path / f"pred/{name}.JPG", quality=95
        )
    (tmp_path / "pred" / "Thumbs.db").touch()
    scores = score_folders(tmp_path / "pred", tmp_path / "truth")
    assert [entry["name"] for entry in scores["per_slice"]] == ["2", "10", "a1"]
    assert scores["dice_at_0.5"] > 0.99


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def odd_one_out(tmp_path):
    save(tmp_path / "truth", extra=GREY)
    return r"extra\.png: no picture of that name in .*pred"


def other_size(tmp_path):
    save(tmp_path / "truth", a=GREY[:4])
    return r"a\.png: size \(8, 8\), but its truth .*a\.png is \(4, 8\)"


def truncated(tmp_path):
    path = tmp_path / "pred" / "a.png"
    path.write_bytes(path.read_bytes()[:50])
    return r"pred/a\.png: cannot be read"


def no_picture(tmp_path):
    (tmp_path / "pred" / "a.png").write_text("not a picture")
    return r"pred/a\.png: cannot be read"


def sixteen_bit(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 200).save(tmp_path / "pred" / "a.png")
    return r"pred/a\.png: uint16 picture"


def labels(tmp_path):
    save(tmp_path / "truth", a=GREY % 3)
    return r"truth/a\.png is no mask"


def twice(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "pred" / "a.jpg")
    return r"same name as a\."


def empty_folder(tmp_path):
    (tmp_path / "truth" / "a.png").unlink()
    return r"truth: holds no \.png or \.jpg"


def no_folder(tmp_path):
    (tmp_path / "truth" / "a.png").unlink()
    (tmp_path / "truth").rmdir()
    return "truth: no such folder"


@pytest.mark.parametrize(
    "spoil",
    [odd_one_out, other_size, truncated, no_picture, sixteen_bit, labels, twice, empty_folder, no_folder],
)
def test_bad_folders_end_with_status_2(tmp_path, capsys, spoil):
    save(tmp_path / "pred", a=GREY)
    save(tmp_path / "truth", a=GREY)
    message = spoil(tmp_path)
    assert metrics.main([str(tmp_path / "pred"), str(tmp_path / "truth")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert re.search(message, error), error


def test_the_process_itself_ends_with_status_2(tmp_path):
    done = run(tmp_path / "nowhere", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "nowhere: no such folder" in done.stderr


def test_imports_nothing_heavy():
    heavy = ["torch", "monai", "SimpleITK", "matplotlib", "IPython", "scipy", "cv2"]
    code = f"import covidnb.metrics, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- volumes


def ball(radius, *, spacing=(2.5, 1.0, 1.0), shift=0.0):
    """A ball of that radius in mm in a 100 mm cube."""
    axes = [np.arange(0, 100, step) - 50 for step in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return z**2 + y**2 + (x - shift) ** 2 <= radius**2


def test_volume_scores_of_concentric_balls():
    spacing = (2.5, 1.0, 1.0)
    scores = volume_scores(ball(20), ball(25), spacing, tolerance=2)
    assert scores["Dice"] == pytest.approx(2 * 20**3 / (20**3 + 25**3), rel=0.01)
    assert scores["sensitivity"] == pytest.approx((20 / 25) ** 3, rel=0.01)
    assert scores["specificity"] == 1
    assert scores["HD95"] == pytest.approx(5, abs=0.5)  # mm; in voxels along z it would be 2
    assert scores["surfaceDice"] == 0
    assert volume_scores(ball(20), ball(25), spacing, tolerance=6)["surfaceDice"] == pytest.approx(1)
    half = volume_scores(ball(20), ball(25), tuple(step / 2 for step in spacing))
    assert half["HD95"] == pytest.approx(scores["HD95"] / 2)


def test_perfect_volume_whatever_the_form():
    truth = ball(20).astype(np.uint8) * 2  # class 2 is lesion as class 1 is
    for pred in (truth, truth > 0, np.where(truth > 0, 0.5, 0.49)):
        assert volume_scores(pred, truth, (2.5, 1, 1)) == pytest.approx(
            {"Dice": 1, "sensitivity": 1, "specificity": 1, "HD95": 0, "surfaceDice": 1}
        )


def test_only_the_lungs_count():
    lungs = ball(40)
    spill = ball(20) | ball(5, shift=46) & ~lungs
    assert volume_scores(spill, ball(20), (2.5, 1, 1), lungs)["Dice"] == 1
    assert volume_scores(spill, ball(20), (2.5, 1, 1))["Dice"] < 1


def test_volumes_without_lesions_leave_the_mean():
    empty = np.zeros((40, 100, 100), bool)
    missed = volume_scores(empty, ball(20), (2.5, 1, 1))
    assert (missed["Dice"], missed["sensitivity"], missed["surfaceDice"]) == (0, 0, 0)
    assert missed["HD95"] == math.inf
    healthy = volume_scores(ball(20), empty, (2.5, 1, 1))
    assert 0.9 < healthy.pop("specificity") < 1
    assert all(math.isnan(value) for value in healthy.values())
    assert math.isnan(volume_scores(empty, ~empty, (2.5, 1, 1))["specificity"])


def test_infected_share():
    lungs, lesions = ball(40), ball(20) | ~ball(45)
    assert infected_share(lesions, lungs) == pytest.approx(100 / 8, rel=0.01)
    assert infected_share(lesions.astype(float) * 0.5, lungs) == infected_share(lesions, lungs)
    assert infected_share(~lungs, lungs) == 0


def test_bad_volumes():
    mask, other = np.ones((4, 5, 6), bool), np.ones((4, 6, 5), bool)
    with pytest.raises(ValueError, match=r"pred \(4, 5, 6\), truth \(4, 6, 5\)"):
        volume_scores(mask, other, (1, 1, 1))
    with pytest.raises(ValueError, match=r"lesions \(4, 5, 6\), lungs \(4, 6, 5\)"):
        infected_share(mask, other)
    with pytest.raises(ValueError, match="lung mask is empty"):
        infected_share(mask, ~mask)
    with pytest.raises(ValueError, match="lung mask is empty"):
        volume_scores(mask, mask, (1, 1, 1), ~mask)
    with pytest.raises(ValueError, match=r"shape \(5, 6\)"):
        infected_share(mask[0], mask[0])
    with pytest.raises(ValueError, match="pred has NaN"):
        volume_scores(np.full(mask.shape, np.nan), mask, (1, 1, 1))
    for spacing in ((1, 1), (1, 0, 1), (1, math.nan, 1)):
        with pytest.raises(ValueError, match="three positive sizes in mm"):
            volume_scores(mask, mask, spacing)


def test_an_image_is_asked_for_its_array():
    sitk = pytest.importorskip("SimpleITK")
    with pytest.raises(ValueError, match="GetArrayFromImage"):
        infected_share(sitk.Image(2, 2, 2, sitk.sitkUInt8), np.ones((2, 2, 2)))


# --- real slices


def test_real_truths_as_predictions(data_dir, tmp_path):
    cv2 = pytest.importorskip("cv2")
    folder = data_dir / "covid-semiseg" / "TestingSet" / "LungInfection-Test" / "GT"
    itself = score_folders(folder, folder)
    assert itself["slices"] == 48
    assert itself["dice_at_0.5"] == itself["maxDic"] == 1 and itself["MAE"] == 0
    assert itself["meanDic"] > 0.995  # at threshold 0 everything is lesion

    blurred = {}
    for path in folder.glob("*.png"):
        blurred[path.stem] = cv2.GaussianBlur(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (0, 0), 8)
    scores = score_folders(save(tmp_path / "blurred", **blurred), folder)
    assert 0.7 < scores["dice_at_0.5"] < 1
    assert scores["meanDic"] < scores["dice_at_0.5"]
