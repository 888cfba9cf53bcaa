"""Finished runs into the record that pages and chapters read."""

import json

import pytest
import record_runs


def finished(folder, dice):
    folder.mkdir(parents=True, exist_ok=True)
    scores = dict.fromkeys(record_runs.SCORES, dice)
    row = {"name": "7", "meanDic": dice, "dice_at_0.5": dice}
    metrics = {"scores": scores | {"per_slice": [row]}, "seconds": 61.4, "versions": {"torch": "2"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(
        '{"seed": 3, "start": "/x/infnet/w.safetensors", "weights": ["/x/a/w"]}'
    )
    return folder


def test_runs_are_added_and_replaced(tmp_path):
    record = tmp_path / "results" / "some.json"
    record_runs.main([str(record), *(str(finished(tmp_path / name, 0.51234)) for name in ("b", "a"))])
    record_runs.main([str(record), str(finished(tmp_path / "b", 0.75))])
    kept = json.loads(record.read_text())
    assert [one["name"] for one in kept] == ["a", "b"]
    assert kept[0]["slices"] == {"7": [0.5123, 0.5123]} and kept[1]["scores"]["meanDic"] == 0.75
    assert kept[0]["config"] == {"seed": 3, "start": "infnet", "weights": ["a"]} and kept[0]["seconds"] == 61


def test_a_run_on_classes_keeps_the_figures_of_each_by_name(tmp_path):
    folder = finished(tmp_path / "classes", 0.5)

    def own(dice):
        toolbox = {"meanDic": dice, "MAE": 0.1, "per_slice": [{"name": "7", "meanDic": dice, "Sm": None}]}
        return {"toolbox_of_argmax": toolbox, "dice_of_argmax": dice, "dice_where_present": None}

    scores = {"GGO": own(0.61234), "consolidation": own(0.41234), "confusion": [[9, 1], [0, 3]]}
    metrics = {"scores": scores | {"one grey value": {"grey": 155} | scores}, "seconds": 1, "versions": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    record_runs.main([str(tmp_path / "some.json"), str(folder)])
    (kept,) = json.loads((tmp_path / "some.json").read_text())
    assert kept["slices"] == {"7": [0.6123, 0.4123]}
    toolbox = {"meanDic": 0.6123, "MAE": 0.1}
    ggo = {"toolbox_of_argmax": toolbox, "dice_of_argmax": 0.6123, "dice_where_present": None}
    assert kept["scores"]["GGO"] == kept["scores"]["one grey value"]["GGO"] == ggo
    assert kept["scores"]["consolidation"]["dice_of_argmax"] == 0.4123
    assert kept["scores"]["confusion"] == [[9, 1], [0, 3]]


def test_an_unfinished_run_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match=r"config.json does not exist: .*run is no finished run"):
        record_runs.main([str(tmp_path / "r.json"), str(tmp_path / "run")])
    assert not (tmp_path / "r.json").exists()


def test_a_run_on_volumes_keeps_the_dice_of_each_on_both_grids(tmp_path):
    folder = finished(tmp_path / "volumes", 0.5)
    shares = {"name": "v1", "share_found": 5.43216, "share_true": 4.0}
    rows = [shares | {"grid": "crop", "Dice": 0.61234}, shares | {"grid": "scan", "Dice": None}]
    means = {grid: {"mean": {"Dice": 0.61234}, "missed": 0} for grid in ("crop", "scan")}
    metrics = {"scores": means | {"per_volume": rows}, "seconds": 1, "versions": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    kept = record_runs.entry(folder)
    expected = {"crop": 0.6123, "scan": None, "share_found": 5.4322, "share_true": 4.0}
    assert kept["volumes"] == {"v1": expected} and "slices" not in kept
    assert kept["scores"] == {grid: {"mean": {"Dice": 0.6123}, "missed": 0} for grid in ("crop", "scan")}
