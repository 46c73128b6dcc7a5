import math

import pytest
import torch

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.files import read_json
from ssd_lit.training.checkpoint import build_model, load_weights, read_checkpoint
from tests.conftest import Bench


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("evaluation"))
    for arm in ("dense", "posthoc", "ssd"):
        bench.phases(arm)
        bench.stage("evaluate", bench.dir(arm))
    return bench


def test_losses_are_the_mean_over_the_same_validation_tokens(done: Bench) -> None:
    found = read_json(done.dir("ssd") / "evaluation.json")
    run = done.runs["ssd"]
    model = build_model(run, vocab_size=300, end_of_text=0)
    load_weights(model, read_checkpoint(done.last_checkpoint("ssd")))
    model.eval()
    blocks = TokenBlocks(done.data / "tokens", "validation")
    assert found["tokens"] == 8 * 16
    for mode, k in (("dense", 1), ("sparse", 2)):
        model.set_mode(mode, k)  # type: ignore[arg-type]
        with torch.no_grad():
            losses = [model.loss(blocks[i]["inputs"][None], blocks[i]["targets"][None]).item() for i in range(8)]
        assert found[f"loss_{mode}"] == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_with_all_experts_the_curve_ends_at_the_dense_loss(done: Bench) -> None:
    for arm in ("ssd", "posthoc"):
        found = read_json(done.dir(arm) / "evaluation.json")
        assert [point["top_k"] for point in found["curve"]] == [1, 2, 4]
        assert found["curve"][-1]["loss"] == pytest.approx(found["loss_dense"], rel=1e-5)
        assert found["loss_sparse"] == found["curve"][1]["loss"]
        assert all(0 < recall <= 1 for recall in found["routing_recall"])


def test_posthoc_is_the_dense_model_and_a_dense_model_has_no_sparse_mode(done: Bench) -> None:
    dense, posthoc = (read_json(done.dir(arm) / "evaluation.json") for arm in ("dense", "posthoc"))
    assert posthoc["loss_dense"] == pytest.approx(dense["loss_dense"], rel=1e-5)
    assert posthoc["active_neurons"] == pytest.approx(dense["active_neurons"], rel=1e-4)
    assert (dense["loss_sparse"], dense["top_k"], dense["curve"]) == (None, None, [])
    assert dense["loss_dense"] < math.log(300)
