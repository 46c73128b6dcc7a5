"""The sparse FFN alone against the dense one and against peers, on a GPU in bfloat16, side by side in one run.

    python benchmarks/ffn.py [--scattermoe FOLDER] [--sonicmoe FOLDER] [--routing FILE] [--rounds 7]
        [--cases "ReLU D 768" "SwiGLU D 2048"]

One layer with E 32 and K 6 (k/E 0.1875), forward, and forward with backward: the compiled dense FFN, our backends
`fused`, `quack` (where that is installed) and `grouped`, router, grouping and all, and, from folders, ScatterMoE's
kernels and, for SwiGLU, SonicMoE's.
All have the same weights, the same input and the same router, and their outputs are compared first. Every way is timed
twice, in turns with the others: as it is called ("eager"), and replayed from a CUDA graph ("graph"), where no launch
waits for Python. Speeds are against the dense FFN timed the same way; a way that cannot be captured has no time of
that kind, and the reason stands in its place. Experts are chosen at random, so that loads are even, and, with the FILE
of benchmarks/routing.py, as in two layers of a trained model: the one of middling and the one of the most uneven load.
The limits beside are those of the FLOPs at the rate of a large matrix product, and of the bytes that must move at
the rate of a large copy, both measured in this run. Another table shows how many tokens each backend is good for; it is
left out where cases are named. Cases that were measured before stay in the JSON.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import RESULTS, machine
from peers import QUACK_TILES, Way, scattermoe, sonicmoe
from torch import Tensor

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.kernels.quack import runs_here
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.support.files import read_json, write_json

E, K = 32, 6
SHAPES = [(32768, 768, 3072), (32768, 1024, 4096), (16384, 2048, 8192), (8192, 4096, 16384)]  # T, D, F
WANTED = {768: 2.0, 2048: 2.9, 4096: 3.3}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 2048, 4096]
MANY_TOKENS = 1024
"""From here on QuACK's products are tried too."""
PASSES = ("forward", "both")
COMPILE_SECONDS = 300
"""What is not compiled by then is compiled when it is measured."""


class Case(NamedTuple):
    tokens: int
    d_model: int
    d_ff: int
    activation: str
    gated: bool

    @property
    def name(self) -> str:
        kind = {"relu": "ReGLU" if self.gated else "ReLU", "silu": "SwiGLU"}[self.activation]
        return f"{kind} D {self.d_model} F {self.d_ff} T {self.tokens}"


RESULT = RESULTS / "ffn.json"
CASES = [Case(*shape, "relu", gated) for gated in (False, True) for shape in SHAPES]
CASES += [Case(*SHAPES[number], "silu", True) for number in (0, 2)]


