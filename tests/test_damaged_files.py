"""Files that are cut short, empty or of other bits: named in one line, never used; what is good goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssd_lit.cli import main
from ssd_lit.config import load_run
from ssd_lit.records import PhaseRecord
from ssd_lit.report.results import load_results, read_table
from ssd_lit.support.files import archive_digest, read_json_checked, write_json_checked
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training.checkpoint import read_checkpoint, write_checkpoint
from tests.conftest import Bench

ARMS = {"ssd": {"method": "ssd"}}
SNAPSHOTS = {"steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
             "checkpoint_every": 4, "snapshot_every": 8}  # fmt: skip


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    """One bit, in the middle of the file."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(
        tmp_path_factory.mktemp("done"),
        arms=ARMS,
        training=SNAPSHOTS,
        analysis={"blocks": 4, "constructions": ["kmeans"]},
    )  # fmt: skip
    bench.phases("ssd")
    bench.stage("evaluate", bench.dir("ssd"))
    bench.stage("analyse", bench.dir("ssd"))
    bench.stage("summarise", bench.results / "tiny")
    return bench


DATA, RUN, EXPERIMENT = "data/*", "tiny/runs/ssd-seed0", "tiny"
FILES = {  # what reads each file: stage, its folder, and what must go first so that it has work to do
    f"{DATA}/config.yaml": ("prepare", DATA, None),
    f"{DATA}/documents/train.parquet": ("tokenizer", DATA, None),
    f"{DATA}/documents/test.parquet": ("encode", DATA, None),
    f"{DATA}/tokenizer/tokenizer.json": ("encode", DATA, None),
    f"{DATA}/tokenizer/tokenizer_config.json": ("encode", DATA, None),
    f"{DATA}/tokens/index.json": ("evaluate", RUN, "evaluation.json"),
    f"{DATA}/tokens/validation.bin": ("evaluate", RUN, "evaluation.json"),
    f"{DATA}/tokens/train.bin": ("train", RUN, "phases"),
    f"{RUN}/config.yaml": ("evaluate", RUN, "evaluation.json"),
    f"{RUN}/evaluation.yaml": ("evaluate", RUN, "evaluation.json"),
    f"{RUN}/phases/00-dense/phase.json": ("evaluate", RUN, "evaluation.json"),
    f"{RUN}/stages/sparse_phases.json": ("evaluate", RUN, "evaluation.json"),
    f"{RUN}/checkpoints/warmup.ckpt": ("train --from moefy", RUN, None),
    f"{RUN}/checkpoints/sparse_phases.ckpt": ("evaluate", RUN, "evaluation.json"),
    f"{RUN}/snapshots/step-00000016.pt": ("analyse", RUN, "analysis/analysis.json"),
    f"{RUN}/evaluation.json": ("summarise", EXPERIMENT, None),
    f"{EXPERIMENT}/experiment.yaml": ("summarise", EXPERIMENT, None),
    f"{EXPERIMENT}/summary.csv": ("report", EXPERIMENT, None),
}


