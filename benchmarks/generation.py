"""Greedy generation, sparse against dense mode of the same weights, both as fast as we can make them.

    python benchmarks/generation.py --device cuda --shape 1.3b [--rounds 5]
    python benchmarks/generation.py --device cuda --shape 6.7b --batches 1 --settings kernels
    python benchmarks/generation.py --device cpu --shape medium [--rounds 3]
    python benchmarks/generation.py --model FOLDER --name ssd30m

A GPT-2 with ReLU and random weights, 32 experts of which the centre router chooses 6, or a trained model as `ssd-lit
export` writes it; bfloat16 on a GPU, float32 on a CPU. Tokens per second: 128 new tokens after prompts of 128,
batches of 1 and 8, prompts not counted. Prefill: prompts of 1024 tokens (fewer, where the model reads fewer), to the
first new one. Each mode runs in every setting (on a GPU: the step as a graph, of our kernels where there is one text,
or of Transformers with torch.compile; on a CPU: matrix-vector products as torch does them, and in blocks on all
cores), all in turns; the ratio compares the best setting of each mode. Beside it stand the bytes that a token must
read and the share of the measured reading speed that this makes. Exits with 1 if sparse is below what is wanted of
dense at batch 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import RESULTS, machine, medians, seconds_in_turns
from transformers import GPT2Config, GPT2LMHeadModel

from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.folder import open_folder, set_mode
from ssd_lit.models import generation
from ssd_lit.models.family import family, swap_ffns
from ssd_lit.models.generation import Generator
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support.files import write_json

E, K = 32, 6
WANTED = {"6.7b": 1.8, "1.3b": 1.6, "medium": 1.72}
PROMPT, NEW, PREFILL = 128, 128, 1024
SHAPES = {  # width, layers, heads, vocabulary
    "6.7b": (4096, 32, 32, 50304),
    "1.3b": (2048, 24, 16, 50304),
    "medium": (1024, 24, 16, 50304),
    "tiny": (64, 2, 2, 512),
}
MODES = ("dense", "sparse")
SETTINGS = {"cuda": ("kernels", "compiled graph"), "cpu": ("one product", "blocks")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--model", type=Path, help="the folder of an exported model, instead of a shape")
    parser.add_argument("--name", help="what the file with the results calls that model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=NEW, help="new tokens a round")
    parser.add_argument("--decode", default="auto", help="backend of the one-token step in sparse mode")
    parser.add_argument("--prefill", default="auto", help="backend that reads prompts of 1024 tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--settings", nargs="+", choices=[name for names in SETTINGS.values() for name in names])
    arguments = parser.parse_args()
    settings = arguments.settings or SETTINGS[arguments.device]
    name = arguments.name or arguments.shape
    if arguments.model is None:
        model = build(arguments.shape, arguments.device)
    else:
        model = open_folder(arguments.model).to(arguments.device, dtype_on(arguments.device)).requires_grad_(False)
    bandwidth = reading_speed(arguments.device)
    choose_backend(model, arguments.decode)
    decoded = [
        decoding(model, batch, arguments.new, arguments.rounds, settings, bandwidth) for batch in arguments.batches
    ]
    choose_backend(model, arguments.prefill)
    prefilled = [prefill(model, batch, arguments.rounds) for batch in arguments.batches]
    write_json(
        RESULTS / f"generation-{arguments.device}-{name}.json",
        {
            "machine": machine("transformers"),
            "shape": name,
            "dtype": str(model.dtype),
            "experts": ffns_of(model)[0].experts,
            "top_k": ffns_of(model)[0].top_k,
            "prompt": PROMPT,
            "new": arguments.new,
            "read_gigabytes_per_second": bandwidth / 1e9,
            "decoding": decoded,
            "prefill": prefilled,
        },
    )
    show(decoded, prefilled, bandwidth)
    return 0 if decoded[0]["ratio"] >= WANTED.get(name, 0) else 1


def build(shape: str, device: str) -> Any:
    width, layers, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=PREFILL + NEW, n_embd=width, n_layer=layers, n_head=heads, n_inner=4 * width,
        activation_function="relu", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        model: Any = GPT2LMHeadModel(config)
        model.to(dtype_on(device)).eval()
        for ffn in swap_ffns(model, family("gpt2"), MoEConfig(experts=E, top_k=K), router="center"):
            ffn.router.on_permuted(ffn.gating_weight)
    return model.requires_grad_(False)


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def choose_backend(model: Any, name: str) -> None:
    for ffn in ffns_of(model):
        ffn.backend = name


def ffns_of(model: Any) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


def decoding(
    model: Any, batch: int, new: int, rounds: int, settings: Sequence[str], bandwidth: float
) -> dict[str, Any]:
    """Tokens per second of both modes in every setting."""
    prompt = torch.randint(model.config.vocab_size, (batch, PROMPT), device=model.device)
    ways = {f"{mode}, {setting}": decoder(model, mode, setting, prompt, new) for mode in MODES for setting in settings}
    seconds = medians(seconds_in_turns(ways, rounds))
    speed = {name: batch * new / value for name, value in seconds.items()}
    best = {mode: max(speed[f"{mode}, {setting}"] for setting in settings) for mode in MODES}
    read = {mode: bytes_of_a_step(model, mode, batch, PROMPT + new / 2) for mode in MODES}
    return {
        "batch": batch,
        "tokens_per_second": speed,
        "best": best,
        "ratio": best["sparse"] / best["dense"],
        "bytes_per_step": read,
        "limit_of_ratio": read["dense"] / read["sparse"],
        "share_of_reading_speed": {mode: best[mode] / batch * read[mode] / bandwidth for mode in MODES},
    }


def decoder(model: Any, mode: Any, setting: str, prompt: torch.Tensor, new: int) -> Callable[[], None]:
    """Decodes `new` tokens; the prompt has been read before."""
    generator = Generator(model, compiled=setting == "compiled graph")
    set_mode(model, mode)
    with transformers_step() if setting == "compiled graph" else nullcontext():
        generator.start(prompt, new)

    def run() -> None:
        set_mode(model, mode)
        with nullcontext() if setting == "blocks" else patch.object(generation, "row_products", nullcontext):
            generator.rewind(PROMPT)
            generator.advance(new - 1)

    return run


def transformers_step() -> AbstractContextManager[Any]:
    """In this context generators take the step of Transformers instead of our kernels."""
    from ssd_lit.models.decoding import gpt2

    return patch.object(gpt2, "can_step", return_value=False)


def bytes_of_a_step(model: Any, mode: str, batch: int, context: float) -> float:
    """What one step must read: weights, the router, and the keys and values of `context` tokens."""
    config, size = model.config, model.dtype.itemsize
    embeddings = sum(table.weight.numel() for table in (model.transformer.wte, model.transformer.wpe))
    weights = sum(p.numel() for p in model.parameters()) - embeddings + model.lm_head.weight.numel()
    total = size * (weights + 2.0 * batch * context * config.n_embd * config.n_layer)
    if mode == "sparse":
        for ffn in ffns_of(model):
            # Texts that choose independently leave this share of the experts unread.
            unread = (1 - ffn.top_k / ffn.experts) ** batch
            total -= unread * size * sum(p.numel() for p in ffn.neuron_parameters())
            total += sum(buffer.nbytes for buffer in ffn.router.buffers())
    return float(total)


def reading_speed(device: str) -> float:
    """Bytes per second at which the device sums a large tensor, the best of several."""
    x = torch.ones((2**31 if device == "cuda" else 2**28) // 4, device=device)
    found = seconds_in_turns({"sum": x.sum}, rounds=10)
    return x.nbytes / min(found["sum"])


def prefill(model: Any, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to read prompts of 1024 tokens, or of as many as leave the model room for new ones."""
    length = min(PREFILL, model.config.n_positions - NEW)
    prompt = torch.randint(model.config.vocab_size, (batch, length), device=model.device)

    def way(mode: Any) -> Callable[[], None]:
        generator = Generator(model)

        def run() -> None:
            set_mode(model, mode)
            generator.start(prompt, 1)

        return run

    seconds = medians(seconds_in_turns({mode: way(mode) for mode in MODES}, rounds))
    milliseconds = {mode: 1e3 * value for mode, value in seconds.items()}
    return {
        "batch": batch,
        "tokens": length,
        "milliseconds": milliseconds,
        "ratio": seconds["dense"] / seconds["sparse"],
    }


def show(decoded: list[dict[str, Any]], prefilled: list[dict[str, Any]], bandwidth: float) -> None:
    for result in decoded:
        print(f"batch {result['batch']}, tokens per second")
        for name, value in result["tokens_per_second"].items():
            print(f"  {name:<24} {value:10.1f}")
        for mode in MODES:
            read, share = result["bytes_per_step"][mode] / 1e6, result["share_of_reading_speed"][mode]
            print(f"  {mode}: {read:.0f} MB a step, {share:.2f} of the reading speed of {bandwidth / 1e9:.0f} GB/s")
        print(f"  sparse / dense: {result['ratio']:.2f}, limit from bytes {result['limit_of_ratio']:.2f}")
    for result in prefilled:
        times = ", ".join(f"{mode} {value:.1f} ms" for mode, value in result["milliseconds"].items())
        ratio = f"sparse / dense speed {result['ratio']:.2f}"
        print(f"prefill of {result['tokens']}, batch {result['batch']}: {times}; {ratio}")


if __name__ == "__main__":
    sys.exit(main())
