import math

import numpy as np
import pytest
import torch

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.data.index import load_index
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.evaluate import _by_layer
from ssd_lit.evaluation.samples import samples
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.moe.statistics import active_ratio
from ssd_lit.support.files import read_json
from ssd_lit.training.checkpoint import final_model
from tests.conftest import Bench

ARMS = {
    "dense": {"method": "dense"},
    "posthoc": {"method": "posthoc", "parent_arm": "dense"},
    "ssd": {"method": "ssd"},
    "routed": {"method": "posthoc", "parent_arm": "dense", "moe": {"posthoc_router": "norm_mlp", "router_steps": 30}},
    "upcycle": {"method": "upcycle", "parent_arm": "dense", "moe": {"router": "gate", "top_k": 2}},
}


OTHER = "the engine praises the river 7. nobody moves here.\n\n" * 40


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "other.txt").write_text(OTHER, encoding="utf-8")
    data = {
        "name": "grammar", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
        "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"vocab_size": 300}, "sequence_length": 16,
        "held_out": {"other": str(folder / "other.txt")},
    }  # fmt: skip
    bench = Bench(
        folder,
        data=data,
        arms=ARMS,
        evaluation={"blocks": 8, "top_k_curve": [1, 2, 4], "thresholds": [0.0, 0.5, 1.0]},
    )
    for arm in ARMS:
        bench.phases(arm)
        bench.stage("evaluate", bench.dir(arm))
    return bench


def test_losses_are_the_mean_over_the_same_validation_tokens(done: Bench) -> None:
    found = read_json(done.dir("ssd") / "evaluation.json")
    model = final_model(done.open("ssd")).eval()
    blocks = TokenBlocks(done.data / "tokens", "validation")
    assert found["tokens"] == 8 * 16
    for mode, k in (("dense", 1), ("sparse", 2)):
        model.set_mode(mode, k)  # type: ignore[arg-type]
        with torch.no_grad():
            losses = [model.loss({name: x[None] for name, x in blocks[i].items()}).item() for i in range(8)]
        assert found[f"loss_{mode}"] == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_with_all_experts_every_curve_ends_at_the_dense_loss(done: Bench) -> None:
    for arm in ("ssd", "posthoc", "routed"):
        found = read_json(done.dir(arm) / "evaluation.json")
        for curve in ("curve", "oracle_curve"):
            assert [point["top_k"] for point in found[curve]] == [1, 2, 4]
            assert found[curve][-1]["loss"] == pytest.approx(found["loss_dense"], rel=1e-5)
        assert found["loss_sparse"] == found["curve"][1]["loss"]
        assert all(0 < recall <= 1 for recall in found["routing_recall"])


def test_dynamic_k_goes_from_all_experts_to_one_as_the_threshold_rises(done: Bench) -> None:
    found = read_json(done.dir("routed") / "evaluation.json")
    assert found["router"] == "norm_mlp"
    all_on, some, best = found["threshold_curve"]
    assert all_on["mean_k"] == 4
    assert all_on["loss"] == pytest.approx(found["loss_dense"], rel=1e-5)
    assert 1 <= best["mean_k"] <= some["mean_k"] <= 4
    assert best["mean_k"] == pytest.approx(1, abs=0.2)
    assert best["loss"] == pytest.approx(found["curve"][0]["loss"], rel=1e-2)
    assert read_json(done.dir("ssd") / "evaluation.json")["threshold_curve"] == []
    model = final_model(done.open("routed")).eval()
    model.set_mode("sparse", threshold=0.5)
    blocks = TokenBlocks(done.data / "tokens", "validation")
    near = []
    for i in range(8):
        for ffn, x in zip(model.ffns, ffn_inputs(model, {name: v[None] for name, v in blocks[i].items()}), strict=True):
            scores = ffn.router(x)
            near.append((scores >= 0.5 * scores.amax(dim=1, keepdim=True)).sum() / len(x))
    assert some["mean_k"] == pytest.approx(torch.stack(near).mean().item(), rel=1e-5)


def test_posthoc_is_the_dense_model_and_a_dense_model_has_no_sparse_mode(done: Bench) -> None:
    dense, posthoc = (read_json(done.dir(arm) / "evaluation.json") for arm in ("dense", "posthoc"))
    assert posthoc["loss_dense"] == pytest.approx(dense["loss_dense"], rel=1e-5)
    assert posthoc["active_neurons"] == pytest.approx(dense["active_neurons"], rel=1e-4)
    assert (dense["loss_sparse"], dense["top_k"], dense["curve"], dense["router"]) == (None, None, [], None)
    assert dense["loss_dense"] < math.log(300)


