"""Checkpoint folders get experts: what is made from text is made from what the model does on that text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import ssd_lit
from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.moefy import moefy_folder, text_inputs
from ssd_lit.moe.construction import construct
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.training.routers import contributions, router_loss
from tests.checkpoint_folders import VOCABULARY, F, save_model

E = 4
FFN_MODULE = {"gpt2": "mlp", "bert base": "intermediate", "t5": "DenseReluDense", "llama": "mlp"}


def add_tokenizer(folder: Path, words: int = VOCABULARY) -> None:
    """Words w0, w1, ...: their numbers are their ids; w1 begins and w2 ends every sequence."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_text(path: Path, lengths: list[int]) -> list[list[int]]:
    """Documents of so many words, and their ids."""
    numbers = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, VOCABULARY, (n,), generator=numbers).tolist() for n in lengths]
    path.write_text("\n\n".join(" ".join(f"w{i}" for i in document) for document in ids))
    return ids


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path / "text.txt", [25] * 40)
    return tmp_path / "text.txt"


def experts_of(model: Any) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


@pytest.mark.parametrize("name", FFN_MODULE)
def test_activations_are_those_of_whole_documents_in_pieces_that_the_model_takes(tmp_path: Path, name: str) -> None:
    original = save_model(tmp_path / "dense", name)
    add_tokenizer(tmp_path / "dense")
    ids = write_text(tmp_path / "text.txt", [5, 70, 9, 30])
    # GPT-2, BERT and LLaMA take 32 tokens here, two of them special; T5 takes any number, of which 512 are read.
    room = 70 if name == "t5" else 30
    pieces = [
        [1, *document[at : at + room], 2] for document in ids[:3] for at in range(0, len(document), room)
    ]  # fmt: skip
    moefy_folder(tmp_path / "dense", tmp_path / "experts", MoEConfig(experts=E, top_k=1, construction="contiguous"))
    model = ssd_lit.load(tmp_path / "experts")
    wanted = sum(map(len, pieces)) - 3
    found = text_inputs(model, experts_of(model), tmp_path / "experts", tmp_path / "text.txt", wanted)

    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in original.named_modules():
        if path.rpartition(".")[2] == FFN_MODULE[name]:
            rows = seen.setdefault(path, [])
            module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0][0]))
    for piece in pieces:
        decoder = {"decoder_input_ids": torch.tensor([[0, *piece[:-1]]])} if name == "t5" else {}
        with torch.no_grad():
            original(input_ids=torch.tensor([piece]), **decoder)
    assert len(found) == len(seen) == (4 if name == "t5" else 2)
    for mine, expected in zip(found, seen.values(), strict=True):
        torch.testing.assert_close(mine, torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("construction", ["kmeans", "kmeans_activations", "coactivation", "random", "contiguous"])
def test_experts_are_those_of_the_construction(tmp_path: Path, text: Path, construction: str) -> None:
    original = save_model(tmp_path / "dense", "gpt2")
    add_tokenizer(tmp_path / "dense")
    moe = MoEConfig(experts=E, top_k=1, construction=construction)
    moefy_folder(tmp_path / "dense", tmp_path / "experts", moe, seed=7, text=text, calibration_tokens=500)
    neurons = load_file(tmp_path / "experts/experts.safetensors")
    model = ssd_lit.load(tmp_path / "experts")
    seen = text_inputs(model, experts_of(model), tmp_path / "dense", text, 500)
    for layer, (block, x) in enumerate(zip(original.transformer.h, seen, strict=True)):
        rows = block.mlp.c_fc.weight.T.detach()
        h = torch.nn.functional.gelu(x @ rows.T + block.mlp.c_fc.bias, approximate="tanh").detach()
        labels = construct(construction, rows, E, seed=7000 + layer, activations=h)
        ids = neurons[f"{layer}.neuron_ids"]
        assert sorted(ids.tolist()) == list(range(F))
        assert labels[ids].tolist() == [expert for expert in range(E) for _ in range(F // E)]


@pytest.mark.parametrize("router", ["mass_mlp", "norm_mlp"])
def test_a_trained_router_learns_what_its_experts_contribute(tmp_path: Path, text: Path, router: Any) -> None:
    save_model(tmp_path / "dense", "llama", dtype=torch.float32)
    add_tokenizer(tmp_path / "dense")
    unseen = tmp_path / "unseen.txt"
    unseen.write_text(text.read_text().replace("w4 ", "w5 "))
    losses = []
    for steps in (1, 60):
        moe = MoEConfig(experts=E, top_k=1, posthoc_router=router, router_steps=steps, router_lr=2e-2)
        target = tmp_path / str(steps)
        moefy_folder(tmp_path / "dense", target, moe, text=text, calibration_tokens=500)
        model = ssd_lit.load(target)
        xs = text_inputs(model, experts_of(model), tmp_path / "dense", unseen, 500)
        with torch.no_grad():
            losses.append(
                sum(
                    router_loss(ffn.router(x), contributions(ffn, x, router), router)
                    for ffn, x in zip(experts_of(model), xs, strict=True)
                )
            )
    least = sum(entropy_of_shares(ffn, x) for ffn, x in zip(experts_of(model), xs, strict=True)) * (
        router == "mass_mlp"
    )
    assert losses[1] - least < 0.3 * (losses[0] - least)


def entropy_of_shares(ffn: ExpertFFN, x: torch.Tensor) -> torch.Tensor:
    """What is left of a cross-entropy when every share is predicted exactly."""
    mass = ffn.activation_mass(x)
    return torch.distributions.Categorical(mass / mass.sum(-1, keepdim=True)).entropy().mean()


def test_the_same_seed_gives_the_same_files(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "dense", "gpt2")
    add_tokenizer(tmp_path / "dense")
    for construction, router in (
        ("random", {"router": "random"}),
        ("kmeans_activations", {"posthoc_router": "norm_mlp"}),
    ):
        files = []
        for seed in (1, 1, 2):
            target = tmp_path / f"{construction}{len(files)}"
            moe = MoEConfig(experts=E, top_k=1, construction=construction, router_steps=5, **router)
            moefy_folder(tmp_path / "dense", target, moe, seed=seed, text=text, calibration_tokens=300)
            files.append((target / "experts.safetensors").read_bytes())
        assert files[0] == files[1] != files[2]


def test_what_cannot_be_done_is_said_before_the_weights_are_read(tmp_path: Path, text: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    save_model(dense, "gpt2")
    (dense / "model.safetensors").write_bytes(b"")

    def refused(message: str, text: Path | None = None, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            moefy_folder(dense, out, MoEConfig(**{"experts": E, "top_k": 1, **settings}), text=text)
        assert not out.exists()

    refused("experts 5: does not divide the 32 neurons of an FFN of .*; allowed: 1, 2, 4, 8, 16, 32", experts=5)
    refused("coactivation needs text .* --text", construction="coactivation")
    refused("norm_mlp needs text .* --text", posthoc_router="norm_mlp")
    refused("no tokenizer.json in folder", text=text)
    add_tokenizer(dense)
    refused("gone.txt: no such file", text=tmp_path / "gone.txt")
    refused("unknown kind of file", text=tmp_path / "text.pdf")


def test_a_text_without_words_and_a_foreign_tokenizer_are_refused(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "dense", "gpt2")
    add_tokenizer(tmp_path / "dense", words=VOCABULARY + 5)
    moe = MoEConfig(experts=E, top_k=1, posthoc_router="norm_mlp")
    text.write_text("w4 w52")
    with pytest.raises(ValueError, match="the tokenizer has token 52, the model only 50"):
        moefy_folder(tmp_path / "dense", tmp_path / "out", moe, text=text)
    text.write_text("\n \n")
    with pytest.raises(ValueError, match="no text in it"):
        moefy_folder(tmp_path / "dense", tmp_path / "out", moe, text=text)
    assert not (tmp_path / "out").exists()
