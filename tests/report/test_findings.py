import math

import pytest

from ssd_lit.report.findings import findings
from ssd_lit.report.formatting import PERPLEXITY, compare, digits, duration, listed, scaled
from ssd_lit.report.grid import grids
from ssd_lit.report.runs import load_results


def told(tree):
    results = load_results(tree.exp_dir, tree.runs)
    found = findings(results, grids(tree.experiment, results))
    assert len({finding.topic for finding in found}) == len(found)
    return {finding.topic: finding for finding in found}


def test_numbers_are_those_of_the_runs(tree):
    found = told(tree)
    ssd, dense = math.exp(3.33), math.exp(3.30)
    text = found["SSD in dense mode"].text
    assert f"{ssd:.2f}" in text
    assert f"{100 * (ssd / dense - 1):.1f}% higher (worse) than Dense's {dense:.2f}" in text
    assert found["SSD in dense mode"].runs == ("ssd-seed0", "dense-seed0")
    # 160 of 400 steps at 2.2 instead of 3.0 MFLOP a token.
    assert "40.0% of SSD's training steps" in found["SSD: cost"].text
    assert f"{100 * (1 - (240 * 3.0 + 160 * 2.2) / 1200):.1f}% less than Dense's" in found["SSD: cost"].text
    assert "took 104.5 s, 4.5% more than its 100.0 s" in found["SSD: cost"].text
    assert (
        "365.04, 13.5 times as high (worse) as its own dense mode's 27.11"
        in found["Post-hoc <MoE> in sparse mode"].text
    )
    assert "after 120 steps as the pattern was stable" in found["SSD: switching"].text
    assert "2 sparse phases followed" in found["SSD: switching"].text
    assert "one seed" in found["How far this goes"].text


def test_words_turn_with_the_numbers(make_tree, tree):
    turned = {"dense": (3.33, None), "ssd": (3.30, 3.305), "sparse": (3.2, 3.1), "posthoc": (3.33, 3.2)}
    before, after = told(tree), told(make_tree((0,), losses=turned))
    for topic, worse, better in (
        ("SSD in dense mode", "higher (worse) than Dense's 27.11", "lower (better) than Dense's 27.94"),
        ("SSD in sparse mode", "No k scored (up to 12)", "k scored that comes within 1% of dense mode is 1."),
        ("Post-hoc <MoE> in sparse mode", "(worse)", "(better)"),
        ("MoE from scratch in its sparse mode", "(worse)", "(better)"),
    ):  # fmt: skip
        assert worse in before[topic].text
        assert better in after[topic].text
    assert "(better)" in before["SSD against Post-hoc <MoE>, both in sparse mode"].text
    assert "(worse)" in after["SSD against Post-hoc <MoE>, both in sparse mode"].text


def test_several_seeds_tell_their_range(two_seeds, make_tree):
    found = told(two_seeds)
    low, high = math.exp(3.33), math.exp(3.334)
    text = found["SSD in dense mode"].text
    assert f"{(low + high) / 2:.2f} ({low:.2f} to {high:.2f})" in text
    assert "The ranges over seeds do not overlap." in text
    assert "549 GFLOP, 10.7% less than Dense's 614 GFLOP" in found["SSD: cost"].text
    assert "means over 2 seeds" in found["How far this goes"].text
    assert "one seed" not in found["How far this goes"].text
    near = make_tree((0, 1), ("dense", "ssd"), losses={"dense": (3.30, None), "ssd": (3.302, 3.4)})
    assert "overlap, so the difference may be chance" in told(near)["SSD in dense mode"].text


def test_missing_arms_are_said(make_tree):
    alone = told(make_tree((0,), ("ssd",)))
    assert alone["SSD in dense mode"].text.endswith(f"perplexity of {math.exp(3.33):.2f}.")
    assert "No dense arm of the same model and data was run beside SSD" in alone["How far this goes"].text
    assert "No SSD arm was run." in told(make_tree((0,), ("dense",)))["How far this goes"].text


def test_other_models_are_not_compared(tree):
    results = load_results(tree.exp_dir, tree.runs)
    wider = results[0].config.model.model_copy(update={"d_ff": 128})
    object.__setattr__(results[0], "config", results[0].config.model_copy(update={"model": wider}))
    text = " ".join(finding.text for finding in findings(results))
    assert "Dense's" not in text
    assert "No dense arm of the same model and data was run beside SSD and MoE from scratch" in text


