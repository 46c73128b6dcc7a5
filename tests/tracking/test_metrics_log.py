from pathlib import Path

import pytest

from ssd_lit.tracking.metrics_log import MetricsLog, drop_points_after, points_from, read_metrics


def test_points_replayed_after_an_interruption_are_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    first.log(1, {"loss": 3.0})
    first.log(2, {"loss": 2.0, "rate": 7.0})
    with path.open("a") as file:
        file.write('{"step": 3, "time": 1, "val')  # killed while writing
    again = MetricsLog(path)
    again.log(2, {"loss": 2.0, "extra": 1.0})
    again.log(3, {"loss": 1.0})
    again.close()
    assert read_metrics(path) == {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)], "rate": [(2, 7.0)], "extra": [(2, 1.0)]}


def test_reading_goes_on_from_an_offset_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log(1, {"a": 1.0})
    points, offset = points_from(path, 0)
    assert [p["step"] for p in points] == [1]
    log.log(2, {"a": 2.0})
    with path.open("a") as file:
        file.write('{"step"')
    points, end = points_from(path, offset)
    assert [p["step"] for p in points] == [2]
    assert points_from(path, end) == ([], end)


def test_points_beyond_a_step_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.log(step, {"a": step})
    assert drop_points_after(path, 2)
    assert not drop_points_after(path, 2)
    assert read_metrics(path) == {"a": [(1, 1.0), (2, 2.0)]}
    with pytest.raises(ValueError, match="not found"):
        read_metrics(tmp_path / "nothing.jsonl")
