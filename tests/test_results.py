"""The results page's tables say what the recorded runs say."""

import json
from pathlib import Path

import pytest
from figures import results

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def records(tmp_path, monkeypatch):
    def run(name, dice, fold=None):
        scores = dict.fromkeys(results.SCORES, dice) | {"dice_at_0.5": dice + 0.1}
        return {"name": name, "config": {"fold": fold}, "scores": scores, "seconds": 120}

    test = [run("net-seed0", 0.6), run("net-seed1", 0.7), run("other-seed0", 0.5)]
    folds = [run(f"{name}-fold{k}", d + k / 10, k) for name, d in (("a", 0.5), ("b", 0.6)) for k in (0, 1)]
    (tmp_path / "test.json").write_text(json.dumps(test))
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    monkeypatch.setattr(results, "RECORDS", tmp_path)


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.data.splitlines()]


def test_test_rows_have_mean_and_spread(records):
    table = rows(results.test_table("test", {"net": "Ours", "absent": "No"}, ("Inf-Net, published",)))
    assert len({len(row) for row in table}) == 1
    assert table[2][:3] == ["*Inf-Net, published*", ".682", ".738"]
    assert table[3][:3] == ["Ours", ".650 ± .071", ".750 ± .071"] and table[3][-2:] == ["2", "2"]
    assert len(table) == 4


def test_fold_rows_are_compared_in_pairs(records):
    table = rows(results.fold_table("folds", {"a": "A", "b": "B"}, "a"))
    assert table[0][1:3] == ["fold 0", "fold 1"] and table[0][-1] == "against A"
    assert table[2] == ["A", ".500", ".600", ".550", ".650", ""]
    assert table[3] == ["B", ".600", ".700", ".650", ".750", "+0.100 ± 0.000"]


def test_class_rows_name_their_figures_and_share_a_reference(records):
    def run(name, dice):
        own = {f"toolbox_of_{of}": {"meanDic": dice - d} for of, d in (("argmax", 0), ("probability", 0.05))}
        both = {"GGO": own | {"dice_where_present": dice + 0.1}} | {
            "consolidation": own | {"dice_where_present": 0.2}
        }
        grey = {kind: {key: {"meanDic": 0.3} for key in own} | {"dice_where_present": 0.3} for kind in both}
        return {"name": name, "config": {}, "scores": both | {"one grey value": {"grey": 99} | grey}}

    runs = [run("net-seed0", 0.5), run("net-seed1", 0.6), run("other", 0.4)]
    (results.RECORDS / "classes.json").write_text(json.dumps(runs))
    published = ("Semi-Inf-Net & FCN8s, published",)
    table = rows(results.class_table("classes", {"net": "Ours", "other": "Other", "absent": "No"}, published))
    assert len({len(row) for row in table}) == 1 and len(table) == 6
    assert table[0][1] == "GGO: toolbox, argmax" and table[0][6] == "consolidation: argmax, where present"
    assert table[2] == ["*Semi-Inf-Net & FCN8s, published*", ".646", "", "", ".238", "", "", ""]
    assert table[3][:4] == ["Ours", ".550 ± .071", ".500 ± .071", ".650 ± .071"] and table[3][-1] == "2"
    assert table[4][-2:] == [".200", "1"]
    assert table[5] == ["one grey value within the prior of: Ours; Other"] + [".300"] * 6 + [""]


def test_volume_rows_are_compared_seed_by_seed(records):
    def run(name, seed, dice, **others):
        mean = {"Dice": dice, "sensitivity": 0.5, "specificity": 0.9, "share_found": 8.0, "share_true": 10.0}
        config, scores = {"seed": seed}, {"scan": {"mean": mean | others}}
        return {"name": f"{name}-seed{seed}", "config": config, "scores": scores, "seconds": 90}

    runs = [run("gasnet", 0, 0.5, HD95=40.2), run("gasnet", 1, 0.7, HD95=60.2), run("alone", 1, 0.3)]
    (results.RECORDS / "volumes.json").write_text(json.dumps(runs))
    table = rows(results.volume_table("volumes", {"alone": "Alone", "gasnet": "GASNet", "absent": "No"}))
    assert len({len(row) for row in table}) == 1 and len(table) == 4
    assert table[0][-1] == "GASNet ahead by"
    assert table[2] == ["Alone", ".300", ".500", ".900", "", "8.0", "10.0", "1", "2", "+40"]
    assert table[3][:2] == ["GASNet", ".600 ± .141"] and table[3][4] == "50 ± 14" and table[3][-1] == ""


def test_every_held_out_volume_has_its_row(records):
    def scored(dice, found):
        return {"crop": 0.1, "scan": dice, "share_found": found, "share_true": 4.0}

    runs = [
        {"name": "gasnet-seed0", "volumes": {"b": scored(0.5, 5.5), "a": scored(0.25, 7.25)}},
        {"name": "alone-seed0", "volumes": {"a": scored(0.125, 9.0)}},
    ]
    (results.RECORDS / "volumes.json").write_text(json.dumps(runs))
    table = rows(results.held_out_table("volumes", {"alone": "Alone", "gasnet": "GASNet"}))
    assert table[2:] == [["a", ".125", ".250", "7.2", "4.0"], ["b", "", ".500", "5.5", "4.0"]]


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_records_are_whole(path):
    for run in json.loads(path.read_text()):
        scores = run["scores"]
        kinds = [scores[kind]["toolbox_of_argmax"] for kind in ("GGO", "consolidation") if kind in scores]
        if "volumes" in run:
            assert all(0 <= scores[grid]["mean"]["Dice"] < 1 for grid in ("crop", "scan"))
        else:
            assert all(0 < one["meanDic"] < 1 for one in kinds or [scores])
        assert run.get("slices") or run["volumes"]
        assert run["versions"]["torch"]
        assert not [value for value in run["config"].values() if str(value).startswith("/")], run["name"]


def test_propagations_are_drawn_by_slices_labelled(records):
    lines = ["run,round,labelled,share", "soft,1,40,0.05", "soft,2,80,0.11", "cut,1,40,0.03"]
    (results.RECORDS / "rounds.csv").write_text("\n".join(lines))
    (ax,) = results.propagation_figure("rounds", {"soft": "as they are", "cut": "cut"}, 14.5).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["as they are"] == [[40, 5], [80, 11]] and drawn["cut"] == [[40, 3]]
    assert drawn["the doctor's labels"][0][1] == 14.5
