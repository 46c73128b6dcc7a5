import math
from collections import Counter

import pandas as pd
import pytest
import torch
from torch import Tensor

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.experts import MIN_COUNT, LayerWatch, readable, several_ks
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import Router, build_router
from ssd_lit.support.files import read_json, write_text
from ssd_lit.training.checkpoint import final_model
from tests.conftest import Bench

BLOCKS, EXPERTS, K = 20, 4, 2
ANALYSIS = {"blocks": BLOCKS, "experts": [4, 5], "constructions": ["kmeans"], "tokens": 3}
TABLES = ["load.csv", "routing.csv", "tokens.csv"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    training = {"steps": 40, "batch_size": 4, "validate_every": 40, "validation_blocks": 2, "snapshot_every": 10}
    bench = Bench(tmp_path_factory.mktemp("experts"), training=training, analysis=ANALYSIS)
    for arm in ("dense", "ssd", "posthoc"):
        bench.phases(arm)
        bench.stage("analyse", bench.dir(arm))
    return bench


def table(bench: Bench, arm: str, name: str) -> pd.DataFrame:
    return pd.read_csv(bench.dir(arm) / "analysis" / f"{name}.csv", dtype={"token": str}, na_filter=False)


@pytest.fixture(scope="module")
def seen(done: Bench) -> list[list[tuple[int, list[int], list[float]]]]:
    """Of the SSD run, layer by layer: every token's id, the experts it chooses and the mass of all; block by block."""
    model = final_model(done.open("ssd")).eval()
    model.set_mode("sparse", K)
    layers: list[list[tuple[int, list[int], list[float]]]] = [[] for _ in model.ffns]
    blocks = TokenBlocks(done.data / "tokens", "validation")
    for block in range(BLOCKS):
        ids = blocks[block]["inputs"]
        with torch.no_grad():
            inputs = ffn_inputs(model, {"inputs": ids[None], "targets": ids[None]})
            for rows, ffn, x in zip(layers, model.ffns, inputs, strict=True):
                for token, row in zip(ids.tolist(), x, strict=True):
                    hidden = torch.relu(ffn.w_in @ row + ffn.b_in)
                    mass = [float(part.sum()) for part in hidden.split(len(hidden) // EXPERTS)]
                    scores = ffn.router(row[None])[0].tolist()
                    chosen = sorted(range(EXPERTS), key=lambda e: -scores[e])
                    rows.append((token, chosen, mass))
    return layers


def test_load_is_the_share_of_tokens_and_adds_up_to_k(done: Bench, seen: list) -> None:
    load = table(done, "ssd", "load")
    assert load.groupby("layer")["load"].sum().tolist() == pytest.approx([K, K])
    for layer, rows in enumerate(seen):
        counts = Counter(expert for _, chosen, _ in rows for expert in chosen[:K])
        expected = [counts[expert] / len(rows) for expert in range(EXPERTS)]
        assert load[load["layer"] == layer]["load"].tolist() == pytest.approx(expected)
        told = read_json(done.dir("ssd") / "analysis" / "analysis.json")["experts"]["layers"][layer]
        shares = [value / K for value in expected if value]
        assert told["dead_experts"] == expected.count(0)
        assert told["load_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(EXPERTS))


def test_shares_of_activation_mass_against_every_token_in_turn(done: Bench, seen: list) -> None:
    routing = table(done, "ssd", "routing")
    for layer, rows in enumerate(seen):
        total = sum(sum(mass) for _, _, mass in rows)
        mine = routing[routing["layer"] == layer].set_index("top_k")
        assert list(mine.index) == [1, 2, 4]
        for k in mine.index:
            found = sum(mass[expert] for _, chosen, mass in rows for expert in chosen[:k])
            best = sum(sum(sorted(mass)[-k:]) for _, _, mass in rows)
            assert mine.loc[k, "chosen_share"] == pytest.approx(found / total, rel=1e-4)
            assert mine.loc[k, "oracle_share"] == pytest.approx(best / total, rel=1e-4)
            assert mine.loc[k, "recall"] == pytest.approx(found / best, rel=1e-4)
        assert mine.loc[EXPERTS, ["chosen_share", "oracle_share", "recall"]].tolist() == pytest.approx([1, 1, 1])
        told = read_json(done.dir("ssd") / "analysis" / "analysis.json")["experts"]["layers"][layer]
        assert told["routing_recall"] == pytest.approx(mine.loc[K, "recall"])


def test_token_lift_against_a_count_over_all_tokens(done: Bench, seen: list) -> None:
    tokens = table(done, "ssd", "tokens")
    for layer, rows in enumerate(seen):
        times = Counter(token for token, _, _ in rows)
        for expert in range(EXPERTS):
            chose = Counter(token for token, chosen, _ in rows if expert in chosen[:K])
            load = sum(chose.values()) / len(rows)
            lifts = {
                token: chose[token] / times[token] / load
                for token in chose
                if times[token] >= MIN_COUNT and chose[token]
            }
            best = sorted(lifts, key=lambda token: (-lifts[token], -chose[token], token))[:3]
            mine = tokens[(tokens["layer"] == layer) & (tokens["expert"] == expert)]
            assert mine["rank"].tolist() == list(range(1, len(best) + 1))
            assert mine["lift"].tolist() == pytest.approx([lifts[token] for token in best])
            for row in mine.itertuples():
                assert (row.seen, row.count) == (times[row.token_id], chose[row.token_id])
    assert len(tokens) > 0
    tokenizer = load_tokenizer(done.data / "tokenizer")
    assert tokens["token"].tolist() == [readable(tokenizer, token) for token in tokens["token_id"]]


class MassRouter(Router):
    """Scores experts by what only the oracle knows."""

    def __init__(self, ffn: ExpertFFN):
        super().__init__()
        self._mass = ffn.activation_mass

    def forward(self, x: Tensor) -> Tensor:
        return self._mass(x)


def test_the_oracle_as_router_finds_all_mass_at_every_k() -> None:
    torch.manual_seed(0)
    ffn = ExpertFFN(8, 32, experts=8, top_k=3, router=build_router("center", 8, 8, 4))
    ffn.set_mode("sparse", 3)
    x, tokens = torch.randn(50, 8), torch.randint(5, (50,))
    found = {}
    for name, router in (("center", ffn.router), ("oracle", MassRouter(ffn))):
        ffn.router = router
        watch = LayerWatch(8, 5, torch.device("cpu"))
        watch.update(ffn, x[:20], tokens[:20])
        watch.update(ffn, x[20:], tokens[20:])
        found[name] = [watch.mass_shares(k) for k in range(1, 9)]
    assert all(chosen == pytest.approx(best) for chosen, best in found["oracle"])
    assert all(chosen < best for chosen, best in found["center"][:-1])
    assert found["center"][-1] == pytest.approx((1.0, 1.0))


def test_what_is_left_out_is_told_with_the_reason(done: Bench) -> None:
    told = {arm: read_json(done.dir(arm) / "analysis" / "analysis.json") for arm in ("dense", "ssd", "posthoc")}
    assert told["ssd"]["written"] == ["similarity.csv", *TABLES]
    assert told["ssd"]["left_out"] == {}
    assert told["ssd"]["pattern"] == {
        "steps": [10, 20, 30, 40], "constructions": ["kmeans"], "experts": [4], "experts_left_out": [5],
    }  # fmt: skip
    assert told["dense"]["written"] == ["similarity.csv"]
    assert set(told["dense"]["left_out"]) == set(TABLES)
    assert "no sparse mode" in told["dense"]["left_out"]["load.csv"]
    assert told["dense"]["experts"] is None
    assert told["posthoc"]["written"] == TABLES
    assert "snapshot_every" in told["posthoc"]["left_out"]["similarity.csv"]
    for arm, content in told.items():
        files = {path.name for path in (done.dir(arm) / "analysis").iterdir()}
        assert files == {*content["written"], "analysis.json"}


def test_analysing_again_leaves_no_table_behind_that_is_not_written_anew(done: Bench) -> None:
    folder = done.dir("dense") / "analysis"
    write_text(folder / "load.csv", "left over\n")
    (folder / "analysis.json").unlink()  # of a measurement that is done nothing would be written
    before = (folder / "similarity.csv").read_bytes()
    done.stage("analyse", done.dir("dense"))
    assert {path.name for path in folder.iterdir()} == {"similarity.csv", "analysis.json"}
    assert (folder / "similarity.csv").read_bytes() == before


def test_several_ks_double_up_to_all_experts() -> None:
    assert several_ks(16, 6) == [1, 2, 4, 6, 8, 16]
    assert several_ks(12, 1) == [1, 2, 4, 8, 12]
    assert several_ks(1, 1) == [1]


def test_every_token_has_a_text_that_can_be_printed(done: Bench) -> None:
    tokenizer = load_tokenizer(done.data / "tokenizer")
    texts = {token: readable(tokenizer, token) for token in range(tokenizer.get_vocab_size())}
    assert all(text and text.isprintable() and " " not in text for text in texts.values())
    assert texts[tokenizer.encode(" the").ids[0]] == "␣the"
    assert texts[tokenizer.encode("\n").ids[0]] == "⏎"
    # The first byte of a character of two.
    assert texts[tokenizer.encode("é").ids[0]] == "Ã"
