"""GLUE and BLiMP as they are published, and what is said of files that are not."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.cli import main
from ssd_lit.config import ConfigError, load_experiment
from ssd_lit.data.benchmarks import TASKS, Example, Pair, read_blimp, read_task
from tests.conftest import tiny_experiment
from tests.labelled import packed, write_blimp, write_glue, write_tsv


def test_every_task_is_read_alike_from_a_folder_and_from_an_archive(tmp_path: Path) -> None:
    folder = write_glue(tmp_path / "glue")
    archive = packed(folder)
    before = sorted(tmp_path.rglob("*"))
    for name in TASKS:
        for split, count in (("train", 40), ("dev", 20)):
            found = read_task(folder, name, split)
            assert len(found) == count
            assert found == read_task(archive, name, split)
            assert found[:3] == read_task(archive, name, split, limit=3)
    assert read_task(archive, "mrpc", "dev")[1] == Example(("the river moves 1", "a boat"), 1.0)
    assert read_task(archive, "rte", "dev")[1].target == 1.0
    assert read_task(archive, "stsb", "dev")[1].target == 5.0
    assert sorted(tmp_path.rglob("*")) == before


def test_quotes_are_characters_of_the_text(tmp_path: Path) -> None:
    write_tsv(tmp_path, "MRPC", "train", [
        (1, 7, 8, 'He called it " odd', "He called it odd ."),
        (0, 7, 9, '"Go" , she said', 'a 6 " board'),
    ])  # fmt: skip
    assert read_task(tmp_path, "mrpc", "train") == [
        Example(('He called it " odd', "He called it odd ."), 1.0),
        Example(('"Go" , she said', 'a 6 " board'), 0.0),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("3", "one text", "another"), ["line 2", "columns are missing"]),
        (("3", "one text"), ["line 2", "columns are missing"]),
        (("3", "one text", "another", "maybe"), ["line 2", "'maybe'", "not_entailment, entailment"]),
    ],
)
def test_a_line_that_is_no_example_is_named(row: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    write_tsv(tmp_path, "RTE", "dev", [row])
    with pytest.raises(ConfigError) as caught:
        read_task(tmp_path, "rte", "dev")
    assert all(word in str(caught.value) for word in ["RTE/dev.tsv", *words])


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    secret = write_tsv(tmp_path / "elsewhere", "RTE", "dev", [(0, "a", "b", "entailment")])
    with tarfile.open(tmp_path / "glue.tar.xz", "w:xz") as archive:
        link = tarfile.TarInfo("glue/RTE/dev.tsv")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        plain = tarfile.TarInfo("../RTE/train.tsv")
        content = b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
        plain.size = len(content)
        archive.addfile(plain, io.BytesIO(content))
    with pytest.raises(ConfigError, match=r"no RTE/dev\.tsv in it"):
        read_task(tmp_path / "glue.tar.xz", "rte", "dev")
    assert len(read_task(tmp_path / "glue.tar.xz", "rte", "train")) == 1
    assert not (tmp_path.parent / "RTE").exists()


def test_pairs_come_set_by_set_from_the_archive_and_from_a_folder(tmp_path: Path) -> None:
    sets = {"b_set": ("syntax/semantics", [("A cat sleeps.", "A cat sleep."), ("x", "y")]), "a_set": ("", [("p", "q")])}
    archive = write_blimp(tmp_path / "BLiMP.zip", sets)
    first, second = read_blimp(archive)
    assert (first.name, first.field, first.pairs) == ("a_set", "", (Pair("p", "q"),))
    assert (second.name, second.field) == ("b_set", "syntax_semantics")
    assert second.pairs == (Pair("A cat sleeps.", "A cat sleep."), Pair("x", "y"))
    assert [len(one.pairs) for one in read_blimp(archive, limit=1)] == [1, 1]
    (tmp_path / "folder").mkdir()
    row = json.dumps({"sentence_good": "p", "sentence_bad": "q"})
    (tmp_path / "folder/a_set.jsonl").write_text(row + "\n\n")
    assert read_blimp(tmp_path / "folder") == [first]


def _glue(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"glue": {"folder": str(folder / "glue"), **changes}}


MISTAKES: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "nothing": (lambda _: {}, ["downstream", "allowed: glue, blimp"]),
    "no folder": (lambda _: {"glue": {"folder": "no/where"}}, ["downstream.glue", "no/where"]),
    "no file": (lambda _: {"blimp": {"file": "no.zip"}}, ["downstream.blimp", "no.zip"]),
    "unknown task": (lambda f: _glue(f, tasks=["cola"]), ["downstream.glue.tasks", "cola", "'rte'"]),
    "a task twice": (lambda f: _glue(f, tasks=["rte", "rte"]), ["downstream.glue", "tasks", "once"]),
    "unknown key": (lambda f: _glue(f, epoch=1), ["downstream.glue.epoch", "did you mean 'epochs'?"]),
    "no archive": (lambda f: {"glue": {"folder": str(f / "tiny.yaml")}}, ["tiny.yaml", "SST-2/train.tsv"]),
    "no zip": (lambda f: {"blimp": {"file": str(f / "tiny.yaml")}}, ["tiny.yaml", "cannot be read"]),
    "a task's file": (lambda f: _glue(f), ["MRPC/dev.tsv"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_a_line_before_anything_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_glue(tmp_path / "glue")
    (tmp_path / "glue/MRPC/dev.tsv").unlink()
    section, words = MISTAKES[name]
    config = tiny_experiment(tmp_path, downstream=section(tmp_path))
    assert main(["configs", str(config), "--results", str(tmp_path / "results")]) == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert all(word in told for word in words)
    assert not (tmp_path / "results").exists()


def test_a_section_is_written_for_every_run(tmp_path: Path) -> None:
    write_glue(tmp_path / "glue")
    config = tiny_experiment(tmp_path, downstream=_glue(tmp_path))
    assert main(["configs", str(config), "--results", str(tmp_path / "results")]) == 0
    for run in load_experiment(config).runs():
        assert "epochs: 3" in (tmp_path / "results/tiny/runs" / run.name / "downstream.yaml").read_text()


def test_an_arm_that_is_left_out_has_no_section_in_any_of_its_runs(tmp_path: Path) -> None:
    write_glue(tmp_path / "glue")
    arms = {
        "dense": {"method": "dense"},
        "sizes": {"method": "dense", "grid": {"model.d_ff": [16, 48]}, "downstream": False},
        "posthoc": {"method": "posthoc", "parent_arm": "dense", "downstream": False},
    }
    config = tiny_experiment(tmp_path, downstream=_glue(tmp_path), arms={**arms, "sizes": {"method": "dense"}})
    assert main(["configs", str(config), "--results", str(tmp_path / "results")]) == 0
    before = (tmp_path / "results/tiny/runs/dense-seed0/downstream.yaml").read_bytes()
    config = tiny_experiment(tmp_path, downstream=_glue(tmp_path), arms=arms)
    assert main(["configs", str(config), "--results", str(tmp_path / "results")]) == 0
    tried = sorted(path.parent.name for path in (tmp_path / "results/tiny/runs").glob("*/downstream.yaml"))
    assert tried == ["dense-seed0", "sizes-seed0"]  # the latter of the first config only
    assert [run.name for run in load_experiment(config).downstream_runs()] == ["dense-seed0"]
    # What other arms do is no reason to try a model again.
    assert (tmp_path / "results/tiny/runs/dense-seed0/downstream.yaml").read_bytes() == before


def test_without_the_section_nothing_is_tried(tmp_path: Path) -> None:
    assert load_experiment(tiny_experiment(tmp_path)).downstream_runs() == []


def test_a_section_that_no_arm_takes_part_in_is_a_mistake(tmp_path: Path) -> None:
    write_glue(tmp_path / "glue")
    arms = {"dense": {"method": "dense", "downstream": False}}
    config = tiny_experiment(tmp_path, downstream=_glue(tmp_path), arms=arms)
    with pytest.raises(ConfigError, match="downstream: false for every arm"):
        load_experiment(config)
