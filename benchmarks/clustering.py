"""Balanced clustering: beside k-means-constrained on the CPU, all layers on a GPU, and a check of similarity.

    pip install k-means-constrained && python benchmarks/clustering.py --device cpu [--rounds 5]
    python benchmarks/clustering.py --device cuda

Measurements, each a median over rounds:

- CPU: 6144 x 768 rows into 32 clusters, random rows and rows of low rank, ours and k-means-constrained in turns with
  one start each (the peer runs several jobs only for several starts). Wanted: 3 times as fast at no higher inertia.
  Left out if the package is not installed.
- GPU: all layers at once of GPT-2 small (12 of 3072 x 768 rows) and of a 1.3 B shape (24 of 8192 x 2048) into 32, from
  nothing and from the clustering before; how often each launches kernels, copies and waits; whether it gives the same
  bits twice, and the first layer's inertia beside that of the CPU in float64. Wanted: 40 ms for GPT-2 small, 2 s for
  1.3 B.
- A check of the activation pattern's similarity while a model trains, as a share of the dense steps between two checks:
  GPT-2 small every 50 steps on a GPU, the default experiment's model at its interval on a CPU. The first check has no
  start to begin from. Wanted: 2 %.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from gpt2 import DEVICE, SHAPES, Shape, build, random_batch, stepper
from machine import RESULTS, machine, medians, seconds_in_turns
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ssd_lit.config import MoEConfig
from ssd_lit.moe.clustering import Clustering, balanced_kmeans, balanced_kmeans_layers
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.support.files import write_json

CLUSTERS = 32
ALL_LAYERS = {"GPT-2 small": (12, 3072, 768, 0.04), "1.3 B": (24, 8192, 2048, 2.0)}
"""Layers, rows and columns of each, and the seconds wanted."""
PEER = "k_means_constrained"
DEFAULT_EXPERIMENT = Shape(layers=4, d_model=128, heads=4, batch=16, sequence=128, vocabulary=2048)
CHECK_EVERY = {"cpu": 25, "cuda": 50}
"""Steps between two checks: those of the default experiment, and a few more."""


def main() -> int:
    arguments = parse()
    found: dict[str, Any] = {"machine": machine("k-means-constrained", "scikit-learn", "scipy")}
    if arguments.device == "cuda":
        found["all_layers"] = {
            f"{name}, {kind}": all_layers(arguments.rounds, name, kind)
            for name in ALL_LAYERS
            for kind in ("random", "low rank")
        }
    elif find_spec(PEER):
        found["against_peer"] = against_peer(arguments.rounds, arguments.rows, arguments.columns)
    else:
        print(f"{PEER} is not installed: nothing to compare with")
    if arguments.device == DEVICE.type:
        found["check"] = check(arguments.rounds)
    write_json(RESULTS / f"clustering-{arguments.device}.json", found)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=DEVICE.type)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=6144, help="beside the peer (6144)")
    parser.add_argument("--columns", type=int, default=768, help="beside the peer (768)")
    return parser.parse_args()


def rows_of(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    """Rows [n, d] on the CPU: independent, or near a space of d / 12 dimensions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    rank = max(1, d // 12)
    return (
        x if kind == "random" else torch.randn(n, rank, generator=g) @ torch.randn(rank, d, generator=g) / 8 + 0.7 * x
    )


def against_peer(rounds: int, n: int, d: int) -> dict[str, Any]:
    """Seconds and inertia of both, on the CPU."""
    from k_means_constrained import KMeansConstrained

    found: dict[str, Any] = {}
    print(f"{n} x {d} rows into {CLUSTERS}, CPU\n{'':<10}{'ours s':>9}{'peer s':>9}{'ratio':>7}{'inertia/peer':>14}")
    for kind in ("random", "low rank"):
        x = rows_of(kind, n, d)
        size = n // CLUSTERS
        settings = {"size_min": size, "size_max": size, "n_init": 1, "random_state": 0, "n_jobs": 1}
        inertia: dict[str, float] = {}

        def ours(x: Tensor = x, inertia: dict[str, float] = inertia) -> None:
            inertia["ours"] = balanced_kmeans(x, CLUSTERS).inertia

        def peer(x: Tensor = x, inertia: dict[str, float] = inertia, settings: dict[str, Any] = settings) -> None:
            inertia["peer"] = float(KMeansConstrained(CLUSTERS, **settings).fit(x.numpy()).inertia_)

        seconds = seconds_in_turns({"ours": ours, "peer": peer}, rounds)
        ratio = statistics.median(p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True))
        median = medians(seconds)
        found[kind] = {"seconds": seconds, "median_seconds": median, "ratio": ratio, "wanted": 3.0, "inertia": inertia}
        quality = inertia["ours"] / inertia["peer"]
        print(f"{kind:<10}{median['ours']:9.2f}{median['peer']:9.2f}{ratio:7.2f}{quality:14.5f}")
    return found