def main() -> int:
    arguments = parse()
    if arguments.compile is not None:
        if arguments.compile < len(CASES):
            measure(CASES[arguments.compile], arguments, {}, rounds=1)
        else:
            few_tokens(rounds=1)
        return 0
    cases = [case for case in CASES if not arguments.cases or case.name.startswith(tuple(arguments.cases))]
    compile_all(arguments, cases)
    limits = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: {limits['flops'] / 1e12:.0f} TFLOP/s, copy {limits['bytes'] / 1e12:.2f} TB/s"
    )
    routings = trained_routings(arguments.routing) if arguments.routing else {}
    told = {name: load_of(chosen) for name, chosen in routings.items()}
    result: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {"cases": {}}
    for case in cases:
        row = {
            "ceilings": limits, "trained_loads": told, "limits": floors(case, limits),
            **measure(case, arguments, routings, arguments.rounds),
        }  # fmt: skip
        # Now, because the peers' packages are found once they are imported.
        result["cases"][case.name] = {"machine": machine("sonic-moe", "quack-kernels"), **case._asdict(), **row}
        print("\n".join(lines(case, row)), flush=True)
        # After every case: what is measured already is kept if a later one fails.
        write_json(RESULT, result)
    if not arguments.cases:
        result["few_tokens"] = {"machine": machine(), "rows": few_tokens(arguments.rounds)}
        for row in result["few_tokens"]["rows"]:
            microseconds = ", ".join(f"{name} {1e6 * value:.0f}" for name, value in row["seconds"].items())
            print(f"{row['tokens']:>5} tokens, forward, us: {microseconds}")
        write_json(RESULT, result)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scattermoe", type=Path, help="folder that holds the package scattermoe")
    parser.add_argument("--sonicmoe", type=Path, help="folder into which sonic-moe and what it needs were unpacked")
    parser.add_argument("--routing", type=Path, help="choices of a trained model, from benchmarks/routing.py")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only cases whose names begin so")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tile", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def compile_all(arguments: argparse.Namespace, cases: list[Case]) -> None:
    """Compile the cases, each in a process of its own, all at once: what is measured then finds them in the cache.

    QuACK's products, which take longest, have a process for each tile.
    """
    scatter = ["--scattermoe", str(arguments.scattermoe)] if arguments.scattermoe else []
    numbers = [CASES.index(case) for case in cases] + ([] if arguments.cases else [len(CASES)])
    options = [["--compile", str(number), *scatter] for number in numbers]
    if arguments.sonicmoe:
        gated = [CASES.index(case) for case in cases if case.activation == "silu"]
        for number, tile in itertools.product(gated, range(len(QUACK_TILES))):
            options.append(["--compile", str(number), "--sonicmoe", str(arguments.sonicmoe), "--tile", str(tile)])
    jobs = [subprocess.Popen([sys.executable, __file__, *one], stderr=subprocess.DEVNULL) for one in options]
    end = time.monotonic() + COMPILE_SECONDS
    for job in jobs:
        try:
            job.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.kill()
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


