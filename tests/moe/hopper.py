"""Compiles for an H100 what the product launches there, on a machine without a GPU, and runs none of it.

    python -m tests.moe.hopper

prints every kernel's registers, the bytes of memory that a thread takes for want of registers, and its shared memory.
What kernels would write stays as it was, so numbers that depend on it mean nothing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # kernels are objects of the interpreter from their definition on

import torch
import transformers
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ssd_lit.moe import kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
H100 = GPUTarget("cuda", 90, 32)
# Before anything takes it from there: what an H100 can do.
kernels.early_launch = lambda x: {"PDL": True, "launch_pdl": True}
kernels.runs_on = lambda x: True

from ssd_lit.config import MoEConfig  # noqa: E402
from ssd_lit.models.decoding.gpt2 import GPT2Step  # noqa: E402
from ssd_lit.models.family import family, swap_ffns  # noqa: E402
from ssd_lit.moe.backends import Activation, Experts  # noqa: E402
from ssd_lit.moe.backends.fused import fused  # noqa: E402
from ssd_lit.moe.backends.quack import quack  # noqa: E402
from ssd_lit.moe.kernels import quack as products  # noqa: E402
from ssd_lit.moe.kernels.dynamic_k import route_above  # noqa: E402
from ssd_lit.moe.kernels.routing import route  # noqa: E402
from ssd_lit.moe.routing import Routing  # noqa: E402

# Another library compiles these, where it is.
for product in ("up", "down", "up_backward"):
    setattr(products, product, lambda *_: None)

SHAPES = [(768, 12, 48, 12), (2048, 16, 32, 6)]
"""Of GPT-2s: width, heads, experts and experts a token."""


class Device:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def compiled_only() -> Iterator[dict[str, dict[str, Any]]]:
    """In this context kernels are compiled instead of launched; yields what is known of each, by name and sizes."""
    found: dict[str, dict[str, Any]] = {}
    launch = JITFunction.__getitem__

    def getitem(kernel: Any, grid: Any) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            made = kernel.run(*arguments, grid=grid, warmup=True, **options)
            if made.hash not in hashes:
                hashes.add(made.hash)
                sizes = ", ".join(f"{key} {value}" for key, value in options.items() if key.isupper())
                found[f"{kernel.fn.__name__}: {sizes}"] = resources(made)

        return compile_it

    hashes: set[str] = set()
    driver.set_active(Device())
    JITFunction.__getitem__ = getitem
    try:
        yield found
    finally:
        JITFunction.__getitem__ = launch


def resources(made: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = (int(re.findall(rf"{name}:(\d+)", told.stdout)[-1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared}


def decode(width: int, heads: int, experts: int, k: int) -> None:
    """The step of generation of a GPT-2 of one layer: dense, with k experts, with twice as many, with dynamic k."""
    config = transformers.GPT2Config(
        vocab_size=5000, n_positions=1152, n_embd=width, n_layer=1, n_head=heads, activation_function="relu",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)  # type: ignore[arg-type]
    (ffn,) = swap_ffns(model, family("gpt2"), MoEConfig(experts=experts, top_k=k), router="centers")
    cache = [(torch.zeros(1, heads, 1152, width // heads, dtype=torch.bfloat16),) * 2]
    place, token = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    for mode, choice in (
        ("dense", {}), ("sparse", {"top_k": k}), ("sparse", {"top_k": 2 * k}), ("sparse", {"threshold": 0.05})
    ):  # fmt: skip
        ffn.set_mode(mode, **choice)  # type: ignore[arg-type]
        GPT2Step(model, token, place, cache)()


def train(width: int, experts: int, k: int, tokens: int, *, gated: bool) -> None:
    """Routing, forward and backward pass of a sparse FFN in bfloat16 over float32 weights."""

    def weights() -> Tensor:
        return torch.empty(experts, 4 * width // experts, width).requires_grad_()

    x = torch.zeros(tokens, width, dtype=torch.bfloat16).requires_grad_()
    directions = torch.zeros(experts, width)
    route(x.detach(), directions, k)
    route_above(x.detach(), directions, 0.1, torch.zeros(2, dtype=torch.int64))
    chosen = torch.zeros(tokens, k, dtype=torch.int64)
    bias = None if gated else torch.zeros(experts, 4 * width // experts).requires_grad_()
    parts = Experts(weights(), weights(), bias, weights() if gated else None)
    for backend in (fused, quack):
        backend(x, Routing(chosen), parts, Activation("silu" if gated else "relu")).sum().backward()


def main() -> int:
    with compiled_only() as found:
        for width, heads, experts, k in SHAPES:
            decode(width, heads, experts, k)
        train(768, 48, 12, 64, gated=False)
        train(768, 48, 12, 16384, gated=False)
        train(768, 256, 16, 16384, gated=False)
        for gated in (False, True):
            train(2048, 32, 6, 16384, gated=gated)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(found))
    for name, one in found.items():
        print(f"{one['registers']:4} registers {one['stack']:5} bytes of a stack {one['shared']:7} shared  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
