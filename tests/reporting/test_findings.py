import math

import pytest

from ssd_lit.reporting.findings import findings
from ssd_lit.reporting.runs import load_results
from ssd_lit.reporting.words import PERPLEXITY, compare, digits, duration, listed, scaled


def told(tree):
    return {finding.topic: finding for finding in findings(load_results(tree.exp_dir, tree.runs))}


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
