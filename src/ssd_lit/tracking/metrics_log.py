"""metrics.jsonl, the points of a run's curves in an append-only file, from which MLflow and the report are fed.

Each line is {"step", "time", "values"}: optimiser step, milliseconds since 1970, names to numbers.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_lit.support.files import naming, write_text


class MetricsLog:
    """Appends points to a run's metrics.jsonl.

    Steps that are trained again after an interruption log the same points again; a name already recorded at a step is
    skipped.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if path.exists() and path.stat().st_size != sum(map(len, lines)):
            # A kill cut the last line short; remove it before appending.
            write_text(path, b"".join(lines).decode())
        self._recorded = {(name, point["step"]) for point in map(json.loads, lines) for name in point["values"]}
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step."""
        fresh = {name: float(value) for name, value in values.items() if (name, step) not in self._recorded}
        if not fresh:
            return
        self._recorded.update((name, step) for name in fresh)
        with naming(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, "time": time.time_ns() // 1_000_000, "values": fresh}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with naming(Path(self._file.name)):  # closing retries a write that failed on a full disk
            self._file.close()


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run: name to (step, value) pairs, by step. Raises ValueError if the file is missing."""
    if not path.exists():
        raise ValueError(f"{path}: not found; run the stage that writes it first")
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in _whole_lines(path):
        point = json.loads(line)
        for name, value in point["values"].items():
            curves.setdefault(name, []).append((point["step"], value))
    return {name: sorted(curve) for name, curve in curves.items()}


def last_points(path: Path, most_bytes: int) -> list[dict[str, Any]]:
    """The last points of a file, of about so many bytes; none if it is missing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - most_bytes)
        file.seek(start)
        lines = file.read().splitlines(keepends=True)
    # The first line is cut, and the last may be in the middle of being written.
    return [json.loads(line) for line in lines[start > 0 :] if line.endswith(b"\n")]


def points_from(path: Path, offset: int, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The points after a byte offset, up to `most` values, and the offset after them.

    At least one point if there is one, however many values it has.
    """
    points: list[dict[str, Any]] = []
    values = 0
    if not path.exists():
        return points, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            point = json.loads(line)
            values += len(point["values"])
            if points and most is not None and values > most:
                break
            points.append(point)
            offset += len(line)
    return points, offset


def drop_points_after(path: Path, step: int) -> bool:
    """Drop all points after a step; returns whether there were any."""
    lines = _whole_lines(path)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    if len(kept) == len(lines):
        return False
    write_text(path, b"".join(kept).decode())
    return True


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