def test_upcycling_is_charged_for_the_run_it_starts_from(make_tree):
    found = told(make_tree((0,), ("dense", "upcycle")))["Upcycled: upcycling"]
    # 400 steps at 3.0 MFLOP a token, then 200 at 2.2.
    assert "for 840 GFLOP; 614 GFLOP of these are Dense's" in found.text
    assert f"{100 * 200 * 2.2 / (400 * 3.0):.1f}% more than Dense's 614 GFLOP" in found.text
    assert f"{math.exp(3.24):.2f} with 2 of 4 experts, each a copy of the whole FFN" in found.text
    assert f"{100 * (1 - math.exp(3.24 - 3.30)):.1f}% lower (better) than Dense's" in found.text
    assert found.runs == ("upcycle-seed0", "dense-seed0")


def test_upcycling_that_does_not_pay_is_said(make_tree):
    text = told(make_tree((0,), ("dense", "upcycle"), losses={"upcycle": (None, 3.31)}))["Upcycled: upcycling"].text
    assert f"{100 * (math.exp(3.31 - 3.30) - 1):.1f}% higher (worse) than Dense's" in text


@pytest.mark.parametrize(("loss", "words"), [(3.335, "lower (better)"), (3.325, "higher (worse)")])
def test_dense_training_for_the_same_flops(make_tree, loss, words):
    tree = make_tree((0,), ("dense", "ssd", "matched"), losses={"matched": (loss, None)})
    found = told(tree)
    text = found["SSD against Dense at SSD's FLOPs, for the same FLOPs"].text
    steps = int((240 * 3.0 + 160 * 2.2) / 3.0)
    assert f"trained for {steps} steps, all that SSD's 549 GFLOP pay for (548 GFLOP spent)." in text
    change = 100 * abs(math.exp(3.33 - loss) - 1)
    assert f"in dense mode, {math.exp(3.33):.2f}, is {change:.1f}% {words} than the {math.exp(loss):.2f}" in text
    # The dense arm that trained to the end stays what SSD is measured by.
    assert "than Dense's 27.11" in found["SSD in dense mode"].text


def test_a_smaller_dense_model_is_compared_for_the_same_flops_only(make_tree):
    found = told(make_tree((0,), ("ssd", "small")))
    text = found["SSD against Smaller dense, for the same FLOPs"].text
    assert "with another model: model.layers 2 instead of 3." in text
    assert "lower (better) than the 29.37 of Smaller dense" in text
    assert "Smaller dense" not in found["SSD in dense mode"].text
    assert "No dense arm of the same model and data was run beside SSD" in found["How far this goes"].text


def test_families_are_not_compared(make_tree):
    tree = make_tree((0,), ("dense", "ssd", "small"))
    results = load_results(tree.exp_dir, tree.runs)
    bert = results[2].config.model.model_copy(update={"family": "bert"})
    object.__setattr__(results[2], "config", results[2].config.model_copy(update={"model": bert}))
    found = {finding.topic: finding.text for finding in findings(results)}
    matched = found["SSD against Smaller dense, for the same FLOPs"]
    assert "their perplexities cannot be compared" in matched
    assert "29.37" not in matched
    assert "gpt2 and bert predict different targets" in found["How far this goes"]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (3.385, "{closed:.1f}% of the gap to the oracle is closed."),
        (3.42, "the gap to the oracle grows by {grown:.1f}%."),
        (3.34, "100.0% of the gap to the oracle is closed."),
    ],
)
def test_what_a_trained_router_buys(make_tree, loss, words):
    tree = make_tree((0,), ("dense", "ssd", "ssd_mass"), losses={"ssd_mass": (3.33, loss)})
    found = told(tree)["SSD, mass router: what the router buys"]
    mine, plain, oracle = math.exp(loss), math.exp(3.40), math.exp(3.33 + 0.6 * 0.07)
    assert f"perplexity is {mine:.2f}, " in found.text
    assert f"the {oracle:.2f} of an oracle" in found.text
    assert f"the {plain:.2f} of SSD, the same model with its center router" in found.text
    closed = 100 * (plain - mine) / (plain - oracle)
    assert words.format(closed=closed, grown=-closed) in found.text
    assert "on average 9.5 experts give" in found.text
    assert found.runs == ("ssd_mass-seed0", "ssd-seed0")