def measure(case: Case, folders: argparse.Namespace, trained: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """Median seconds of every way, by routing, by how it is called, and by what is computed."""
    # One module after the other is the same code to torch.compile, which gives up after eight shapes of it.
    torch._dynamo.reset()
    torch.manual_seed(0)
    ours = build(case, "fused")
    inputs = {"random": tokens_that_choose(random_choices(case.tokens), ours)}
    inputs |= {name: tokens_that_choose(chosen, ours, case.tokens) for name, chosen in trained.items()}
    x = inputs["random"].clone().requires_grad_()
    dy = torch.randn_like(x)
    failed: dict[str, str] = {}
    ways = ways_of(case, ours, folders, failed)
    errors = compare(case, ours, ways, x, failed)
    steps: dict[str, dict[str, Callable[[], object]]] = {"eager": {}, "graph": {}}
    not_captured: dict[str, str] = {}
    for name, way in ways.items():
        for kind, step in passes(way, x, dy).items():
            steps["eager"][f"{name} {kind}"] = step
            try:
                steps["graph"][f"{name} {kind}"] = capture(step)
            except Exception as error:  # each library has its own
                torch.cuda.synchronize()
                not_captured[f"{name} {kind}"] = reason(error)
    medians, ratios = {}, {}
    for routing, tokens in inputs.items():
        with torch.no_grad():
            x.copy_(tokens)  # where the graphs read it
        medians[routing] = in_turns(steps, rounds)
        ratios[routing] = {called: over_dense(seconds) for called, seconds in medians[routing].items()}
    return {
        "seconds": medians, "speed_over_dense": ratios, "relative_error": errors, "not_captured": not_captured,
        "failed": failed,
    }  # fmt: skip


def ways_of(case: Case, ours: ExpertFFN, folders: argparse.Namespace, failed: dict[str, str]) -> dict[str, Way]:
    """All ways with the weights of `ours`; a peer that cannot be built says why in `failed`."""
    dense, grouped = build(case, "auto"), build(case, "grouped")
    for copy in (dense, grouped):
        copy.load_state_dict(ours.state_dict())
    dense.set_mode("dense")
    # Compiled, grouped products are slower.
    ways: dict[str, Way] = {
        "dense": (torch.compile(dense), dense), "fused": (torch.compile(ours), ours), "grouped": (grouped, grouped)
    }  # fmt: skip
    if runs_here(ours.w_in.device):
        quack = build(case, "quack")
        quack.load_state_dict(ours.state_dict())
        ways["quack"] = torch.compile(quack), quack
    peers: dict[str, tuple[Callable[..., Way], Path | None]] = {"scattermoe": (scattermoe, folders.scattermoe)}
    if case.activation == "silu":
        tiles = QUACK_TILES if folders.tile is None else [QUACK_TILES[folders.tile]]
        peers["sonicmoe"] = (partial(sonicmoe, tiles=tiles), folders.sonicmoe)
    for name, (make, folder) in peers.items():
        if folder is not None:
            try:
                ways[name] = make(ours, case.tokens, folder)
            except Exception as error:
                failed[name] = reason(error)
    return ways


@torch.no_grad()
def compare(case: Case, ours: ExpertFFN, ways: dict[str, Way], x: Tensor, failed: dict[str, str]) -> dict[str, float]:
    """The relative error of every sparse way against the masked FFN; a way that does not run is dropped."""
    reference = build(case, "masked")
    reference.load_state_dict(ours.state_dict())
    wanted = reference(x).float()
    errors = {}
    for name in [name for name in ways if name != "dense"]:
        try:
            errors[name] = ((ways[name][0](x).float() - wanted).norm() / wanted.norm()).item()
        except Exception as error:
            failed[name] = reason(error)
            del ways[name]
    return errors


def passes(way: Way, x: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """Forward without a gradient, and forward with backward, of x and all parameters."""
    layer, module = way
    parameters = [x, *(p for p in module.parameters() if p.requires_grad and p.ndim > 0)]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        torch.autograd.grad(layer(x), parameters, dy, allow_unused=True)

    return {"forward": forward, "both": both}


def in_turns(steps: dict[str, dict[str, Callable[[], object]]], rounds: int) -> dict[str, dict[str, float]]:
    seconds = {called: {name: list[float]() for name in of_kind} for called, of_kind in steps.items()}
    for _ in range(rounds):
        for called, of_kind in steps.items():
            for name, step in of_kind.items():
                seconds[called][name].extend(timed(step, 5))
    return {called: {name: statistics.median(v) for name, v in of_kind.items()} for called, of_kind in seconds.items()}


def over_dense(seconds: dict[str, float]) -> dict[str, float]:
    """Speed against the dense FFN that is called alike."""
    speeds = {}
    for name, value in seconds.items():
        way, kind = name.split()
        if way != "dense" and f"dense {kind}" in seconds:
            speeds[name] = seconds[f"dense {kind}"] / value
    return speeds


def build(case: Case, backend: str) -> ExpertFFN:
    """A sparse FFN whose router's directions are orthonormal, so that a token can be made to choose any experts."""
    router = CenterRouter(case.d_model, E)
    bias = not case.gated
    ffn = ExpertFFN(
        case.d_model, case.d_ff, experts=E, top_k=K, router=router, activation=case.activation, gated=case.gated,
        bias=bias, backend=backend,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    router.to(torch.float32)
    router.centers.copy_(torch.linalg.qr(torch.randn(case.d_model, E)).Q.T)
    ffn.set_mode("sparse")
    return ffn


def random_choices(tokens: int) -> Tensor:
    """K distinct experts of each token, [T, K]."""
    return torch.rand(tokens, E).topk(K, dim=-1).indices


def trained_routings(file: Path) -> dict[str, Tensor]:
    """The choices [T, K] in the layers whose fullest expert is of middling and of the largest load."""
    saved = torch.load(file, weights_only=True)
    chosen: Tensor = saved["choices"].long()
    if (saved["experts"], chosen.shape[-1]) != (E, K):
        raise SystemExit(f"{file}: {chosen.shape[-1]} of {saved['experts']} experts; {K} of {E} are measured here")
    order = loads(chosen, E).amax(dim=1).argsort().tolist()
    return {f"trained, layer {layer}": chosen[layer] for layer in (order[len(order) // 2], order[-1])}


def loads(chosen: Tensor, experts: int) -> Tensor:
    """The pairs of every expert over the mean of all, [L, T, K] -> [L, E]."""
    counts = torch.stack([torch.bincount(layer.flatten().long(), minlength=experts) for layer in chosen])
    return counts / counts.float().mean(dim=1, keepdim=True)


def load_of(chosen: Tensor) -> dict[str, float]:
    """The fullest and the emptiest expert's pairs over the mean."""
    load = loads(chosen[None], E)
    return {"fullest": load.max().item(), "emptiest": load.min().item()}


def tokens_that_choose(chosen: Tensor, ffn: ExpertFFN, tokens: int | None = None) -> Tensor:
    """Tokens [T, D], otherwise random, whose largest products with the router's directions are those of `chosen`.

    Rows of `chosen` are taken again from the first where there are more tokens. The scores of the chosen lie so far
    above the others that every way chooses the same, however it rounds.
    """
    tokens = tokens or len(chosen)
    chosen = chosen[torch.arange(tokens) % len(chosen)]
    directions = ffn.router.expert_vectors()
    assert directions is not None
    directions = directions.cpu()
    scores = torch.rand(tokens, E).sub(0.5).scatter_add(1, chosen, torch.full(chosen.shape, 3.0))
    x = torch.randn(tokens, directions.shape[1])
    return (x + (scores - x @ directions.T) @ directions).to(ffn.w_in)


def few_tokens(rounds: int) -> list[dict[str, Any]]:
    """Seconds of a forward pass for few tokens, by backend, at D 2048 and F 8192."""
    rows = []
    for tokens in TOKENS:
        case = Case(tokens, 2048, 8192, "relu", False)
        x = torch.randn(tokens, case.d_model, device="cuda", dtype=torch.bfloat16)
        graphs: dict[str, Callable[[], object]] = {}
        stacks = []  # a graph does not keep the weights that it reads
        names = ["dense", "decode_gpu", "fused"] if tokens == 1 else ["dense", "fused"]
        if tokens >= MANY_TOKENS and runs_here(x.device):
            names.append("quack")
        for name in names:
            ffn = build(case, "auto" if name == "dense" else name)
            ffn.set_mode("dense" if name == "dense" else "sparse")
            # Four layers in turns: one alone would stay in the cache.
            layers = [build(case, ffn.backend) for _ in range(4)]
            for layer in layers:
                layer.set_mode(ffn.mode)
            stacks.append(layers)

            def step(layers: list[ExpertFFN] = layers, x: Tensor = x) -> None:
                with torch.no_grad():
                    for layer in layers:
                        layer(x)

            graphs[name] = capture(step)
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                seconds[name].extend(value / 4 for value in timed(graph, 5))
        rows.append({"tokens": tokens, "seconds": {name: statistics.median(v) for name, v in seconds.items()}})
    return rows


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph. Raises what the step raises where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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


def lines(case: Case, row: dict[str, Any]) -> list[str]:
    """The table's lines of a case: one for every routing and way of calling, then what did not work."""
    wanted = f" (wanted {WANTED[case.d_model]})" if case.d_model in WANTED and case.name.startswith("ReLU") else ""
    limit = ", ".join(f"{name} {1e3 * value:.3f}" for name, value in row["limits"].items())
    errors = ", ".join(f"{name} {value:.1e}" for name, value in row["relative_error"].items())
    text = [f"{case.name}{wanted}: limits ms {limit} | relative errors {errors}"]
    for routing, of_routing in row["seconds"].items():
        for called, seconds in of_routing.items():
            speeds = row["speed_over_dense"][routing][called]
            cells = []
            for name in dict.fromkeys(name.split()[0] for name in seconds):
                ms = "/".join(
                    f"{1e3 * seconds[f'{name} {kind}']:.3f}" for kind in PASSES if f"{name} {kind}" in seconds
                )
                speed = f" {speeds[f'{name} both']:.2f}x" if f"{name} both" in speeds else ""
                cells.append(f"{name} {ms}{speed}")
            text.append(f"  {called:5} {routing:17} ms forward/both: {', '.join(cells)}")
    text += [f"  not captured: {name}: {why}" for name, why in row["not_captured"].items()]
    text += [f"  failed: {name}: {why}" for name, why in row["failed"].items()]
    return text


def reason(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


if __name__ == "__main__":
    sys.exit(main())
