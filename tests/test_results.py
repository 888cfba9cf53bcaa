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


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_records_are_whole(path):
    for run in json.loads(path.read_text()):
        assert 0 < run["scores"]["meanDic"] < 1 and run["slices"] and run["versions"]["torch"]
        assert not [value for value in run["config"].values() if str(value).startswith("/")], run["name"]
