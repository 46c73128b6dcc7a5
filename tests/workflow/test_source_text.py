"""Text that changes after it was read is read anew; text that is gone is not missed."""

import os
import re
import shutil
from pathlib import Path

import pytest

from ssd_lit.cli import main
from tests.conftest import Bench
from tests.workflow.running import snakemake

pytestmark = pytest.mark.whole_run


@pytest.fixture
def done(tmp_path: Path) -> Bench:
    """Tokens of a text, and of another that is held out."""
    (tmp_path / "novel.txt").write_text("the river moves the senate " * 9)
    data = {
        "name": "grammar", "sources": [{"kind": "files", "paths": [str(tmp_path / "tex*.txt")]}],
        "held_out": {"novel": str(tmp_path / "novel.txt")},
        "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"vocab_size": 300}, "sequence_length": 16,
    }  # fmt: skip
    return Bench(tmp_path, arms={"dense": {"method": "dense"}}, data=data)


def planned(done: Bench, target: str = "data/*/tokens/index.json") -> set[str]:
    """The rules that would be done for a file under results/."""
    (path,) = done.results.glob(target)
    told = snakemake(done.results.parent / "tiny.yaml", done.results, "-n", str(path))
    return set(re.findall(r"^rule (\w+):$", told, re.M))


DATA_STAGES = {"prepare", "tokenizer", "encode"}


def test_what_is_planned_when_text_changes(done: Bench) -> None:
    text = done.results.parent / "text.txt"
    content = text.read_text()
    files = {path: path.stat().st_mtime_ns for path in done.results.rglob("*")}
    assert planned(done) == set()
    # Of the same length, and written later than the card.
    text.write_text(content.replace("river", "brook"))
    assert planned(done) == DATA_STAGES
    # Written again, and what it was.
    text.write_text(content)
    assert planned(done) == set()
    text.unlink()
    assert planned(done) == set()
    assert {path: path.stat().st_mtime_ns for path in done.results.rglob("*")} == files


def test_longer_new_and_held_out_text_counts(done: Bench) -> None:
    folder = done.results.parent
    (folder / "text2.txt").write_text("one more")
    assert planned(done) == DATA_STAGES
    (folder / "text2.txt").unlink()
    held_out = (folder / "novel.txt").read_text()
    (folder / "novel.txt").write_text("another")
    assert planned(done) == DATA_STAGES
    (folder / "novel.txt").write_text(held_out)
    with (folder / "text.txt").open("a") as file:
        file.write("\n\none more")
    # Whatever its date.
    os.utime(folder / "text.txt", (0, 0))
    assert planned(done) == DATA_STAGES


def test_the_stages_of_changed_text_give_a_run_of_it(done: Bench) -> None:
    done.phases("dense")
    text, tokens = done.results.parent / "text.txt", done.open("dense").tokens_digest
    text.write_text(text.read_text().replace("river", "brook"))
    record = done.dir("dense") / "stages/dense.json"
    snakemake(text.with_name("tiny.yaml"), done.results, str(record))
    run = done.open("dense")
    assert run.tokens_digest != tokens
    assert run.stage("dense").inputs == run.made_from()
    assert planned(done, "tiny/runs/*/stages/dense.json") == set()


def test_changed_text_that_cannot_be_read_is_told_while_planning(done: Bench) -> None:
    (done.results.parent / "text.txt").write_text(" \n")
    with pytest.raises(AssertionError, match=r"ssd_lit: data\.sources: no text in"):
        planned(done)


def test_another_tokenizer_in_the_folder_that_was_named_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first").mkdir()
    first = Bench(tmp_path / "first", arms={"dense": {"method": "dense"}})
    folder = tmp_path / "theirs"
    shutil.copytree(first.data / "tokenizer", folder)
    data = {
        "name": "grammar", "sources": [{"kind": "files", "paths": [str(tmp_path / "first/text.txt")]}],
        "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"folder": str(folder)}, "sequence_length": 16,
    }  # fmt: skip
    done = Bench(tmp_path, arms={"dense": {"method": "dense"}}, data=data)
    assert planned(done) == set()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + " ")
    assert planned(done) == DATA_STAGES - {"prepare"}
    capsys.readouterr()
    assert main(["verify", str(done.results / "tiny")]) == 1
    assert "holds another tokenizer now" in capsys.readouterr().out
    shutil.rmtree(folder)
    assert planned(done) == set()
