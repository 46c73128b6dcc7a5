"""Dynamic k against fixed k: perplexity on a text and tokens per second, of the same exported model.

    ssd-lit export RUN --out FOLDER        # of a run with moe.posthoc_router: centers
    python benchmarks/dynamic_k.py --model FOLDER --name NAME --text results/data/NAME/documents/validation.parquet

bfloat16 on a GPU, float32 on a CPU. Perplexity: the first 32,768 tokens of the text, in blocks of the model's context.
Speed: new tokens drawn at temperature 1 after a prompt from that text, prompt not counted, all ways in turns, medians;
on a GPU the step is a CUDA graph (with --compiled, of compiled code). Beside the speed of each threshold stands what
fixed k has at the same perplexity, by a line between its two nearest points. Exits with 1 if generation with dynamic k
gives other tokens or another mean k than whole forward passes do.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import RESULTS, machine, medians, seconds_in_turns
from torch import Tensor

import ssd_lit
from ssd_lit.data.readers import read_documents
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.models.generation import Generator
from ssd_lit.models.sampling import Sampling
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support.files import write_json

TOKENS, TOKENS_AT_ONCE = 32_768, 4096
CHECKED = 24
"""Tokens whose generation is checked."""


@dataclass(frozen=True)
class Choice:
    """A way to choose experts; neither runs densely."""

    top_k: int | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        if self.threshold is not None:
            return f"threshold {self.threshold:g}"
        return "dense" if self.top_k is None else f"k {self.top_k}"

    def set(self, model: Any) -> None:
        ssd_lit.set_mode(model, "dense" if self == Choice() else "sparse", self.top_k, self.threshold)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of an exported model")
    parser.add_argument("--name", required=True, help="what the file with the results calls it")
    parser.add_argument(
        "--text", type=Path, required=True, help="text, JSON lines or Parquet that it was not trained on"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 3, 4, 6, 8, 10, 12, 16])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="compile the step")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one graph for every choice
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = ssd_lit.load(arguments.model).to(arguments.device, dtype).requires_grad_(False)
    experts = ffns_of(model)[0].experts
    blocks = read_blocks(arguments.model, arguments.text, model)
    choices = [
        Choice(),
        *(Choice(top_k=k) for k in arguments.top_k if k <= experts),
        *(Choice(threshold=threshold) for threshold in arguments.thresholds),
    ]
    agrees = [check(model, choice, blocks[:, : arguments.prompt]) for choice in choices if choice.threshold is not None]
    scored = {choice: score(model, choice, blocks) for choice in choices}
    timed = {
        batch: speeds(model, choices, blocks[:batch, : arguments.prompt], arguments) for batch in arguments.batches
    }
    points = [
        {**asdict(choice), **scored[choice], "generation": {str(batch): timed[batch][choice] for batch in timed}}
        for choice in choices
    ]
    equal = {str(batch): at_equal_perplexity(scored, timed[batch]) for batch in timed}
    write_json(
        RESULTS / f"dynamic_k-{arguments.device}-{arguments.name}.json",
        {
            "machine": machine("transformers"),
            "model": arguments.name,
            "parameters": model.num_parameters(),
            "experts": experts,
            "dtype": str(dtype),
            "scored_tokens": blocks.numel(),
            "prompt": arguments.prompt,
            "new": arguments.new,
            "rounds": arguments.rounds,
            "compiled": arguments.compiled,
            "points": points,
            "at_equal_perplexity": equal,
            "generation_agrees": agrees,
        },
    )
    show(choices, scored, timed, equal)
    return 0 if all(agrees) else 1


def ffns_of(model: Any) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


def read_blocks(folder: Path, text: Path, model: Any) -> Tensor:
    """The first TOKENS tokens of a text, its documents divided by end-of-text, as blocks of the model's context."""
    tokenizer, ids = load_tokenizer(folder), []
    for document in read_documents(text, "text"):
        ids += [*tokenizer.encode(document).ids, model.config.eos_token_id]
        if len(ids) >= TOKENS:
            break
    context = model.config.max_position_embeddings
    blocks = min(TOKENS, len(ids)) // context
    if not blocks:
        raise ValueError(f"{text}: fewer than the {context} tokens that this model reads at once")
    return torch.tensor(ids[: blocks * context], device=model.device).view(blocks, context)