@pytest.mark.parametrize(("file", "damage"), [(file, damage) for file in FILES for damage in (cut, empty, flipped)])
def test_a_damaged_file_is_named_by_what_reads_it_and_by_verify(
    done: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[bytes], bytes]
) -> None:
    results = tmp_path / "results"
    shutil.copytree(done.results, results)
    (path,) = results.glob(file)
    path.write_bytes(damage(path.read_bytes()))
    command, place, gone = FILES[file]
    stage, *phase = command.split()
    (folder,) = results.glob(place)
    verified = main(["verify", str(results / EXPERIMENT)])
    told = capsys.readouterr()
    assert verified == 1
    assert path.name in told.out + told.err

    if gone is not None:
        lost = folder / gone
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert main([stage, str(folder), *phase]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert path.name in line
    assert any(remedy in line for remedy in ("run again", "writes it anew"))


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """Read as it was written, or not at all, whichever byte of the file is another."""
    path, content = tmp_path / "a.ckpt", {"state_dict": {"w": torch.arange(40.0), "b": torch.ones(3)}, "global_step": 7}
    write_checkpoint(path, content)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            found = read_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            assert found["global_step"] == 7
            assert all(torch.equal(found["state_dict"][name], value) for name, value in content["state_dict"].items())
    # What is left is room between the records.
    assert refused > len(whole) / 2


def test_the_digest_of_a_checkpoint_stands_for_names_and_values(tmp_path: Path) -> None:
    digests = []
    for number, name, value in ((0, "w", 1.0), (1, "w", 1.0), (2, "v", 1.0), (3, "w", 1.0 + 2**-23)):
        tensor = torch.arange(4000.0)
        tensor[1234] = value
        write_checkpoint(tmp_path / f"{number}.ckpt", {"state_dict": {name: tensor}, "global_step": 7})
        digests.append(archive_digest(tmp_path / f"{number}.ckpt"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("change", [{"a": 2}, {"a": 1, "b": None}, {}])
def test_a_sealed_file_with_other_content_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "a.json"
    write_json_checked(path, {"a": 1})
    text = path.read_text()
    assert read_json_checked(path) == {"a": 1}
    write_json_checked(path, change)
    path.write_text(path.read_text().replace(path.read_text().split('"sha256"')[1], text.split('"sha256"')[1]))
    with pytest.raises(ValueError, match="checksum does not fit"):
        read_json_checked(path)


def test_a_damaged_rolling_checkpoint_is_left_for_the_one_before_and_nothing_changes_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, arms={"dense": {"method": "dense"}})
    run, found = bench.dir("dense"), []
    for lost in ((), ("rolling",), ("rolling", "previous")):
        for folder in ("phases", "stages", "checkpoints", "work"):
            shutil.rmtree(run / folder, ignore_errors=True)
        if lost:
            interrupt(monkeypatch, step=31)
            assert main(["train", str(run), "--threads", "1"]) == 1
            monkeypatch.undo()
        for name in lost:
            path = run / "work" / f"{name}.ckpt"
            assert 0 < read_checkpoint(path)["global_step"] < 31
            path.write_bytes(flipped(path.read_bytes()))
        capsys.readouterr()
        bench.phases("dense")
        told = capsys.readouterr().out
        for name in ("rolling", "previous"):
            assert (f"{name}.ckpt: damaged" in told) == (name in lost)
        curves = read_metrics(run / "metrics.jsonl")
        timed = {name: [step for step, _ in curves.pop(name)] for name in ("train/tokens_per_second", "train/seconds")}
        found.append((read_checkpoint(bench.checkpoint("dense"))["state_dict"], curves, timed))
    (weights, *points), *others = found
    for other, *theirs in others:
        assert all(torch.equal(weights[name], other[name]) for name in weights)
        assert theirs == points


def test_a_table_of_an_analysis_that_is_another_is_refused(done: Bench, tmp_path: Path) -> None:
    shutil.copytree(done.results, tmp_path / "results")
    run = done.runs["ssd"]
    exp_dir = tmp_path / "results/tiny"
    (result,) = load_results(exp_dir, [run])
    path = result.folder / "analysis/load.csv"
    read_table(result, "load")
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(ValueError, match=r"load\.csv: damaged"):
        read_table(result, "load")


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training fail at a step."""
    from ssd_lit.training.module import Pretraining

    train = Pretraining.training_step

    def failing(self: Pretraining, batch: object, batch_idx: int) -> object:
        if self.global_step == step:
            raise ValueError("interrupted")
        return train(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(Pretraining, "training_step", failing)


def test_what_a_run_was_made_from_is_on_record(done: Bench) -> None:
    run = done.dir("ssd")
    record = PhaseRecord.read(run / "phases/02-sparse/phase.json")
    evaluation = read_json_checked(run / "evaluation.json")
    for provenance in (record.provenance, evaluation["provenance"]):
        assert provenance["seed"] == load_run(run / "config.yaml").seed
        assert provenance["threads"] == 1
        assert provenance["tokens"] == read_json_checked(done.data / "tokens/index.json")["digest"]
        assert provenance["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
        assert provenance["commit"]
        assert provenance["machine"]["processor"]
        assert provenance["began"] <= provenance["ended"]
    assert record.inputs == done.open("ssd").made_from()
    assert evaluation["inputs"]["weights"] == archive_digest(run / "checkpoints/sparse_phases.ckpt")


def test_verify_tells_results_that_no_longer_match_their_inputs(
    done: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    shutil.copytree(done.results, results)
    run = results / RUN
    assert main(["verify", str(run)]) == 0
    assert "MISMATCH" not in capsys.readouterr().out

    # Whole, and another stage's: only who knows which weights a stage wrote can tell.
    shutil.copyfile(run / "checkpoints/warmup.ckpt", run / "checkpoints/moefy.ckpt")
    # Settings that the evaluation was not made with.
    text = (run / "evaluation.yaml").read_text()
    config = tmp_path / "other.yaml"
    config.write_text(f"base: {done.results.parent / 'tiny.yaml'}\nevaluation: {{blocks: 7}}\n")
    assert main(["configs", str(config), "--results", str(results)]) == 0
    assert (run / "evaluation.yaml").read_text() != text
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    told = capsys.readouterr()
    wrong = [line for line in told.out.splitlines() if line.startswith("MISMATCH")]
    assert len(wrong) == 2
    assert "ssd-seed0 moefy" in wrong[0]
    assert "moefy.ckpt" in wrong[0]
    assert "evaluation.json: made from other settings" in wrong[1]
    assert "2 of" in told.err

    (done.results.parent / "text.txt").rename(tmp_path / "kept.txt")
    (done.results.parent / "text.txt").write_text("other text\n")
    main(["verify", str(run)])
    (tmp_path / "kept.txt").rename(done.results.parent / "text.txt")
    assert "text.txt: changed since the documents were read from it" in capsys.readouterr().out