def all_layers(rounds: int, name: str, kind: str) -> dict[str, Any]:
    """All layers of a model at once on the GPU: from nothing, and from the clustering before."""
    layers, n, d, wanted = ALL_LAYERS[name]
    rows = [F.normalize(rows_of(kind, n, d, seed).to(DEVICE), dim=-1) for seed in range(layers)]
    first = balanced_kmeans_layers(rows, CLUSTERS)
    g = torch.Generator().manual_seed(0)
    moved = [F.normalize(x + 0.1 * torch.randn(x.shape, generator=g).to(x) / d**0.5, dim=-1) for x in rows]
    init = [clustering.labels for clustering in first]
    ways: dict[str, Callable[[], list[Clustering]]] = {
        "cold": lambda: balanced_kmeans_layers(rows, CLUSTERS),
        "warm": lambda: balanced_kmeans_layers(moved, CLUSTERS, init=init),
    }
    seconds = seconds_in_turns(ways, rounds)
    median = medians(seconds)
    calls = {way: runtime_calls(cluster) for way, cluster in ways.items()}
    same = all(
        torch.equal(a.labels, b.labels) and a.inertia == b.inertia
        for cluster in ways.values()
        for a, b in zip(cluster(), cluster(), strict=True)
    )
    on_cpu = balanced_kmeans(rows[0].cpu().double(), CLUSTERS).inertia
    print(f"{name}, {kind}: {layers} layers of {n} x {d} into {CLUSTERS}")
    for way in ways:
        print(f"  {way}: {1e3 * median[way]:.1f} ms (wanted {1e3 * wanted:.0f}); {calls[way]}")
    print(f"  first layer's inertia / CPU's in float64 {first[0].inertia / on_cpu:.6f}, twice the same: {same}")
    return {
        "seconds": seconds,
        "median_seconds": median,
        "wanted_seconds": wanted,
        "calls": calls,
        "inertia": {"gpu": first[0].inertia, "cpu": on_cpu},
        "repeatable": same,
    }


def runtime_calls(work: Callable[[], object]) -> dict[str, int]:
    """How often work launches kernels, copies or fills memory, and waits for the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    kinds = {"launches": "Launch", "copies": "Mem", "waits": "Synchronize"}
    counts = dict.fromkeys(kinds, 0)
    for event in profiler.key_averages():
        if event.key.startswith("cu"):
            for kind, part in kinds.items():
                counts[kind] += event.count if part in event.key else 0
    return counts


def check(rounds: int) -> dict[str, Any]:
    """Checks of similarity and the dense steps between them, in turns."""
    cuda = DEVICE.type == "cuda"
    shape = SHAPES["small"] if cuda else DEFAULT_EXPERIMENT
    every = CHECK_EVERY[DEVICE.type]
    moe = MoEConfig(experts=CLUSTERS, top_k=6) if cuda else MoEConfig(experts=16, top_k=6)
    model = build(shape, moe)
    model.set_mode("dense")
    step = stepper(model, random_batch(shape))
    similarity: list[float | None] = []
    trackers: dict[str, PatternTracker] = {}

    def steps() -> None:
        for _ in range(every):
            step()

    def cold() -> None:
        trackers["cold"] = PatternTracker(moe.experts, seed=0)
        trackers["cold"].update([ffn.gating_weight for ffn in model.ffns])

    def warm() -> None:
        tracker = trackers.setdefault("warm", PatternTracker(moe.experts, seed=0))
        similarity.append(tracker.update([ffn.gating_weight for ffn in model.ffns]))

    seconds = seconds_in_turns({"steps": steps, "cold": cold, "warm": warm}, rounds, warmup=2)
    median = medians(seconds)
    share = statistics.median(w / s for w, s in zip(seconds["warm"], seconds["steps"], strict=True))
    print(
        f"check of {shape.layers} layers of {4 * shape.d_model} x {shape.d_model} into {moe.experts}, {DEVICE.type}: "
        f"first {1e3 * median['cold']:.0f} ms, later {1e3 * median['warm']:.0f} ms, "
        f"{every} dense steps {1e3 * median['steps']:.0f} ms: {share:.2%} (wanted at most 2 %)"
    )
    return {
        "shape": vars(shape),
        "check_every": every,
        "seconds": seconds,
        "median_seconds": median,
        "share": share,
        "wanted": 0.02,
        "similarity": similarity,
    }


if __name__ == "__main__":
    sys.exit(main())
