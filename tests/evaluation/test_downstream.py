"""Fine-tuning and zero-shot scores of small models, and the stage that brings them together."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ssd_lit.config import GlueConfig, ModelConfig, MoEConfig
from ssd_lit.data.benchmarks import Pair, PairSet
from ssd_lit.data.index import VocabInfo
from ssd_lit.evaluation import blimp, downstream, glue
from ssd_lit.evaluation.blimp import log_likelihoods, score_on_blimp
from ssd_lit.evaluation.glue import Classifier, Texts, encode, fine_tune, outputs_for
from ssd_lit.evaluation.resumable import ResumableResults
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.routers import expert_centers
from ssd_lit.report.downstream import write_downstream
from ssd_lit.support.files import read_json_checked
from ssd_lit.tracking.store import tracking_uri
from tests.conftest import Bench
from tests.labelled import packed, write_blimp, write_glue

CPU = torch.device("cpu")
EOS, LONGEST = 0, 24
SPECIALS = VocabInfo(vocab_size=300, eos_id=EOS, mask_id=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """What is compared bit for bit must not depend on the number of cores, and so small a model wants no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(family: str) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(family=family, layers=2, d_model=16, heads=2, d_ff=32)
    model = LanguageModel(config, MoEConfig(experts=4, top_k=2), SPECIALS, context=LONGEST)
    for p in model.parameters():
        if p.ndim == 2:
            # Fresh weights are so small that all sentences of one length are about as likely.
            p.data.mul_(8)
    for ffn in model.ffns:
        ffn.router.on_permuted(ffn.gating_weight)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(["the river moves the engine"] * 9, trainer)
    return found


def one_by_one(model: LanguageModel, ids: Sequence[int]) -> float:
    """The log-probability of each token in turn, given all before it."""
    total = 0.0
    for place in range(len(ids)):
        read = torch.tensor([[EOS, *ids[:place]]])
        logits = model({"inputs": read, "targets": read})[0, -1]
        total += float(logits.log_softmax(dim=-1)[ids[place]])
    return total


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("at_once", [20, 4096])
def test_a_sentence_is_as_likely_as_its_tokens_one_by_one(
    at_once: int, family: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blimp, "TOKENS", at_once)
    model = small_model(family)
    model.set_mode(mode, 2)
    rng = torch.Generator().manual_seed(1)
    sentences = [torch.randint(2, 300, (n,), generator=rng).tolist() for n in [5, 1, 9, 2, 24, 9] * 12]
    found = log_likelihoods(model, sentences, EOS)
    with torch.no_grad():
        expected = [one_by_one(model, one) for one in sentences[:6]]
    assert found[:6] == pytest.approx(expected, rel=1e-4)
    assert len(found) == len(sentences)


def test_ties_are_wrong_and_long_sentences_are_cut(tokenizer: Tokenizer) -> None:
    model = small_model("gpt2")
    pairs = [Pair("a river", "b rover"), Pair("the same", "the same"), Pair("z" * 40 + "a", "z" * 40 + "b")]
    ids = [[tokenizer.encode(text).ids for text in pair] for pair in pairs]
    with torch.no_grad():
        better = one_by_one(model, ids[0][0]) > one_by_one(model, ids[0][1])
    sets = [PairSet("one", "syntax", tuple(pairs)), PairSet("two", "", (pairs[0],))]
    found = score_on_blimp(model, sets, tokenizer, eos_id=EOS, longest=LONGEST, title="")
    assert found == [
        {"set": "one", "field": "syntax", "pairs": 3, "cut": 1, "accuracy": better / 3},
        {"set": "two", "field": "", "pairs": 1, "cut": 0, "accuracy": better / 1},
    ]


def test_texts_are_ended_as_documents_are_and_lose_the_ends_of_the_longest(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(text).ids for text in ("the river moves", "xyz"))
    texts = encode([("the river moves", "xyz"), ("xyz", "q" * 50)], tokenizer, EOS, LONGEST, CPU)
    assert texts.tokens[0, : texts.lengths[0]].tolist() == [EOS, *a, EOS, *b, EOS]
    second = texts.tokens[1].tolist()
    assert (len(second), second[:5], second[-1]) == (LONGEST, [EOS, *b, EOS], EOS)
    assert texts.cut == 1


def test_padding_says_nothing(tokenizer: Tokenizer) -> None:
    classifier = Classifier(small_model("bert"), 2).eval()
    texts = encode([("the river moves a lot",), ("xy",), ("engine",)], tokenizer, EOS, LONGEST, CPU)
    together = outputs_for(classifier, texts)
    for row in range(3):
        alone = Texts(texts.tokens[row : row + 1, : texts.lengths[row]], texts.lengths[row : row + 1], 0)
        assert torch.allclose(outputs_for(classifier, alone)[0], together[row], atol=1e-5)


