"""Text in and out of generation, and how tokens are drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ssd_lit
from ssd_lit.cli import main
from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.moefy import moefy_folder
from ssd_lit.models.generation import Generator
from ssd_lit.models.sampling import Sampling
from tests.checkpoint_folders import MODELS, VOCABULARY, save_model
from tests.models.test_generation import sparse_model


def byte_tokenizer() -> Tokenizer:
    """One token for each of 49 letters, after end-of-text; the letter é is two tokens."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz,.!?ABCDEFGHIJKL", "Ġ", "Ã", "©"})
    words = {"<|endoftext|>": 0, **{letter: number for number, letter in enumerate(letters, start=1)}}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_text_is_what_transformers_generates(mode: Any) -> None:
    model, tokenizer = sparse_model("gpt2"), byte_tokenizer()
    ssd_lit.set_mode(model, mode)
    model.config.eos_token_id = None
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    ids = wrapped("the café", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = tokenizer.decode(expected.tolist())
    for each in (tokenizer, wrapped):
        generator = Generator(model, each)
        found = generator("the café", 12)
        assert found.startswith("the café")
        # Of a letter whose last token is not there yet, nothing is given.
        assert found.removeprefix("the café").rstrip("\ufffd") == text.rstrip("\ufffd")
        assert "".join(generator.stream("the café", 12)) == found.removeprefix("the café")


def test_text_ends_at_end_of_text_and_may_begin_there() -> None:
    model, tokenizer = sparse_model("gpt2"), byte_tokenizer()
    generator = Generator(model, tokenizer)
    whole = generator("abc", 12)
    third = int(generator.tokens[0, 5])
    model.generation_config.eos_token_id = [third]
    assert len(generator("abc", 12)) < len(whole)
    assert whole.startswith(generator("abc", 12))
    model.generation_config.eos_token_id = 0
    assert list(generator.stream("", 3)) is not None
    assert int(generator.tokens[0, 0]) == 0
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="names no end-of-text token"):
        generator("", 3)
    with pytest.raises(ValueError, match="without a tokenizer"):
        Generator(model)("abc", 3)


def test_models_that_do_not_continue_text_are_refused() -> None:
    for name in ("bert", "t5"):
        class_name, config, _ = MODELS[name]
        model = getattr(transformers, class_name)(config)
        with pytest.raises(ValueError, match="does not continue text"):
            Generator(model, byte_tokenizer())("abc", 3)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    torch.manual_seed(0)
    many = logits.expand(20_000, -1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.0, 0.4), (2.0, 0.9)):
        p = (logits / temperature).softmax(-1)
        kept = p * (p.cumsum(0) - p < top_p)
        found = Sampling(temperature, top_p)(many).bincount(minlength=4) / len(many)
        torch.testing.assert_close(found, kept / kept.sum(), rtol=0, atol=0.015)
    assert Sampling()(many).unique().tolist() == [0]
    with pytest.raises(ValueError, match="temperature -1"):
        Sampling(-1.0)
    with pytest.raises(ValueError, match=r"top_p 0\.0"):
        Sampling(1.0, 0.0)


def test_a_seed_repeats_a_drawn_text() -> None:
    generator = Generator(sparse_model("llama"), byte_tokenizer(), sampling=Sampling(1.5))
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generator("abc", 12))
    assert texts[0] == texts[1] != texts[2]


def test_the_command_reports_the_mean_k_of_dynamic_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "dense", "gpt2", dtype=torch.float32)
    byte_tokenizer().save(str(tmp_path / "dense/tokenizer.json"))
    (tmp_path / "text.txt").write_text("abc, the cafe. " * 20)
    folder = tmp_path / "experts"
    made = ["moefy", "--model", str(tmp_path / "dense"), "--experts", "8", "--top-k", "3", "--router", "centers"]
    assert main([*made, "--text", str(tmp_path / "text.txt"), "--threshold", "0.9", "--out", str(folder)]) == 0
    given = ["generate", "--model", str(folder), "--prompt", "abc", "--new-tokens", "12", "--threads", "1"]
    for more, threshold in (([], 0.9), (["--threshold", "0.5"], 0.5)):
        capsys.readouterr()
        assert main([*given, "--mode", "sparse", *more]) == 0
        told = capsys.readouterr()
        generator = Generator(ssd_lit.load(folder, mode="sparse", threshold=threshold), byte_tokenizer())
        assert told.out.removesuffix("\n") == generator("abc", 12)
        assert f"in sparse mode, on average {generator.mean_k:.2f} experts a token" in told.err
    assert main([*given, "--mode", "sparse", "--top-k", "3"]) == 0
    assert "on average" not in capsys.readouterr().err
    assert main([*given, "--mode", "sparse", "--top-k", "3", "--threshold", "0.5"]) == 1
    assert "top_k 3 and threshold 0.5: give one of them" in capsys.readouterr().err


def test_the_command_prints_a_text_in_either_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "dense", "gpt2", dtype=torch.float32)
    byte_tokenizer().save(str(tmp_path / "dense/tokenizer.json"))
    assert byte_tokenizer().get_vocab_size() <= VOCABULARY
    folder = tmp_path / "experts"
    moefy_folder(tmp_path / "dense", folder, MoEConfig(experts=8, top_k=3))
    given = ["generate", "--model", str(folder), "--prompt", "abc", "--new-tokens", "12", "--threads", "1"]
    found = {}
    for mode in ("dense", "sparse"):
        capsys.readouterr()
        assert main([*given, "--mode", mode]) == 0
        told = capsys.readouterr()
        found[mode] = told.out.removesuffix("\n")
        assert found[mode] == Generator(ssd_lit.load(folder, mode=mode), byte_tokenizer())("abc", 12)  # type: ignore[arg-type]
        assert f"in {mode} mode" in told.err
    assert found["dense"] != found["sparse"]
    assert main([*given, "--mode", "sparse", "--top-k", "9"]) == 1
    assert "top_k 9: allowed are 1 to 8" in capsys.readouterr().err
    assert main([*given, "--top-p", "2"]) == 1
    assert "top_p 2.0: must be above 0 and at most 1" in capsys.readouterr().err


def test_a_text_is_read_whole_whatever_lengths_a_tokenizer_was_last_used_with() -> None:
    model = sparse_model("gpt2")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), pad_token="<|endoftext|>")
    generator = Generator(model, wrapped)
    expected, tokens = generator("the quick", 6), generator.tokens
    for how in ({"truncation": True, "max_length": 3, "padding": "max_length"}, {"padding": "max_length"}):
        wrapped(["a text", "another"], **{"max_length": 20, **how})  # type: ignore[arg-type]
        left = wrapped.backend_tokenizer.truncation, wrapped.backend_tokenizer.padding
        assert generator("the quick", 6) == expected
        assert torch.equal(generator.tokens, tokens)
        assert (wrapped.backend_tokenizer.truncation, wrapped.backend_tokenizer.padding) == left
        assert left[1] is not None


def test_a_text_that_another_one_interrupts_says_so() -> None:
    model = sparse_model("gpt2")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    generator = Generator(model, byte_tokenizer())
    one, other = generator.stream("abc", 8), generator.stream("def", 8)
    next(one)
    next(other)
    with pytest.raises(RuntimeError, match="begun another text"):
        list(one)
    assert "".join(generator.stream("abc", 8)) == generator("abc", 8).removeprefix("abc")


def test_a_temperature_near_zero_draws_the_likeliest() -> None:
    logits = 30 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-3, 1e-38, 1e-300):
        for top_p in (1.0, 0.5):
            assert torch.equal(Sampling(temperature, top_p)(logits), logits.argmax(dim=-1))
