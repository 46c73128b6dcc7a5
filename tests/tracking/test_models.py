"""Final models as MLflow has them: logged, registered, loaded back and served."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow import MlflowClient
from tokenizers import Tokenizer

from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.blimp import log_likelihoods
from ssd_lit.pipeline.serving import ServedModel, _load_pyfunc
from ssd_lit.support.files import read_json
from ssd_lit.tracking.delivery import send_runs
from ssd_lit.tracking.store import connect, tracking_uri
from ssd_lit.training.checkpoint import final_model
from tests.conftest import Bench

pytestmark = pytest.mark.whole_run

TEXTS = ["the river moves the actor 3.", "the senate forgets"]
NAME = "tiny.ssd-seed0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("trained"))
    bench.stage("train", bench.dir("ssd"))
    bench.stage("send", bench.dir("ssd"))  # on a busy machine the stage may have left it for later
    return bench


@pytest.fixture
def uri(trained: Bench, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLflow's own functions read the store from the environment."""
    uri = tracking_uri(trained.results)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def texts() -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS})


def test_a_final_model_is_logged_and_registered_once_in_each_mode(trained: Bench, uri: str) -> None:
    client = MlflowClient()
    for _ in range(2):
        experiment = client.get_experiment_by_name("tiny")
        models = {one.params["mode"]: one for one in client.search_logged_models([experiment.experiment_id])}
        assert len(models) == len(client.search_logged_models([experiment.experiment_id])) == 2
        registered = client.get_registered_model(NAME)
        assert {alias: int(version) for alias, version in registered.aliases.items()} == {"dense": 1, "sparse": 2}
        # Results that are sent again, to a store that has them, make nothing new.
        path = trained.dir("ssd") / "mlflow.json"
        record = read_json(path)
        path.write_text(json.dumps({**record, "ended": record["delivered"] or record["ended"]}))
        send_runs(trained.results, [trained.dir("ssd")])
    found = read_json(trained.dir("ssd") / "evaluation.json")
    (run,) = (one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name == "ssd-seed0")
    assert {one.model_id for one in run.outputs.model_outputs} == {one.model_id for one in models.values()}
    for mode, model in models.items():
        assert str(model.status) == "READY"
        assert model.source_run_id == run.info.run_id
        assert {m.key: m.value for m in model.metrics}[f"eval/loss_{mode}"] == found[f"loss_{mode}"]
        info = mlflow.models.get_model_info(f"models:/{NAME}@{mode}")
        assert info.signature.inputs.input_names() == ["text"]
        assert [param.name for param in info.signature.params.params] == ["new_tokens", "top_k"]
        assert info.saved_input_example_info is not None


def test_registering_copies_no_weights(trained: Bench) -> None:
    files = [path for path in (trained.results / "mlartifacts").rglob("*") if path.is_file() and "models" in path.parts]
    weights = trained.open("ssd").checkpoint("sparse_phases").stat().st_size
    assert 0 < sum(path.stat().st_size for path in files) < min(weights, 20_000)


def test_a_model_that_is_loaded_back_scores_as_the_run_does_and_continues_texts(trained: Bench, uri: str) -> None:
    run = trained.open("ssd")
    model = final_model(run).eval()
    tokenizer = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    scored = {mode: mlflow.pyfunc.load_model(f"models:/{NAME}@{mode}") for mode in ("dense", "sparse")}
    for mode, loaded in scored.items():
        model.set_mode(mode, run.config.moe.top_k)
        sums = log_likelihoods(model, ids, run.vocab.eos_id)
        expected = [-total / len(tokens) for total, tokens in zip(sums, ids, strict=True)]
        assert loaded.predict(texts())["loss"].tolist() == pytest.approx(expected, rel=1e-4)
    everything = scored["sparse"].predict(texts(), params={"top_k": run.config.moe.experts})
    assert everything["loss"].tolist() == pytest.approx(scored["dense"].predict(texts())["loss"].tolist(), rel=1e-4)
    continued = scored["sparse"].predict(texts().iloc[1:], params={"new_tokens": 3})["continuation"]
    assert len(continued[0]) > 0
    with pytest.raises(Exception, match="top_k 9: allowed are 1 to 4"):
        scored["sparse"].predict(texts(), params={"top_k": 9})


