"""The sparse FFN alone against the dense one and against peers, on a GPU in bfloat16, side by side in one run.

    python benchmarks/ffn.py [--scattermoe FOLDER] [--rounds 7]

One layer with E 32 and K 6 (k/E 0.1875), forward, and forward with backward: the compiled dense FFN, ours (router,
grouping and all), torch's grouped matrix product and, from a checkout's folder, ScatterMoE's kernels. Each way is
captured in a CUDA graph where that works, so that no launch waits for Python, and timed in turns with the others.
The limits beside are those of the FLOPs at the rate of a large matrix product, and of the bytes that must move at
the rate of a large copy, both measured in this run. A second table shows how many tokens each backend is good for.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import RESULTS, machine
from torch import Tensor, nn

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.support.files import write_json

E, K = 32, 6
SHAPES = [(32768, 768, 3072), (32768, 1024, 4096), (16384, 2048, 8192), (8192, 4096, 16384)]  # T, D, F
WANTED = {768: 2.0, 2048: 3.0, 4096: 3.5}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 256, 1024]


class Case(NamedTuple):
    tokens: int
    d_model: int
    d_ff: int
    gated: bool

    @property
    def name(self) -> str:
        return f"{'ReGLU' if self.gated else 'ReLU'} D {self.d_model} F {self.d_ff} T {self.tokens}"


RESULT = RESULTS / "ffn.json"
CASES = [Case(*shape, gated) for gated in (False, True) for shape in SHAPES]


def main() -> int:
    arguments = parse()
    if arguments.compile is not None:
        if arguments.compile < len(CASES):
            measure(CASES[arguments.compile], arguments.scattermoe, rounds=1)
        else:
            few_tokens(rounds=1)
        return 0
    compile_all(arguments)
    limits = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: {limits['flops'] / 1e12:.0f} TFLOP/s, copy {limits['bytes'] / 1e12:.2f} TB/s"
    )
    rows = []
    for case in CASES:
        rows.append(
            {**case._asdict(), "limits": floors(case, limits), **measure(case, arguments.scattermoe, arguments.rounds)}
        )
        print(line(case, rows[-1]), flush=True)
        # After every case: what is measured already is kept if a later one fails.
        write_json(RESULT, {"machine": machine(), "ceilings": limits, "cases": rows})
    few = few_tokens(arguments.rounds)
    for row in few:
        print(
            f"{row['tokens']:>5} tokens, forward, us: "
            + ", ".join(f"{k} {1e6 * v:.0f}" for k, v in row["seconds"].items())
        )
    write_json(RESULT, {"machine": machine(), "ceilings": limits, "cases": rows, "few_tokens": few})
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scattermoe", type=Path, help="folder that holds the package scattermoe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def compile_all(arguments: argparse.Namespace) -> None:
    """Compile every case in a process of its own, all at once: what is measured then finds it in the cache."""
    peer = ["--scattermoe", str(arguments.scattermoe)] if arguments.scattermoe else []
    jobs = [
        subprocess.Popen([sys.executable, __file__, "--compile", str(number), *peer], stderr=subprocess.DEVNULL)
        for number in range(len(CASES) + 1)
    ]
    for job in jobs:
        job.wait()


def ceilings() -> dict[str, float]:
    """FLOP/s of a large bfloat16 product and bytes a second (read and written) of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    product, copy = (statistics.median(timed(f, 20)) for f in (lambda: a @ b, lambda: target.copy_(source)))
    return {"flops": 2 * 8192**3 / product, "bytes": 2 * (1 << 30) / copy}


def floors(case: Case, limits: dict[str, float]) -> dict[str, float]:
    """Seconds of forward with backward below which no sparse FFN can go: by its FLOPs, and by its fewest bytes."""
    t, d, f = case.tokens, case.d_model, case.d_ff
    weights = (3 if case.gated else 2) * d * f
    # Read x twice and dy, write y and dx; read the weights twice, write their gradients: two bytes each.
    moved = 2 * (5 * t * d + 3 * weights)
    return {"flops": 6 * t * weights * K / E / limits["flops"], "bytes": moved / limits["bytes"]}


