"""A whole training step in sparse mode beside the same model's in dense mode, in turns in one run.

    python benchmarks/training_step.py [--shapes small,medium,1.3b] [--experts 32] [--top-k 6] [--router center]
        [--backend auto] [--rounds 5] [--profile]

A step is the forward pass of compiled layers, the loss, the backward pass, gradient clipping and fused AdamW: bf16 over
float32 weights, sequences of 1024 (512 for 30m), E 32 and K 6, the centre router, unless told otherwise. Medians over
rounds of some steps each. Peak memory is that of all tensors, weights and optimizer included. With --profile the
kernels that take the time are told, for each mode.
Shapes that were measured before stay in the JSON.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpt2 import DEVICE, SHAPES, autocast, build, forget_peak, gibibytes, mfu, random_batch, shown, stepper
from machine import RESULTS, machine, seconds_in_turns, synchronize
from torch import Tensor

from ssd_lit.config import MoEConfig
from ssd_lit.data.objectives import Batch
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.names import Mode
from ssd_lit.moe.statistics import expert_load
from ssd_lit.support.files import read_json, write_json

RESULT = RESULTS / "training_step.json"
MODES: tuple[Mode, ...] = ("dense", "sparse")
USUAL = (32, 6)
WANTED = {"small": 1.2, "medium": 1.33, "1.3b": 1.5}
KERNELS = 25


def main() -> int:
    arguments = parse()
    moe = MoEConfig(
        experts=arguments.experts, top_k=arguments.top_k, router=arguments.router, backend=arguments.backend
    )
    found: dict[str, Any] = read_json(RESULT)["shapes"] if RESULT.exists() else {}
    print(f"{'':<8}{'mode':<8}{'ms':>9}{'tokens/s':>11}{'MFU':>7}{'GiB':>7}{'ratio':>7}{'wanted':>8}")
    for name in arguments.shapes.split(","):
        key = ", ".join([name, *unusual(moe)])
        found[key] = {
            "machine": machine("transformers"),
            "moe": moe.model_dump(),
            **measure(name, moe, arguments.rounds, arguments.steps, arguments.profile),
        }
        show(name, found[key])
        # After every shape: what is measured already is kept if a later one fails.
        write_json(RESULT, {"shapes": found})
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    return 0


def unusual(moe: MoEConfig) -> list[str]:
    """What is said of experts and router where they are not the usual ones."""
    experts = [] if (moe.experts, moe.top_k) == USUAL else [f"{moe.top_k} of {moe.experts}"]
    return experts + ([] if moe.router == "center" else [f"{moe.router} router"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "small,medium,1.3b" if DEVICE.type == "cuda" else "tiny"
    parser.add_argument("--shapes", default=default, help=f"some of {', '.join(SHAPES)}, with commas ({default})")
    parser.add_argument("--experts", type=int, default=USUAL[0])
    parser.add_argument("--top-k", type=int, default=USUAL[1])
    parser.add_argument("--router", default="center", choices=("center", "random", "gate"))
    parser.add_argument("--backend", default="auto", help="how the sparse FFN is computed (auto)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of a mode in a round (8)")
    parser.add_argument("--profile", action="store_true", help="tell the kernels that take the time")
    return parser.parse_args()


def measure(name: str, moe: MoEConfig, rounds: int, steps: int, profile: bool) -> dict[str, Any]:
    """Both modes of one shape."""
    shape = SHAPES[name]
    model, batch = build(shape, moe), random_batch(shape)
    step = stepper(model, batch)

    def several(mode: Mode, count: int) -> Tensor:
        model.set_mode(mode)
        for _ in range(count):
            loss = step()
        return loss

    found: dict[str, Any] = {"shape": vars(shape), "compile_seconds": {}, "peak_gibibytes": {}, "loss": {}}
    for mode in MODES:
        start = time.perf_counter()
        several(mode, 1)
        synchronize()
        found["compile_seconds"][mode] = time.perf_counter() - start
        forget_peak()
        found["loss"][mode] = several(mode, 2).item()
        found["peak_gibibytes"][mode] = gibibytes()
    turns = seconds_in_turns({mode: partial(several, mode, steps) for mode in MODES}, rounds)
    seconds = {mode: [one / steps for one in values] for mode, values in turns.items()}
    median = {mode: statistics.median(values) for mode, values in seconds.items()}
    costs = shape.costs(moe)
    flops = {"dense": shape.batch * costs.dense(), "sparse": shape.batch * costs.sparse(moe, moe.top_k)}
    found |= {
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": {mode: shape.tokens / median[mode] for mode in MODES},
        "flops": flops,
        "mfu": {mode: mfu(flops[mode], median[mode]) for mode in MODES},
        "ratio": statistics.median(d / s for d, s in zip(seconds["dense"], seconds["sparse"], strict=True)),
        "flops_ratio": flops["dense"] / flops["sparse"],
        "wanted": WANTED.get(name),
        "largest_load": largest_load(model, batch, moe),
    }
    if profile:
        found["kernels"] = {mode: kernels(partial(several, mode, 3), steps=3) for mode in MODES}
    return found


def largest_load(model: LanguageModel, batch: Batch, moe: MoEConfig) -> list[float]:
    """Tokens of the busiest expert of each layer, in units of an even share: these experts are of random weights."""
    model.set_mode("dense")
    with autocast():
        inputs = ffn_inputs(model, {name: rows[:2] for name, rows in batch.items()})
    loads = [expert_load(ffn, x) for ffn, x in zip(model.ffns, inputs, strict=True)]
    return [load.max().item() * moe.experts / moe.top_k for load in loads]


def kernels(way: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    """The kernels in which the device spends its time, the longest first: milliseconds and calls a step."""
    cuda = DEVICE.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        way()
        synchronize()
    rows = [
        {
            "kernel": event.key[:160],
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps,
            "calls": event.count / steps,
        }
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:KERNELS]


def show(name: str, found: dict[str, Any]) -> None:
    for mode in MODES:
        ratio = f"{found['ratio']:7.2f}{shown(found['wanted'], '8.2f'):>8}" if mode == "sparse" else ""
        print(
            f"{name if mode == 'dense' else '':<8}{mode:<8}{1e3 * found['median_seconds'][mode]:9.2f}"
            f"{found['tokens_per_second'][mode]:11,.0f}{shown(found['mfu'][mode], '.1%'):>7}"
            f"{shown(found['peak_gibibytes'][mode], '.2f'):>7}{ratio}"
        )
    compiled = ", ".join(f"{mode} {seconds:.0f} s" for mode, seconds in found["compile_seconds"].items())
    print(f"{'':<8}FLOPs ratio {found['flops_ratio']:.2f}; compiled: {compiled}")
    for mode, rows in found.get("kernels", {}).items():
        total = sum(row["ms"] for row in rows)
        print(f"{'':<8}{mode}, {total:.1f} ms a step in its first {len(rows)} kernels")
        for row in rows[:8]:
            print(f"{'':<10}{row['ms']:8.2f} ms {row['calls']:6.1f} x {row['kernel'][:70]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