def test_models_are_served_on_loopback(trained: Bench, uri: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}@sparse",
        "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with (tmp_path / "served.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (tmp_path / "served.log").read_text()
            time.sleep(0.2)
        asked = {"dataframe_split": {"columns": ["text"], "data": [[text] for text in TEXTS]}}
        scored = _ask(port, asked)
        assert all(row["loss"] > 0 and row["tokens"] > 0 and "continuation" not in row for row in scored)
        continued = _ask(port, {**asked, "params": {"new_tokens": 4, "top_k": 4}})
        assert all(row["continuation"] for row in continued)
        local = mlflow.pyfunc.load_model(f"models:/{NAME}@sparse").predict(
            texts(), params={"new_tokens": 4, "top_k": 4}
        )
        assert [row["continuation"] for row in continued] == local["continuation"].tolist()
        assert [row["loss"] for row in continued] == pytest.approx(local["loss"].tolist(), rel=1e-4)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _ask(port: int, content: dict[str, object]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        predictions: list[dict[str, Any]] = json.load(response)["predictions"]
    return predictions


def test_models_and_artifacts_are_found_in_results_that_moved(trained: Bench, tmp_path: Path) -> None:
    """In a process of its own: MLflow remembers where a run's artifacts were."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(trained.results, first)
    connect(first)
    first.rename(moved)
    connect(moved)
    program = f"""
import mlflow, pandas, sys
client = mlflow.MlflowClient()
(experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
(run,) = [one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name == "ssd-seed0"]
places = [run.info.artifact_uri, client.get_model_version("{NAME}", 2).source]
places += [one.artifact_location for one in client.search_logged_models([experiment.experiment_id])]
assert all(place.startswith("{moved.as_uri()}/") for place in places), places
assert "evaluation.json" in [one.path for one in client.list_artifacts(run.info.run_id)]
model = mlflow.pyfunc.load_model("models:/{NAME}@sparse")
assert model.predict(pandas.DataFrame({{"text": {TEXTS!r}}}))["loss"].gt(0).all()
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri(moved)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_whose_run_was_trained_anew_is_refused(trained: Bench, tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(trained.results, copy)
    (place,) = [path for path in (copy / "mlartifacts").rglob("run.json") if "sparse" in path.read_text()]
    place.write_text(json.dumps({**read_json(place), "weights": "of earlier"}))
    with pytest.raises(ValueError, match="was trained anew since this model was logged"):
        _load_pyfunc(str(place))


def test_texts_with_special_words_padding_or_nothing_are_scored_as_they_are(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms={"dense": {"method": "dense"}})
    bench.phases("dense")
    run = bench.open("dense")
    strange = ["", "the <|endoftext|> law", "the river moves the actor 3."]
    plain = load_tokenizer(run.tokenizer)
    ids = [encoding.ids[:16] for encoding in plain.encode_batch(strange, add_special_tokens=False)]
    sums = log_likelihoods(final_model(run).eval(), ids[1:], run.vocab.eos_id)
    expected = [-total / len(tokens) for total, tokens in zip(sums, ids[1:], strict=True)]
    padded = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    padded.enable_padding(length=24)
    padded.enable_truncation(3)
    padded.save(str(run.tokenizer / "tokenizer.json"))
    found = ServedModel(run, "dense").predict(pd.DataFrame({"text": strange}))
    assert found["tokens"].tolist() == [0, *map(len, ids[1:])]
    assert found["loss"].isna().tolist() == [True, False, False]
    assert found["loss"].tolist()[1:] == pytest.approx(expected, rel=1e-4)


def test_what_is_measured_again_is_the_latest_even_if_it_was_measured_before(trained: Bench, uri: str) -> None:
    client, config = MlflowClient(), trained.results.parent / "tiny.yaml"
    before = read_json(trained.dir("ssd") / "evaluation.json")["blocks"]
    for blocks in (1, before, before):
        trained.stage("configs", config, f"evaluation.blocks={blocks}", "--results", trained.results)
        trained.stage("evaluate", trained.dir("ssd"))
        trained.stage("send", trained.dir("ssd"))
        found = read_json(trained.dir("ssd") / "evaluation.json")
        (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
        (run,) = (one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name == "ssd-seed0")
        history = sorted(client.get_metric_history(run.info.run_id, "eval/over_k/loss"), key=lambda p: p.timestamp)
        assert {p.step: p.value for p in history} == {p["top_k"]: p["loss"] for p in found["curve"]}
        for model in client.search_logged_models([experiment.experiment_id]):
            name = f"loss_{model.params['mode']}"
            latest = {m.key: m.value for m in sorted(model.metrics, key=lambda m: m.timestamp)}
            assert latest[f"eval/{name}"] == found[name]
    # The third time added nothing.
    assert len(history) == 3 * len(found["curve"])