def test_experts_that_are_copies_have_no_dense_mode(done: Bench) -> None:
    found = read_json(done.dir("upcycle") / "evaluation.json")
    assert (found["loss_dense"], found["active_ratio"], found["active_neurons"]) == (None, None, None)
    assert found["loss_sparse"] < read_json(done.dir("dense") / "evaluation.json")["loss_dense"] + 0.1


def test_a_text_that_is_held_out_is_one_document_and_is_scored_like_validation(done: Bench) -> None:
    index = load_index(done.data / "tokens")
    assert index["splits"]["other"]["documents"] == 1
    stream = np.fromfile(done.data / "tokens/other.bin", index["dtype"])
    assert load_tokenizer(done.data / "tokenizer").decode(stream[:-1].tolist()) == OTHER.strip()
    model = final_model(done.open("ssd")).eval()
    blocks = TokenBlocks(done.data / "tokens", "other")
    found = read_json(done.dir("ssd") / "evaluation.json")["held_out"]["other"]
    count = min(8, len(blocks))
    assert found["blocks"] == count
    for told, mode, k in [
        (found["loss_dense"], "dense", 1),
        *((p["loss"], "sparse", p["top_k"]) for p in found["curve"]),
    ]:
        model.set_mode(mode, k)
        with torch.no_grad():
            losses = [model.loss({name: x[None] for name, x in blocks[i].items()}).item() for i in range(count)]
        assert told == pytest.approx(sum(losses) / count, rel=1e-5)
    assert [point["top_k"] for point in found["curve"]] == [1, 2, 4]


def test_samples_are_what_greedy_decoding_writes_after_the_same_prompts(done: Bench) -> None:
    tokenizer = load_tokenizer(done.data / "tokenizer")
    blocks = TokenBlocks(done.data / "tokens", "validation")
    model = final_model(done.open("ssd")).eval()
    found = read_json(done.dir("ssd") / "evaluation.json")["samples"]
    assert len(found) == 3
    for number, sample in enumerate(found):
        prompt = blocks[len(blocks) * number // 3]["inputs"][:4]  # a quarter of 16 tokens
        assert sample["prompt"] == tokenizer.decode(prompt.tolist(), skip_special_tokens=False)
        for mode in ("dense", "sparse"):
            model.set_mode(mode, 2)  # type: ignore[arg-type]
            tokens = prompt[None]
            with torch.no_grad():
                for _ in range(8):
                    tokens = torch.cat([tokens, model({"inputs": tokens})[:, -1:].argmax(dim=-1)], dim=1)
            assert sample[mode] == tokenizer.decode(tokens[0, 4:].tolist(), skip_special_tokens=False)


def test_samples_are_of_the_modes_that_a_model_has(done: Bench) -> None:
    for arm, modes in (("dense", {"dense"}), ("posthoc", {"dense", "sparse"}), ("upcycle", {"sparse"})):
        found = read_json(done.dir(arm) / "evaluation.json")["samples"]
        assert [set(sample) for sample in found] == [{"prompt", *modes}] * 3


def test_a_model_that_does_not_predict_the_next_token_writes_nothing(done: Bench) -> None:
    run = done.open("ssd")
    model = final_model(run)
    model.objective_name = "masked"
    assert samples(run, model, "validation", ["dense", "sparse"]) == []


def test_layers_are_measured_alike_on_all_blocks_however_they_are_batched(done: Bench) -> None:
    model = final_model(done.open("ssd")).eval()
    blocks = TokenBlocks(done.data / "tokens", "validation")
    batches = [
        {name: torch.stack([blocks[i][name] for i in rows]) for name in blocks[0]} for rows in ([0, 1, 2, 3], [4])
    ]
    singles = [{name: x[None] for name, x in blocks[i].items()} for i in range(5)]
    expected = _by_layer(model, singles, active_ratio, "dense")
    assert _by_layer(model, batches, active_ratio, "dense") == pytest.approx(expected, rel=1e-5)
    last = _by_layer(model, singles[4:], active_ratio, "dense")
    assert expected != pytest.approx(last, rel=1e-3)


def test_no_oracle_chooses_among_copies(done: Bench) -> None:
    assert read_json(done.dir("upcycle") / "evaluation.json")["oracle_curve"] == []
    assert len(read_json(done.dir("ssd") / "evaluation.json")["oracle_curve"]) == 3
