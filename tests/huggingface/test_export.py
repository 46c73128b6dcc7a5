"""Models go out as Hugging Face folders and come in from them, by the stages that a person calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch.nn.functional import cross_entropy

import ssd_lit
from ssd_lit.cli import main
from ssd_lit.data.blocks import StepBatchSampler, TokenBlocks, scoring_batches
from ssd_lit.data.index import VocabInfo, load_index
from ssd_lit.data.objectives import Batch, build_objective
from ssd_lit.models.family import family
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.statistics import mean_k
from ssd_lit.support.files import read_json
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training.checkpoint import final_model
from tests.checkpoint_folders import MODELS, save_model, untie
from tests.conftest import Bench

TRAINING = {"steps": 16, "batch_size": 4, "log_every": 1, "validate_every": 8, "validation_blocks": 6,
            "checkpoint_every": 8}  # fmt: skip
SWITCHING = {"switch_points": [4, 12]}
SHAPE = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32}
ARMS: dict[str, Any] = {
    "dense": {"method": "dense"},
    "ssd": {"method": "ssd"},
    "gate": {"method": "sparse", "moe": {"router": "gate"}},
    "norm_mlp": {"method": "posthoc", "parent_arm": "dense", "moe": {"posthoc_router": "norm_mlp", "router_steps": 3}},
    "up": {"method": "upcycle", "parent_arm": "dense", "moe": {"router": "random", "experts": 2, "top_k": 1}},
}


def trained(folder: Path, family: str, arms: dict[str, Any]) -> Bench:
    folder.mkdir(exist_ok=True)
    bench = Bench(folder, model={"family": family, **SHAPE}, training=TRAINING, switching=SWITCHING, arms=arms)
    for arm in arms:
        bench.phases(arm)
    return bench


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return trained(tmp_path_factory.mktemp("gpt2"), "gpt2", ARMS)


def final(bench: Bench, arm: str) -> LanguageModel:
    return final_model(bench.open(arm)).eval()


def some_batch(bench: Bench, model: LanguageModel) -> Batch:
    objective = build_objective(model.objective_name, VocabInfo.of(load_index(bench.data / "tokens")))
    return next(scoring_batches(bench.data / "tokens", "validation", range(4), objective, torch.device("cpu")))


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    extra = {}
    if model.config.is_encoder_decoder:
        extra["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["targets"])
    found: torch.Tensor = model(input_ids=batch["inputs"], **extra).logits
    return found


@torch.no_grad()
def check_export(bench: Bench, arm: str, folder: Path, auto: str) -> None:
    """The folder computes what the run's last checkpoint does, in every mode it has."""
    bench.stage("export", bench.dir(arm), "--out", folder)
    model = final(bench, arm)
    batch = some_batch(bench, model)
    plain = getattr(transformers, auto).from_pretrained(folder).eval()
    torch.testing.assert_close(logits(plain, batch), model(batch), rtol=1e-5, atol=1e-6)
    if arm == "dense":
        assert not (folder / "experts.json").exists()
        torch.testing.assert_close(
            logits(ssd_lit.load(folder, mode="dense"), batch), model(batch), rtol=1e-5, atol=1e-6
        )
        return
    ours = ssd_lit.load(folder)
    assert ours.config.use_cache
    torch.testing.assert_close(logits(ours, batch), model(batch), rtol=1e-5, atol=1e-6)
    for k in (1, 2, 4):
        ssd_lit.set_mode(ours, "sparse", top_k=k)
        model.set_mode("sparse", k)
        torch.testing.assert_close(logits(ours, batch), model(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", ["dense", "ssd", "gate", "norm_mlp"])
def test_an_exported_run_is_the_run_in_every_mode(gpt2: Bench, tmp_path: Path, arm: str) -> None:
    check_export(gpt2, arm, tmp_path / "out", "AutoModelForCausalLM")
    if arm != "dense":
        router = {"ssd": "center", "gate": "gate", "norm_mlp": "norm_mlp"}[arm]
        assert read_json(tmp_path / "out/experts.json")["router"] == router


@torch.no_grad()
def test_a_threshold_is_exported_where_the_router_allows_it(
    gpt2: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2.stage("export", gpt2.dir("norm_mlp"), "--out", tmp_path / "out", "--threshold", "0.6")
    ours, model = ssd_lit.load(tmp_path / "out", mode="sparse"), final(gpt2, "norm_mlp")
    model.set_mode("sparse", threshold=0.6)
    batch = some_batch(gpt2, model)
    torch.testing.assert_close(logits(ours, batch), model(batch), rtol=1e-5, atol=1e-6)
    assert ssd_lit.mean_k(ours) == mean_k(model.ffns)
    for arm, message in (("ssd", "can be negative"), ("dense", "has no experts among which threshold 0.6")):
        out = ["--out", str(tmp_path / arm), "--threshold", "0.6"]
        assert main(["export", str(gpt2.dir(arm)), *out]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / arm).exists()


def test_the_card_tells_data_settings_scores_and_limits(gpt2: Bench, tmp_path: Path) -> None:
    gpt2.stage("export", gpt2.dir("norm_mlp"), "--out", tmp_path / "early")
    assert "None were measured with these weights" in (tmp_path / "early/README.md").read_text()
    gpt2.stage("evaluate", gpt2.dir("ssd"))
    gpt2.stage("export", gpt2.dir("ssd"), "--out", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "text-generation"
    found = read_json(gpt2.dir("ssd") / "evaluation.json")
    assert f"| dense | {found['loss_dense']:.4f} |" in card
    assert all(f"| sparse, {p['top_k']} experts a token | {p['loss']:.4f} |" in card for p in found["curve"])
    assert "text.txt" in card.partition("## Data")[2].partition("## Settings")[0]
    settings = yaml.safe_load(card.partition("```yaml")[2].partition("```")[0])
    assert settings["training"]["steps"] == TRAINING["steps"]
    assert "blocks of 16 tokens" in card.partition("## Limits")[2]


@pytest.mark.parametrize(
    ("family", "auto", "tokenizer"),
    [("bert", "AutoModelForMaskedLM", {"vocab_size": 300, "mask_token": True}),
     ("t5", "AutoModelForSeq2SeqLM", {"vocab_size": 300, "sentinels": 4}),
     ("llama", "AutoModelForCausalLM", {"vocab_size": 300})],
)  # fmt: skip
def test_a_run_of_any_family_goes_out_and_comes_back(
    tmp_path: Path, family: str, auto: str, tokenizer: dict[str, Any]
) -> None:
    """The model as trained, its tokenizer as trained; the next run begins at the loss where the first one ended."""
    data = {"name": "grammar", "sources": [{"kind": "files", "paths": [str(tmp_path / "text.txt")]}],
            "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": tokenizer,
            "sequence_length": 16}  # fmt: skip
    model = {"family": family, **SHAPE}
    arms = {"ssd": {"method": "ssd"}}
    bench = Bench(tmp_path, model=model, training=TRAINING, switching=SWITCHING, arms=arms, data=data)
    bench.phases("ssd")
    folder = tmp_path / "out"
    check_export(bench, "ssd", folder, auto)
    bench.stage("evaluate", bench.dir("ssd"))

    (tmp_path / "again").mkdir()
    data = {**data, "tokenizer": {"folder": str(folder)}, "name": "same"}
    data["sources"] = [{"kind": "files", "paths": [str(tmp_path / "again/text.txt")]}]
    arms = {"posthoc": {"method": "posthoc"}}
    again = Bench(tmp_path / "again", model={"pretrained": str(folder)}, training=TRAINING, arms=arms, data=data)
    again.phases("posthoc")
    again.stage("evaluate", again.dir("posthoc"))
    losses = [read_json(b.dir(arm) / "evaluation.json") for b, arm in ((bench, "ssd"), (again, "posthoc"))]
    assert load_index(again.data / "tokens")["digest"] == load_index(bench.data / "tokens")["digest"]
    assert losses[1]["loss_dense"] == pytest.approx(losses[0]["loss_dense"], rel=1e-6)


def test_training_goes_on_from_an_exported_folder_by_every_method(gpt2: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    gpt2.stage("export", gpt2.dir("ssd"), "--out", folder)
    data = {"name": "grammar", "sources": [{"kind": "files", "paths": [str(tmp_path / "text.txt")]}],
            "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"folder": str(folder)},
            "sequence_length": 16}  # fmt: skip
    arms: dict[str, Any] = {
        "dense": {"method": "dense"},
        "ssd": {"method": "ssd"},
        "posthoc": {"method": "posthoc"},
        "up": {"method": "upcycle", "moe": {"router": "random", "experts": 2, "top_k": 1}},
    }
    bench = Bench(
        tmp_path, data=data, model={"pretrained": str(folder)}, training=TRAINING, switching=SWITCHING, arms=arms
    )
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    blocks = TokenBlocks(bench.data / "tokens", "train")
    first = [blocks[i] for i in StepBatchSampler(len(blocks), 4, seed=0).batch(0)]
    inputs, targets = (torch.stack([block[key] for block in first]) for key in ("inputs", "targets"))
    with torch.no_grad():
        expected = cross_entropy(exported(inputs).logits.flatten(0, 1), targets.flatten()).item()
    for arm in arms:
        assert bench.phases(arm)[-1].next is None
        bench.stage("evaluate", bench.dir(arm))
        if arm != "posthoc":
            step, loss = read_metrics(bench.dir(arm) / "metrics.jsonl")["train/loss"][0]
            # One of two copies of the whole FFN is that FFN, whichever it is.
            assert (step, loss) == (1, pytest.approx(expected, rel=1e-5))
    found = {arm: read_json(bench.dir(arm) / "evaluation.json") for arm in arms}
    gpt2.stage("evaluate", gpt2.dir("ssd"))
    assert found["posthoc"]["loss_dense"] == pytest.approx(
        read_json(gpt2.dir("ssd") / "evaluation.json")["loss_dense"], rel=1e-6
    )
    assert found["up"]["loss_dense"] is None
    assert found["posthoc"]["loss_sparse"] is not None
    # And out again, with the folder's own shape and new experts.
    bench.stage("export", bench.dir("posthoc"), "--out", tmp_path / "again")
    check = ssd_lit.load(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(check(inputs).logits, exported(inputs).logits, rtol=1e-5, atol=1e-6)


CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "AutoModelForCausalLM", {}, {}),
    "gpt2 untied": ("GPT2LMHeadModel", "AutoModelForCausalLM", {}, {}),
    "bert": ("BertForMaskedLM", "AutoModelForMaskedLM", {}, {"mask_token": True}),
    "t5": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", {}, {"sentinels": 4}),
    "t5 untied": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM",
                  {"feed_forward_proj": "gated-gelu"}, {"sentinels": 4}),
    "llama": ("LlamaForCausalLM", "AutoModelForCausalLM", {}, {}),
}  # fmt: skip
"""Class, Auto class, settings beside the usual ones, and the special tokens that training needs."""


def data_of(folder: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {"name": "grammar", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
            "validation_fraction": 0.03, "test_fraction": 0.1, "tokenizer": tokenizer,
            "sequence_length": 16}  # fmt: skip


def whole_loss(model: Any, bench: Bench, kind: str) -> float:
    """The mean over every target of the validation split."""
    tokens = bench.data / "tokens"
    objective = build_objective(family(kind).objective, VocabInfo.of(load_index(tokens)))
    blocks = range(len(TokenBlocks(tokens, "validation")))
    losses = [
        cross_entropy(logits(model, batch).flatten(0, 1), batch["targets"].flatten(), reduction="none")
        for batch in scoring_batches(tokens, "validation", blocks, objective, torch.device("cpu"))
    ]
    # Those of ignored targets are zero.
    return torch.cat(losses)[torch.cat(losses) > 0].mean().item()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_and_evaluation_and_the_exported_folder_have_one_loss(tmp_path: Path, name: str) -> None:
    """Whether its head has weights of its own or those of the embeddings."""
    class_name, auto, changes, vocab = CHECKPOINTS[name]
    (tmp_path / "words").mkdir()
    words = Bench(tmp_path / "words", data=data_of(tmp_path / "words", {"vocab_size": 300, **vocab}))
    kind = name.split()[0]
    config = type(MODELS[kind][1])(**{**MODELS[kind][1].to_dict(), "vocab_size": 300, **changes})
    torch.manual_seed(0)
    getattr(transformers, class_name)(config).save_pretrained(tmp_path / "checkpoint")
    if "untied" in name:
        untie(tmp_path / "checkpoint", kind)

    data = data_of(tmp_path, {"folder": str(words.data / "tokenizer")})
    whole = {"blocks": 10_000, "top_k_curve": [2]}
    training = {**TRAINING, "validation_blocks": whole["blocks"]}
    model = {"pretrained": str(tmp_path / "checkpoint"), "dropout": 0.0}
    arms = {"ssd": {"method": "ssd"}}
    bench = Bench(tmp_path, model=model, data=data, training=training, switching=SWITCHING, evaluation=whole, arms=arms)
    bench.phases("ssd", "moefy")
    bench.phases("ssd")
    bench.stage("evaluate", bench.dir("ssd"))
    bench.stage("export", bench.dir("ssd"), "--out", tmp_path / "out")
    exported = getattr(transformers, auto).from_pretrained(tmp_path / "out").eval()
    losses = [
        read_metrics(bench.dir("ssd") / "metrics.jsonl")["validation/loss"][-1][1],
        read_json(bench.dir("ssd") / "evaluation.json")["loss_dense"],
    ]
    losses += [whole_loss(opened, bench, kind) for opened in (exported, ssd_lit.load(tmp_path / "out"))]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_a_folder_that_moefy_writes_is_opened_and_trained_from(gpt2: Bench, tmp_path: Path) -> None:
    gpt2.stage("export", gpt2.dir("dense"), "--out", tmp_path / "dense")
    text = gpt2.results.parent / "text.txt"
    gpt2.stage(
        "moefy", "--model", tmp_path / "dense", "--experts", 8, "--top-k", 3, "--out", tmp_path / "experts",
        "--construction", "kmeans_activations", "--router", "norm_mlp", "--text", text, "--calibration-tokens", 300,
        "--seed", 5,
    )  # fmt: skip
    told = read_json(tmp_path / "experts/experts.json")
    assert (told["experts"], told["top_k"], told["construction"], told["router"]) == (
        8,
        3,
        "kmeans_activations",
        "norm_mlp",
    )
    model = final(gpt2, "dense")
    batch = some_batch(gpt2, model)
    with torch.no_grad():
        expected = model(batch)
    for how in ({}, {"mode": "sparse", "top_k": 8}):
        torch.testing.assert_close(
            logits(ssd_lit.load(tmp_path / "experts", **how), batch), expected, rtol=1e-5, atol=1e-6
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "experts")
    assert tokenizer.decode(tokenizer("the river moves")["input_ids"]) == "the river moves"


def test_mistakes_are_answered_in_a_line(gpt2: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    save_model(dense, "gpt2")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((dense / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text('{"model_type": "mamba"}')
    (empty := tmp_path / "empty").mkdir()
    run = gpt2.dir("ssd")

    def told(*arguments: object) -> str:
        capsys.readouterr()
        assert main([*map(str, arguments), "--threads", "1"]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
        assert len(lines) == 1
        assert not out.exists()
        return lines[0].partition("failed: ")[2]

    def called_wrongly(*arguments: object) -> str:
        capsys.readouterr()
        assert main([*map(str, arguments), "--threads", "1"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
        assert len(lines) == 1
        assert not out.exists()
        return lines[0].partition("Error: ")[2]

    def refused(model: Path, *more: object, experts: int = 8, top_k: int = 2) -> str:
        return told("moefy", "--model", model, "--experts", experts, "--top-k", top_k, "--out", out, *more)

    assert refused(tmp_path / "gone") == f"no config.json in folder {str(tmp_path / 'gone')!r}: no such folder"
    assert refused(empty) == f"no config.json in folder {str(empty)!r}"
    assert "model_type 'mamba'; allowed: gpt2, bert, t5, llama" in refused(other)
    assert "pickled weights (pytorch_model.bin) are not read" in refused(pickled)
    assert "experts 5: does not divide the 32 neurons" in refused(dense, experts=5)
    assert refused(dense, top_k=9) == "--top-k 9 is more than --experts 8; allowed: 1 to 8"
    assert "--text" in refused(dense, "--construction", "coactivation")
    assert "--text" in refused(dense, "--router", "mass_mlp")
    text = gpt2.results.parent / "text.txt"
    assert "no tokenizer.json in folder" in refused(dense, "--text", text)
    assert called_wrongly("moefy") == "Missing option '--model'."
    assert called_wrongly("moefy", "--model", dense, "--experts", 8) == "Missing option '--top-k'."
    # A run is MoEfied by its training.
    whole = ("--model", dense, "--experts", 8, "--top-k", 2, "--out", out)
    assert called_wrongly("moefy", run, *whole) == f"Got unexpected extra argument(s) ({run})"
    assert "copies of whole FFNs" in told("export", gpt2.dir("up"), "--out", out)
    assert "no such file" in told("export", tmp_path, "--out", out)
    (full := tmp_path / "full").mkdir()
    (full / "mine.txt").write_text("mine")
    assert "exists already" in told("export", run, "--out", full)
    assert "exists already" in told("moefy", "--model", dense, "--experts", 8, "--top-k", 2, "--out", full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_run_that_is_not_done_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path, training=TRAINING, switching=SWITCHING, arms={"ssd": {"method": "ssd"}})
    bench.phases("ssd", until="moefy")
    assert main(["export", str(bench.dir("ssd")), "--out", str(tmp_path / "out")]) == 1
    run_dir = bench.dir("ssd")
    told = f"stages/sparse_phases.json: not found; `ssd-lit train {run_dir} --until sparse_phases` makes it"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