def measure(case: Case, scattermoe: Path | None, rounds: int) -> dict[str, Any]:
    """Median seconds of every way, forward and forward with backward."""
    # One module after the other is the same code to torch.compile, which gives up after eight shapes of it.
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(case.tokens, case.d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    ways: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {}
    for name, backend in (("dense", "auto"), ("ours", "fused"), ("grouped", "grouped")):
        ffn = build(case, backend)
        ffn.set_mode("dense" if name == "dense" else "sparse")
        # Compiled, grouped products are slower.
        ways[name] = (ffn if name == "grouped" else torch.compile(ffn), ffn)
    if scattermoe is not None:
        ways["scattermoe"] = peer(case, scattermoe)
    steps, captured = {}, {}
    for name, (way, module) in ways.items():
        parameters = [x, *(p for p in module.parameters() if p.requires_grad and p.ndim > 0)]

        def forward(way: Callable[[Tensor], Tensor] = way) -> None:
            with torch.no_grad():
                way(x)

        def both(way: Callable[[Tensor], Tensor] = way, parameters: list[Tensor] = parameters) -> None:
            torch.autograd.grad(way(x), parameters, dy, allow_unused=True)

        for kind, step in (("forward", forward), ("both", both)):
            steps[f"{name} {kind}"], captured[f"{name} {kind}"] = capture(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].extend(timed(step, 5))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        f"{name} {kind}": median[f"dense {kind}"] / median[f"{name} {kind}"]
        for name in ways if name != "dense" for kind in ("forward", "both")
    }  # fmt: skip
    return {"seconds": median, "speed_over_dense": ratios, "captured": captured}


def build(case: Case, backend: str) -> ExpertFFN:
    router = CenterRouter(case.d_model, E)
    ffn = ExpertFFN(
        case.d_model,
        case.d_ff,
        experts=E,
        top_k=K,
        router=router,
        gated=case.gated,
        bias=not case.gated,
        backend=backend,
    ).to("cuda", torch.bfloat16)
    router.to(torch.float32)
    router.on_permuted(ffn.gating_weight.float())
    return ffn


def peer(case: Case, folder: Path) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """ScatterMoE's module of the same shape, with the same kind of router; it has no biases."""
    sys.path.insert(0, str(folder))
    from scattermoe.mlp import GLUMLP, MLP

    kind = GLUMLP if case.gated else MLP
    module = kind(case.d_model, case.d_ff // E, E, K, activation=nn.ReLU()).to("cuda", torch.bfloat16)
    directions = torch.randn(E, case.d_model, device="cuda", dtype=torch.bfloat16)
    gates = torch.ones(case.tokens, K, device="cuda", dtype=torch.bfloat16)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = module(x, gates, (x.detach() @ directions.T).topk(K, dim=-1, sorted=False).indices)
        return y

    return forward, module


def few_tokens(rounds: int) -> list[dict[str, Any]]:
    """Seconds of a forward pass for few tokens, by backend, at D 2048 and F 8192."""
    rows = []
    for tokens in TOKENS:
        case = Case(tokens, 2048, 8192, False)
        x = torch.randn(tokens, case.d_model, device="cuda", dtype=torch.bfloat16)
        steps, stacks = {}, {}  # a graph does not keep the weights that it reads
        for name in ("dense", "decode_gpu", "fused"):
            if name == "decode_gpu" and tokens > 64:
                continue
            ffn = build(case, "auto" if name == "dense" else name)
            ffn.set_mode("dense" if name == "dense" else "sparse")
            # Four layers in turns: one alone would stay in the cache.
            layers = nn.Sequential(*(build(case, ffn.backend) for _ in range(4)))
            for layer in layers:
                layer.set_mode(ffn.mode)
            stacks[name] = layers

            def step(layers: nn.Sequential = layers, x: Tensor = x) -> None:
                with torch.no_grad():
                    for layer in layers:
                        layer(x)

            steps[name] = capture(step)[0]
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                seconds[name].extend(value / 4 for value in timed(step, 5))
        rows.append({"tokens": tokens, "seconds": {name: statistics.median(v) for name, v in seconds.items()}})
    return rows


def capture(step: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """The step as a CUDA graph, and whether it could be captured; else as it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return step, False
    return graph.replay, True


def timed(step: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of so many calls, on the device's own clock."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    step()
    for before, after in events:
        before.record()
        step()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def line(case: Case, row: dict[str, Any]) -> str:
    both = {name.removesuffix(" both"): value for name, value in row["seconds"].items() if name.endswith(" both")}
    ratios = {name.removesuffix(" both"): v for name, v in row["speed_over_dense"].items() if name.endswith(" both")}
    wanted = f" (wanted {WANTED[case.d_model]})" if case.d_model in WANTED and not case.gated else ""
    ms = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in both.items())
    speeds = ", ".join(f"{name} {value:.2f}x" for name, value in ratios.items())
    limit = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in row["limits"].items())
    forward = row["speed_over_dense"]["ours forward"]
    return f"{case.name}: ms {ms} | {speeds}{wanted}, forward {forward:.2f}x | limits ms {limit}"


if __name__ == "__main__":
    sys.exit(main())
