"""What runs logged, kept for the pages."""

import pandas as pd
import pytest
import record_logs


def test_rows_of_all_runs_under_their_names(tmp_path):
    logs = {"a-seed0": "step,share,loss\n50,0.25,9\n100,0.123456,8\n", "b-seed0": "step\n50\n"}
    for name, log in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(log)
    record = tmp_path / "logs.csv"
    record_logs.main([str(record), "step,share", *(str(tmp_path / name) for name in logs)])
    rows = pd.read_csv(record)
    assert list(rows) == ["run", "step", "share"] and list(rows["run"]) == ["a-seed0", "a-seed0", "b-seed0"]
    assert list(rows["share"])[:2] == [0.25, 0.1235] and rows["share"].isna().sum() == 1


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"log.csv does not exist: .*run is no run that has begun"):
        record_logs.main([str(tmp_path / "r.csv"), "step", str(tmp_path / "run")])
    assert not (tmp_path / "r.csv").exists()