@torch.inference_mode()
def score(model: Any, choice: Choice, blocks: Tensor) -> dict[str, float | None]:
    """Perplexity of the blocks, and with dynamic k the mean k over them."""
    choice.set(model)
    total = torch.zeros((), dtype=torch.float64, device=blocks.device)
    for part in blocks.split(max(1, TOKENS_AT_ONCE // blocks.shape[1])):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum")
    targets = blocks.numel() - len(blocks)
    return {"perplexity": perplexity(float(total) / targets), "mean_k": ssd_lit.mean_k(model)}


@torch.inference_mode()
def check(model: Any, choice: Choice, prompts: Tensor) -> bool:
    """Whether the generator's tokens and mean k are those of whole forward passes, up to rounding."""
    choice.set(model)
    generator, prompt = Generator(model), prompts[:2]
    text = generator(prompt, CHECKED)
    generated_k = generator.mean_k
    whole = model(input_ids=text, use_cache=False).logits[:, prompt.shape[1] - 1 : -1].argmax(dim=-1)
    agreeing = float((whole == text[:, prompt.shape[1] :]).float().mean())
    # What the FFNs chose for the new tokens but the last, which was never read: all of the text but the prompt's.
    choice.set(model)
    model(input_ids=text[:, :-1], use_cache=False)
    all_k = ssd_lit.mean_k(model)
    choice.set(model)
    model(input_ids=prompt, use_cache=False)
    prompt_k = ssd_lit.mean_k(model)
    assert generated_k is not None
    assert all_k is not None
    assert prompt_k is not None
    length, read = prompt.shape[1], CHECKED - 1
    expected_k = (all_k * (length + read) - prompt_k * length) / read
    exact = text.device.type == "cpu"
    close = abs(generated_k - expected_k) <= (0.001 if exact else 0.02) * expected_k
    if agreeing < (1.0 if exact else 0.95) or not close:
        print(f"{choice}: {agreeing:.3f} of the tokens agree; mean k {generated_k:.4f}, expected {expected_k:.4f}")
        return False
    return True


def speeds(
    model: Any, choices: Sequence[Choice], prompt: Tensor, arguments: argparse.Namespace
) -> dict[Choice, dict[str, float | None]]:
    """Tokens per second, and with dynamic k the mean k of the new tokens."""
    generators = {choice: Generator(model, sampling=Sampling(1.0), compiled=arguments.compiled) for choice in choices}

    def way(choice: Choice) -> Callable[[], None]:
        choice.set(model)
        generators[choice].start(prompt, arguments.new)

        def run() -> None:
            choice.set(model)
            generators[choice].rewind(prompt.shape[1])
            generators[choice].advance(arguments.new - 1)

        return run

    ways = {choice: way(choice) for choice in choices}
    seconds = medians(seconds_in_turns({str(choice): run for choice, run in ways.items()}, arguments.rounds))
    found: dict[Choice, dict[str, float | None]] = {}
    for choice, run in ways.items():
        run()
        speed = len(prompt) * (arguments.new - 1) / seconds[str(choice)]
        found[choice] = {"tokens_per_second": speed, "mean_k": generators[choice].mean_k}
    return found


def at_equal_perplexity(scored: dict[Choice, Any], timed: dict[Choice, Any]) -> list[dict[str, float | None]]:
    """For each threshold, k and speed of fixed k at the same perplexity; None beyond the ks that were measured."""
    fixed = sorted((scored[choice]["perplexity"], choice.top_k) for choice in scored if choice.top_k is not None)
    perplexities, ks = zip(*fixed, strict=True)
    fixed_speeds = [timed[Choice(top_k=k)]["tokens_per_second"] for k in ks]
    found = []
    for choice in scored:
        if choice.threshold is None:
            continue
        value, speed = scored[choice]["perplexity"], timed[choice]["tokens_per_second"]
        inside = perplexities[0] <= value <= perplexities[-1]
        equal = float(np.interp(value, perplexities, fixed_speeds)) if inside else None
        found.append(
            {
                "threshold": choice.threshold,
                "fixed_k": float(np.interp(value, perplexities, ks)) if inside else None,
                "fixed_tokens_per_second": equal,
                "ratio": None if equal is None else speed / equal,
            }
        )
    return found


def show(
    choices: Sequence[Choice],
    scored: dict[Choice, Any],
    timed: dict[int, dict[Choice, Any]],
    equal: dict[str, list[dict[str, float | None]]],
) -> None:
    print(f"{'':<16} {'perplexity':>10} {'mean k':>7}" + "".join(f"  batch {batch}, tokens/s" for batch in timed))
    for choice in choices:
        k = scored[choice]["mean_k"]
        speed = "".join(f"{timed[batch][choice]['tokens_per_second']:19.1f}" for batch in timed)
        print(f"{choice!s:<16} {scored[choice]['perplexity']:10.3f} {'' if k is None else f'{k:.2f}':>7}{speed}")
    for batch, points in equal.items():
        for point in points:
            if point["ratio"] is not None:
                print(
                    f"batch {batch}, threshold {point['threshold']:g}: {point['ratio']:.2f} times the speed of fixed k "
                    f"at equal perplexity (k {point['fixed_k']:.1f})"
                )


if __name__ == "__main__":
    sys.exit(main())