SETTINGS = {"lr": 1e-2, "epochs": 4, "batch_size": 8, "seeds": [0, 1]}


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_what_is_easily_told_apart_is_learnt_the_same_way_twice(
    mode: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = GlueConfig(folder=str(tmp_path), **SETTINGS)
    words = [("the river moves",), ("the engine moves",)]
    texts = encode([(f"{words[i % 2][0]} {i}",) for i in range(60)], tokenizer, EOS, LONGEST, CPU)
    others = encode([(f"{words[i % 2][0]} {i}",) for i in range(60, 100)], tokenizer, EOS, LONGEST, CPU)
    targets = torch.arange(60) % 2
    outputs = []
    for seed in (0, 0, 1):
        model = small_model("bert")
        model.set_mode(mode, 2)
        outputs.append(outputs_for(fine_tune(model, texts, targets, 2, settings, seed, ""), others))
    right = (outputs[0].argmax(dim=1) == torch.arange(60, 100) % 2).float().mean()
    assert right > 0.9
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_scores_are_fitted_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_glue(tmp_path)
    settings = GlueConfig(folder=str(tmp_path), tasks=["stsb"], **SETTINGS)
    model = small_model("bert")
    before = copy.deepcopy(model.state_dict())
    found = glue.score_on_glue(
        model, settings, tokenizer, eos_id=EOS, longest=LONGEST, modes=("dense", "sparse"),
        pieces=ResumableResults(tmp_path / "pieces", {}), title="",
    )  # fmt: skip
    assert [(one["mode"], one["seed"]) for one in found["scores"]] == [
        ("dense", 0), ("dense_to_sparse", 0), ("sparse", 0), ("dense", 1), ("dense_to_sparse", 1), ("sparse", 1),
    ]  # fmt: skip
    assert all(one[metric] > 0.8 for one in found["scores"] for metric in ("pearson", "spearman"))
    assert found["baseline"] == {"stsb": {"pearson": 0.0, "spearman": 0.0}}
    assert found["examples"]["stsb"] == {"train": 40, "dev": 20, "cut": 0}
    # The model itself is as it was.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_centres_follow_the_rows_that_were_fine_tuned_densely(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_glue(tmp_path)
    settings = GlueConfig(folder=str(tmp_path), tasks=["sst2"], **{**SETTINGS, "seeds": [0], "epochs": 1})
    seen: list[tuple[str, bool]] = []

    def watch(classifier: Classifier, texts: Texts) -> torch.Tensor:
        ffn = classifier.model.ffns[0]
        at_centre = torch.allclose(ffn.router.centers, expert_centers(ffn.gating_weight, 4))
        seen.append((ffn.mode, at_centre))
        return torch.zeros(len(texts), 2)

    monkeypatch.setattr(glue, "outputs_for", watch)
    glue.score_on_glue(
        small_model("bert"), settings, tokenizer, eos_id=EOS, longest=LONGEST, modes=("dense", "sparse"),
        pieces=ResumableResults(tmp_path / "pieces", {}), title="",
    )  # fmt: skip
    assert seen == [("dense", False), ("sparse", True), ("sparse", False)]


def test_pieces_of_the_same_inputs_are_not_done_twice(tmp_path: Path) -> None:
    done: list[str] = []

    def work(name: str) -> list[str]:
        done.append(name)
        return [*done]

    for inputs, expected in (({"lr": 1}, ["a"]), ({"lr": 1}, ["a"]), ({"lr": 2}, ["a", "b"])):
        assert ResumableResults(tmp_path / "pieces", inputs).get("one", lambda: work("ab"[len(done)])) == expected


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bert and a gpt2 with experts, and a bert without: trained, and tried downstream."""
    folder = tmp_path_factory.mktemp("downstream")
    pairs = [("the river moves the actor", "the the the river"), ("the engine moves", "moves engine the")]
    archive = packed(write_glue(folder / "glue"))
    tuning = {**SETTINGS, "epochs": 2, "tasks": ["sst2", "mrpc"]}
    downstream = {
        "glue": {"folder": str(archive), **tuning},
        "blimp": {"file": str(write_blimp(folder / "BLiMP.zip", {"order": ("syntax", pairs)}))},
    }
    fixed = {"method": "ssd", "switching": {"switch_points": [8, 12]}, "training": {"steps": 16}}
    bench = Bench(
        folder,
        data=bert_data(folder),
        downstream=downstream,
        model={"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "family": "bert"},
        arms={
            "dense": {"method": "dense", "training": {"steps": 8}},
            "ssd": fixed,
            "gpt": {**fixed, "model": {"family": "gpt2"}},
        },
    )
    for arm in bench.runs:
        bench.phases(arm)
        bench.stage("downstream", bench.dir(arm))
    return bench


def bert_data(folder: Path) -> dict[str, Any]:
    return {
        "name": "grammar", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
        "validation_fraction": 0.1, "test_fraction": 0.1, "sequence_length": 24,
        "tokenizer": {"vocab_size": 300, "mask_token": True},
    }  # fmt: skip


def found_in(bench: Bench, arm: str) -> dict[str, Any]:
    content = read_json_checked(bench.dir(arm) / "downstream/downstream.json")
    return {name: content[name] for name in ("glue", "blimp", "left_out", "inputs")}


def test_each_model_is_tried_where_it_can_be(done: Bench) -> None:
    ssd, dense, gpt = (found_in(done, arm) for arm in ("ssd", "dense", "gpt"))
    assert {(one["task"], one["mode"], one["seed"]) for one in ssd["glue"]["scores"]} == {
        (task, mode, seed)
        for task in ("sst2", "mrpc")
        for mode in ("dense", "dense_to_sparse", "sparse")
        for seed in (0, 1)
    }
    assert all(0 <= one["accuracy"] <= 1 for one in ssd["glue"]["scores"])
    assert all(("f1" in one) == (one["task"] == "mrpc") for one in ssd["glue"]["scores"])
    assert ssd["glue"]["baseline"]["sst2"] == {"accuracy": 0.5}
    assert {one["mode"] for one in dense["glue"]["scores"]} == {"dense"}
    assert ssd["blimp"] is None
    assert "bert" in ssd["left_out"]["blimp"]
    assert gpt["glue"] is None
    assert "gpt2" in gpt["left_out"]["glue"]
    assert [(one["mode"], one["set"], one["field"], one["pairs"]) for one in gpt["blimp"]["scores"]] == [
        ("dense", "order", "syntax", 2), ("sparse", "order", "syntax", 2),
    ]  # fmt: skip
    assert all(
        {path.name for path in (done.dir(arm) / "downstream").iterdir()} == {"downstream.json"} for arm in done.runs
    )


def test_a_stage_that_was_ended_goes_on_with_what_was_not_done(done: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = found_in(done, "ssd")
    tuned: list[str] = []

    def stopping(*arguments: Any) -> Classifier:
        if len(tuned) == 3:
            tuned.append("ended here")
            raise KeyboardInterrupt
        tuned.append(arguments[-1])
        return fine_tune(*arguments)

    monkeypatch.setattr(glue, "fine_tune", stopping)
    (done.dir("ssd") / "downstream/downstream.json").unlink()
    with pytest.raises(AssertionError):
        done.stage("downstream", done.dir("ssd"))
    assert not (done.dir("ssd") / "downstream/downstream.json").exists()
    done.stage("downstream", done.dir("ssd"))
    assert found_in(done, "ssd") == expected
    assert len(tuned) == len(set(tuned)) == 1 + 2 * 2 * 2


def test_pieces_of_another_file_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modes are scored on the same sentences, even if the file changes while the stage is stopped."""
    pairs = [("the river moves the actor", "the the the river"), ("the engine moves", "moves engine the")]
    file = write_blimp(tmp_path / "BLiMP.zip", {"order": ("syntax", pairs)})
    bench = Bench(tmp_path, arms={"ssd": {"method": "ssd"}}, downstream={"blimp": {"file": str(file)}})
    bench.phases("ssd")

    def stopping(model: LanguageModel, *arguments: Any, **settings: Any) -> list[dict[str, Any]]:
        if model.ffns[0].mode == "sparse":
            raise KeyboardInterrupt
        return score_on_blimp(model, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(downstream, "score_on_blimp", stopping)
        with pytest.raises(AssertionError):
            bench.stage("downstream", bench.dir("ssd"))
    write_blimp(file, {"order": ("syntax", pairs[:1])})
    bench.stage("downstream", bench.dir("ssd"))
    content = read_json_checked(bench.dir("ssd") / "downstream/downstream.json")
    assert [(one["mode"], one["pairs"]) for one in content["blimp"]["scores"]] == [("dense", 1), ("sparse", 1)]


def test_scores_reach_mlflow_and_the_table(done: Bench) -> None:
    client = MlflowClient(tracking_uri(done.results))
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    scores = [
        one["accuracy"]
        for one in found_in(done, "ssd")["glue"]["scores"]
        if (one["task"], one["mode"]) == ("mrpc", "sparse")
    ]
    assert runs["ssd-seed0"]["downstream/mrpc/accuracy_sparse"] == pytest.approx(sum(scores) / 2)
    assert "downstream/blimp/accuracy_dense" in runs["gpt-seed0"]

    path = write_downstream(done.results / "tiny", list(done.runs.values()))
    table = pd.read_csv(path)
    assert len(table) == 2 * 2 + 2 * 3 * 2 + 2
    mine = table[(table["run"] == "ssd-seed0") & (table["task"] == "mrpc") & (table["mode"] == "sparse")]
    assert mine["accuracy"].tolist() == scores
    assert mine["tuning_seed"].tolist() == [0, 1]
