"""The FFN alone in float32: every backend of the sparse FFN against the dense one, over token counts and widths.

    python benchmarks/ffn_float32.py [--device cpu] [--rounds 7] [--widths 128 768 1024 2048] [--tokens 1 2 4 ...]

What `auto` should take on a CPU, and on a GPU where a model is evaluated or trained in float32. F = 4 D, ReLU, biases,
32 experts of which the centre router chooses 6 for each token; router and selection are part of the sparse time. All
ways run in turns; a figure is the median of the rounds. The layers that are run one after the other are together larger
than the caches, as those of a model are. On a CPU it exits with 1 if forward and backward at 4096 tokens and width 768
are below 3.0 times the dense FFN's speed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from machine import RESULTS, machine, medians, seconds_in_turns

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.support.files import write_json

E, K = 32, 6
WANTED = 3.0
MOST_TOKENS_OF_VIEWS = 32
"""Beyond that many it is far behind."""
LAYERS_MEGABYTES = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 768, 1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096])
    arguments = parser.parse_args()
    cells = []
    print(f"{'D':>5} {'tokens':>6} {'pass':>8} {'dense ms':>9}   speed against dense")
    for width in arguments.widths:
        layers = build(width, arguments.device)
        for tokens in arguments.tokens:
            for backward in (False, True):
                cells.append(measure(layers, width, tokens, backward, arguments.rounds))
                show(cells[-1])
    write_json(
        RESULTS / f"ffn_float32-{arguments.device}.json",
        {"machine": machine(), "experts": E, "top_k": K, "cells": cells},
    )
    missed = [
        cell
        for cell in cells
        if (arguments.device, cell["width"], cell["tokens"], cell["backward"]) == ("cpu", 768, 4096, True)
        and max(cell["speed_of_dense"].values()) < WANTED
    ]
    return 1 if missed else 0


def build(width: int, device: str) -> list[ExpertFFN]:
    torch.manual_seed(0)
    count = math.ceil(LAYERS_MEGABYTES * 1e6 / (8 * width * width * 4))
    layers = []
    for _ in range(min(count, 24)):
        ffn = ExpertFFN(width, 4 * width, top_k=K, experts=E, router=CenterRouter(width, E)).to(device)
        ffn.router.on_permuted(ffn.gating_weight)
        layers.append(ffn)
    return layers


def measure(layers: list[ExpertFFN], width: int, tokens: int, backward: bool, rounds: int) -> dict[str, Any]:
    # More tokens than this make one layer long enough to time and its weights a small part of what is read.
    used = layers if tokens <= 64 else layers[:1]
    device = layers[0].w_in.device
    x = torch.randn(tokens, width, device=device, requires_grad=backward)
    dy = torch.randn(tokens, width, device=device)
    names = ["dense", "loop", "grouped", *(["decode_cpu"] if tokens <= MOST_TOKENS_OF_VIEWS else [])]
    if device.type == "cuda":
        names = ["dense", "masked", "loop", "grouped", "fused"]
    seconds = medians(seconds_in_turns({name: way(used, name, x, dy, backward) for name in names}, rounds))
    speeds = {name: seconds["dense"] / value for name, value in seconds.items() if name != "dense"}
    return {
        "width": width,
        "tokens": tokens,
        "backward": backward,
        "milliseconds": {name: 1e3 * value / len(used) for name, value in seconds.items()},
        "speed_of_dense": speeds,
        "fastest": max(speeds, key=speeds.__getitem__),
    }


def way(layers: list[ExpertFFN], name: str, x: torch.Tensor, dy: torch.Tensor, backward: bool) -> Callable[[], None]:
    def run() -> None:
        for ffn in layers:
            ffn.backend = "loop" if name == "dense" else name
            ffn.set_mode("dense" if name == "dense" else "sparse")
            if backward:
                x.grad = None
                ffn.zero_grad()
                ffn(x).backward(dy)
            else:
                with torch.inference_mode():
                    ffn(x)

    return run


def show(cell: dict[str, Any]) -> None:
    speeds = "  ".join(f"{name} {value:.2f}" for name, value in cell["speed_of_dense"].items())
    which = "fwd+bwd" if cell["backward"] else "fwd"
    milliseconds = cell["milliseconds"]["dense"]
    print(f"{cell['width']:>5} {cell['tokens']:>6} {which:>8} {milliseconds:9.3f}   {speeds}   -> {cell['fastest']}")


if __name__ == "__main__":
    sys.exit(main())