def test_routers_in_a_grid_behind_ssd_are_told_one_by_one_against_its_own(make_tree):
    tree = make_tree((0,), ("dense", "ssd", "routed"))
    found = told(tree)
    for router, loss in (("mass_mlp", 3.375), ("centers", 3.385)):
        text = found[f"SSD, posthoc_router {router}: what the router buys"].text
        assert f"perplexity is {math.exp(loss):.2f}, " in text
        assert f"the {math.exp(3.40):.2f} of SSD, the same model with its center router" in text
        assert "on average 9.5 experts give" in text
    # All start from one model, whose dense mode no router changes.
    grid = found["Grid: SSD"].text
    assert f"In dense mode the perplexity is {math.exp(3.33):.2f} with all of them." in grid
    assert f"In sparse mode the lowest perplexity is {math.exp(3.375):.2f} (posthoc_router mass_mlp)" in grid


@pytest.mark.parametrize(
    ("arms", "changes"), [(("routed",), {"experts": 8}), (("routed", "ssd"), {"construction": "random"})]
)
def test_a_router_behind_ssd_with_other_experts_is_not_told_against_it(make_tree, arms, changes):
    tree = make_tree((0,), ("dense", "ssd", "routed"))
    results = load_results(tree.exp_dir, tree.runs)
    for result in results:
        if result.config.arm.startswith(arms):
            moe = result.config.moe.model_copy(update=changes)
            object.__setattr__(result, "config", result.config.model_copy(update={"moe": moe}))
    texts = [one.text for one in findings(results) if "what the router buys" in one.topic]
    assert len(texts) == 2
    assert not any("the same model" in text for text in texts)


def test_an_oracle_that_is_no_better_leaves_no_gap(make_tree):
    # All of sparse mode's loss is below that of dense mode.
    tree = make_tree((0,), ("dense", "ssd", "ssd_mass"), losses={"ssd": (3.33, 3.20), "ssd_mass": (3.33, 3.2)})
    results = load_results(tree.exp_dir, tree.runs)
    for result in results:
        curve = tuple((k, 3.5) for k, _ in result.evaluation.oracle_curve)
        object.__setattr__(result.evaluation, "oracle_curve", curve)
    text = {finding.topic: finding.text for finding in findings(results)}["SSD, mass router: what the router buys"]
    assert "there is no gap to close" in text


def test_other_ssd_arms_are_told_by_what_they_change(many):
    found = told(many)
    text = found["SSD, fixed switches against SSD"].text
    assert "differs from SSD in switching.switch_points 100, 180, 220, 300 instead of -." in text
    assert "higher (worse) than SSD's" in text
    assert found["SSD, fixed switches: switching"].text.startswith(
        "SSD, fixed switches changed its mode at steps fixed beforehand, 100, 180, 220 and 300: 2 sparse phases"
    )
    # The one with another router only is told among the routers.
    assert "SSD, mass router against SSD" not in found


def test_a_k_schedule_is_told(many):
    text = told(many)["SMoE-Dropout in its sparse mode"].text
    assert "with k from 2 to 16 in training (linear) and 6 of 16 experts in use" in text


def test_a_grid_has_one_finding(many):
    found = told(many)
    text = found["Grid: SSD over tau"].text
    assert "with 3 settings of switching.tau" in text
    low, high = (sum(math.exp(loss + 0.004 * seed) for seed in (0, 1)) / 2 for loss in (3.31, 3.34))
    assert f"lowest perplexity is {low:.2f} ({math.exp(3.31):.2f} to {math.exp(3.314):.2f}) (tau 0.9)" in text
    assert f"(tau 0.6), {100 * (high / low - 1):.1f}% higher (worse) than the lowest" in text
    assert not any("tau 0.6" in topic for topic in found)


@pytest.mark.parametrize(
    ("value", "reference", "words"),
    [
        (1.013, 1.0, "1.3% higher (worse) than"),
        (0.9, 1.0, "10.0% lower (better) than"),
        (1.0003, 1.0, "the same (to 0.1%) as"),
        (20.0, 2.0, "10.0 times as high (worse) as"),
        (math.inf, 2.0, "not comparable with"),
    ],
)
def test_comparisons(value, reference, words):
    assert compare(value, reference, PERPLEXITY) == words


def test_numbers_in_words():
    assert [scaled(value, "FLOP") for value in (0, 12, 1.234e15, 9.999e8)] == [
        "0 FLOP", "12.0 FLOP", "1.23 PFLOP", "1.00 GFLOP",
    ]  # fmt: skip
    assert [digits(value) for value in (1.234, 12.34, 123.4)] == ["1.23", "12.3", "123"]
    assert [duration(value) for value in (5, 600, 36000)] == ["5.0 s", "10.0 min", "10.0 h"]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
