"""Are the kernels right on this GPU? Outputs and all gradients against float64, over a grid, and twice the same bits.

    python benchmarks/exactness.py

Every case compares the backend `fused` with the masked reference in float64 on the same rounded inputs, and where they
can compute it `quack` and, for one token, `decode_gpu`: relative error of each tensor, by Frobenius norms. Exits with 1
if one is above 2e-2 in bfloat16 or 1e-5 in float32, or if two runs differ in a bit.
"""

import concurrent.futures
import itertools
import multiprocessing
import sys
from typing import Any

import torch
from machine import RESULTS, machine
from torch import Tensor

from ssd_lit.moe.backends import BACKENDS, Activation, Backend, Experts, choose_backend, obstacle_of_quack
from ssd_lit.moe.routing import Routing
from ssd_lit.support.files import write_json

BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
SHAPES = {  # tokens, width, experts, neurons of one, experts a token
    "one token": (1, 768, 32, 96, 6),
    "five tokens": (5, 2048, 32, 256, 6),
    "odd sizes": (37, 120, 7, 24, 3),
    "rows of no multiple of 16 bytes": (700, 250, 7, 50, 3),
    "some rows an expert": (1024, 2048, 32, 256, 6),
    "experts of 512, wide": (3000, 2048, 4, 512, 2),
    "few rows an expert": (300, 256, 16, 64, 2),
    "many rows an expert": (4096, 768, 8, 96, 2),
    "experts of 256": (2500, 512, 4, 256, 2),
    "experts of 512": (1500, 512, 4, 512, 2),
    "all to one expert": (1100, 256, 6, 64, 1),
    "256 experts": (3000, 768, 256, 16, 16),
}
KINDS = {  # gated, bias, weighted, ragged, activation
    "plain": (False, True, False, False, "relu"),
    "gated": (True, False, False, False, "relu"),
    "weighted and ragged": (False, True, True, True, "relu2"),
    "gated, weighted": (True, False, True, False, "silu"),
    "gelu": (False, True, False, False, "gelu"),
    "gated, ragged": (True, False, False, True, "silu"),
    "ragged": (False, True, False, True, "gelu_new"),
}
KEPT_IN_FLOAT32 = ("plain", "gated, weighted", "gelu")
"""Kinds whose weights are kept in float32, as training keeps them, and so have gradients in float32."""
# A ReLU's slope jumps where float32 and float64 may not agree on the sign: kinds whose slope does not.
IN_FLOAT32 = ("gelu", "weighted and ragged")


def main() -> int:
    cases = [c for c in itertools.product(SHAPES, KINDS, BOUNDS) if c[2] == torch.bfloat16 or c[1] in IN_FLOAT32]
    spawn = multiprocessing.get_context("spawn")
    # Most of the time goes to compiling.
    with concurrent.futures.ProcessPoolExecutor(min(14, len(cases)), mp_context=spawn) as pool:
        rows = list(pool.map(check, *zip(*cases, strict=True)))
    write_json(RESULTS / "exactness.json", {"machine": machine(), "cases": rows})
    for dtype, bound in BOUNDS.items():
        name = str(dtype).removeprefix("torch.")
        mine = [row for row in rows if row["dtype"] == name]
        print(
            f"{name}: {len(mine)} cases, worst relative error {max(r['worst'] for r in mine):.1e} (at most {bound:.0e})"
        )
    bad = [row for row in rows if not row["passed"]]
    for row in bad:
        print(f"FAILED {row}")
    print(f"by QuACK too: {sum(row['quack'] for row in rows)}")
    print(f"same bits twice: {sum(row['same_bits'] for row in rows)} of {len(rows)}")
    return 1 if bad else 0


def check(shape: str, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The worst relative error of one case, over outputs and gradients."""
    torch.manual_seed(0)
    x, choice, experts, activation = inputs(shape, kind, dtype)
    exact_choice = choice._replace(weights=None if choice.weights is None else choice.weights.double())
    reference = outcome(BACKENDS["masked"], x.double(), exact_choice, experts.to(torch.float64), activation)
    weighted = choice.weights is not None
    able = obstacle_of_quack(x, experts, activation, weighted=weighted) is None
    errors: dict[str, float] = {}
    same = True
    for name in ("fused", "quack") if able else ("fused",):
        backend = choose_backend(name, x, experts, activation, weighted=weighted)
        first, second = (outcome(backend, x, choice, experts, activation) for _ in range(2))
        errors |= {f"{key} of {name}": error(first[key], reference[key]) for key in reference}
        same = same and all(torch.equal(first[key], second[key]) for key in first)
    if len(x) == 1:
        with torch.no_grad():
            y = choose_backend("decode_gpu", x, experts, activation)(x, choice, experts, activation)
        errors["y of decode_gpu"] = error(y, reference["y"])
    worst = max(errors.values())
    # A NaN is not below a bound.
    return {
        "shape": shape, "kind": kind, "dtype": str(dtype).removeprefix("torch."), "errors": errors, "worst": worst,
        "quack": able, "same_bits": same, "passed": same and all(value < BOUNDS[dtype] for value in errors.values()),
    }  # fmt: skip


def inputs(shape: str, kind: str, dtype: torch.dtype) -> tuple[Tensor, Routing, Experts, Activation]:
    (tokens, d, e, h, k), (gated, bias, weighted, ragged, name) = SHAPES[shape], KINDS[kind]

    def fresh(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device="cuda") * scale).to(dtype)

    def weights(*size: int, scale: float = 1.0) -> Tensor:
        return fresh(*size, scale=scale).to(torch.float32 if kind in KEPT_IN_FLOAT32 else dtype)

    chosen = torch.rand(tokens, e, device="cuda").topk(k).indices
    if shape == "all to one expert":
        chosen = torch.full_like(chosen, 3)
    if ragged:
        chosen = torch.where(torch.rand(chosen.shape, device="cuda") < 0.4, e, chosen)
    choice = Routing(chosen, torch.rand(tokens, k, device="cuda") if weighted else None, ragged)
    experts = Experts(
        weights(e, h, d, scale=d**-0.5), weights(e, h, d, scale=(k * h) ** -0.5),
        weights(e, h) if bias else None, weights(e, h, d, scale=d**-0.5) if gated else None,
        b_out=weights(d) if bias else None,
    )  # fmt: skip
    return fresh(tokens, d), choice, experts, Activation(name)


def outcome(
    backend: Backend, x: Tensor, choice: Routing, experts: Experts, activation: Activation
) -> dict[str, Tensor]:
    """The output, and the gradients of everything that has one."""
    leaves = {"x": x, "weights": choice.weights, **experts._asdict()}
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items() if value is not None}
    mine = Experts(*(leaves.get(name) for name in Experts._fields))  # type: ignore[arg-type]
    y = backend(leaves["x"], choice._replace(weights=leaves.get("weights")), mine, activation)
    torch.manual_seed(1)
    dy = torch.randn(y.shape, device="cuda").to(torch.bfloat16).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def error(found: Tensor, reference: Tensor) -> float:
    size = reference.double().norm()
    return float((found.double() - reference.double()).norm() / size) if size > 0 else float(found.double().norm())


if __name__ == "__main__":
    sys.exit(main())
