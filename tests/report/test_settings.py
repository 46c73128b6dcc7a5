from ssd_lit.report.results import load_results
from ssd_lit.report.settings import AFTERWARDS, ROUTER, alike_but, differences, settings, shown


def test_differences_are_the_keys(many):
    configs = {run.arm: run for run in many.runs}
    assert differences(configs["ssd_mass"], configs["ssd"]) == {"moe.posthoc_router"}
    assert differences(configs["small"], configs["dense"]) == {"model.layers"}
    assert differences(configs["ssd"], configs["dense"]) == set()


def test_arms_are_alike_but_for_some_settings(many):
    configs = {run.arm: run for run in many.runs}
    assert alike_but(configs["ssd_mass"], configs["ssd"], AFTERWARDS)
    assert alike_but(configs["gate"], configs["sparse"], ROUTER)
    assert not alike_but(configs["gate"], configs["sparse"], AFTERWARDS)
    # The same settings, but another method.
    assert not alike_but(configs["ssd"], configs["dense"], ROUTER)


def test_settings_stand_in_the_order_of_the_arms(many):
    results = load_results(many.exp_dir, many.runs)
    layers = next(setting for setting in settings(results) if setting.key == "model.layers")
    arms = list(dict.fromkeys(run.arm for run in many.runs))
    assert dict(zip(arms, layers.values, strict=True))["small"] == "2"
    assert layers.differs


def test_values_are_shown_as_a_reader_writes_them():
    assert shown(None) == "-"
    assert shown([100, 200]) == "100, 200"
    assert shown({"kind": "linear", "end": None}) == "kind linear, end -"
