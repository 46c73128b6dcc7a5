"""A step of generation of one text by a GPT-2 on a GPU: five kernels a layer, in either mode.

Transformers' own step launches a dozen or two. Shape letters: D model width, N places of the cache, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from triton import next_power_of_2

from ssd_lit.models.decoding import kernels
from ssd_lit.moe.backends.decode_gpu import COLUMNS, Choice, Norm, columns_of, down, rows_of_tile, up
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.kernels import early_launch

PROJECT = {"COLUMNS": 32, "ROWS": 1024, "num_warps": 8}
MIX = {"COLUMNS": 32, "ROWS": 2048, "num_warps": 8}
"""Columns of an attention's maps in a program, rows that it takes at a time at most, and its warps."""
ATTEND = {"CHUNK": 64, "num_warps": 4}
"""Places of the cache that a program attends to, and its warps."""
WIDTHS, HEAD_WIDTHS = 64, 16
"""What the model's width, and the width of a head, must be multiples of."""
MOST_EXPERTS = 256
"""Every program compares the scores of all pairs of experts, in registers."""


def can_step(model: nn.Module) -> bool:
    """Whether a `GPT2Step` can be made of a model, in its present mode."""
    if type(model) is not GPT2LMHeadModel:
        return False
    config, width = model.config, model.config.n_embd
    plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx and not config.add_cross_attention
    fits = plain and width % WIDTHS == 0 and width // config.n_head % HEAD_WIDTHS == 0
    return fits and all(isinstance(layer.mlp, ExpertFFN) and _is_known(layer.mlp) for layer in model.transformer.h)


def _is_known(ffn: ExpertFFN) -> bool:
    chooses = ffn.backend in ("auto", "decode_gpu") and not ffn.oracle and ffn.router.expert_vectors() is not None
    in_float = ffn.w_in.dtype in (torch.float32, torch.bfloat16, torch.float16)
    plain = in_float and ffn.b_gate is None and not ffn.upcycled
    return plain and (ffn.mode == "dense" or (chooses and ffn.experts <= MOST_EXPERTS))


class _Layer:
    """What the kernels of a layer read and write."""

    def __init__(self, block: Any, keys: Tensor, values: Tensor):
        self.block, self.keys, self.values = block, keys, values
        self.ffn: ExpertFFN = block.mlp
        self.sparse = self.ffn.mode == "sparse" and not self.ffn.chooses_all
        self.shift, self.offset = (keys.new_zeros(self.ffn.experts, dtype=torch.float32) for _ in range(2))

    def choice(self, products: Tensor) -> Choice:
        """How the experts are found; products [blocks, E] are parts of their scores."""
        ffn = self.ffn
        if not self.sparse:
            return Choice("all", ffn.experts)
        slots = ffn.top_k if ffn.threshold is None else ffn.experts
        total = ffn.top_k if ffn.router.weighted else 0
        return Choice(
            "scores", slots, ffn.top_k, ffn.threshold, ffn.tally, total, products, self.shift, self.offset
        )  # fmt: skip

    def refresh(self) -> None:
        """The products of the router's directions with the norm's gain and bias."""
        norm, directions = self.block.ln_2, self.ffn.router.expert_vectors()
        if not self.sparse or directions is None:
            return
        # Always, since not all changes in place raise a tensor's version.
        self.shift.copy_(directions.float() @ norm.weight.float())
        self.offset.copy_(directions.float() @ norm.bias.float())


class GPT2Step:
    """Adds the key and value of the text's last token to a cache, and gives the logits of the next.

    `last` [1, 1] holds the token, `position` [1] its place, `cache` keys and values [1, heads, N, width] of each layer;
    all are read at every call. The mode of the FFNs is that of the time at which the step is made.
    """

    def __init__(self, model: Any, last: Tensor, position: Tensor, cache: Sequence[tuple[Tensor, Tensor]]):
        self._model, self._last, self._position = model, last, position
        self._layers = [_Layer(block, *pair) for block, pair in zip(model.transformer.h, cache, strict=True)]
        keys = cache[0][0]
        (_, heads, places, width), d = keys.shape, model.config.n_embd

        def floats(*shape: int) -> Tensor:
            return keys.new_zeros(*shape, dtype=torch.float32)

        self._x, self._query = floats(d), floats(d)
        self._embedded, self._inner = floats(d // COLUMNS, 2), floats(d // MIX["COLUMNS"], 2)
        chunks = -(-places // ATTEND["CHUNK"])
        self._parts, self._sums = floats(heads, chunks, width), floats(heads, chunks, 2)
        self._counters = torch.zeros(d // COLUMNS, dtype=torch.int32, device=keys.device)
        entries, self._rows = len(model.lm_head.weight), rows_of_tile(d, model.lm_head.weight)
        self._logits, self._best = floats(1, entries), floats(-(-entries // self._rows))
        self.likeliest = torch.zeros(1, dtype=torch.long, device=keys.device)
        """[1], the token with the largest logit of the last call."""
        self._early = early_launch(keys)

    def refresh(self) -> None:
        """Take up weights that were changed in place."""
        for layer in self._layers:
            layer.refresh()

    def __call__(self) -> Tensor:
        """Logits [1, V] in float32, in a buffer that the next call overwrites."""
        base, d = self._model.transformer, len(self._x)
        kernels.embed[(d // COLUMNS,)](
            self._last, self._position, base.wte.weight, base.wpe.weight, self._x, self._embedded, D=d, SIZE=COLUMNS
        )
        stats = self._embedded
        for layer in self._layers:
            self._attention(layer, stats)
            stats = self._ffn(layer)
        weight, norm, parts = self._model.lm_head.weight, _norm(base.ln_f, stats), len(self._best)
        kernels.unembed[(parts,)](
            self._x, *norm, weight, self._logits, self._best, self._counters, self.likeliest,
            D=d, DP=next_power_of_2(d), V=len(weight), ROWS=self._rows, PARTS=parts,
            PARTS_PADDED=next_power_of_2(parts), **norm.sizes(d), **self._early,
        )  # fmt: skip
        return self._logits

    def _attention(self, layer: _Layer, stats: Tensor) -> None:
        attention, d = layer.block.attn, len(self._x)
        places, width = layer.keys.shape[2:]
        norm = _norm(layer.block.ln_1, stats)
        kernels.project[(3 * d // PROJECT["COLUMNS"],)](
            self._x, *norm, attention.c_attn.weight, attention.c_attn.bias, self._position,
            self._query, layer.keys, layer.values,
            D=d, W=width, N=places, **_tile(PROJECT, d), **norm.sizes(d), **self._early,
        )  # fmt: skip
        kernels.attend[self._parts.shape[:2]](
            self._query, layer.keys, layer.values, self._position, self._parts, self._sums, attention.scaling,
            W=width, WP=next_power_of_2(width), N=places, CHUNKS=self._parts.shape[1], **ATTEND, **self._early,
        )  # fmt: skip

    def _ffn(self, layer: _Layer) -> Tensor:
        """Returns the new row's statistics."""
        attention, ffn, d = layer.block.attn, layer.ffn, len(self._x)
        norm, experts = _norm(layer.block.ln_2, self._inner), ffn.by_expert()
        products = self._x.new_empty(len(self._inner), ffn.experts)
        kernels.mix[(len(self._inner),)](
            self._parts, self._sums, self._position, attention.c_proj.weight, attention.c_proj.bias,
            self._x, self._inner, ffn.router.expert_vectors(), norm.gain, products,
            D=d, W=self._parts.shape[2], CHUNK=ATTEND["CHUNK"], CHUNKS=self._parts.shape[1], E=ffn.experts,
            EP=next_power_of_2(ffn.experts), SPARSE=layer.sparse, **_tile(MIX, d), **self._early,
        )  # fmt: skip
        choice = layer.choice(products)
        hidden = up(self._x, experts, ffn.activation, choice, norm)
        stats = self._x.new_empty(d // columns_of(choice), 2)
        down(
            hidden, experts, choice, self._x, norm=norm, b_out=ffn.b_out, stats=stats, counters=self._counters
        )  # fmt: skip
        return stats


def _tile(sizes: dict[str, int], d_model: int) -> dict[str, int]:
    return {**sizes, "ROWS": min(sizes["ROWS"], next_power_of_2(d_model))}


def _norm(norm: Any, stats: Tensor) -> Norm:
    return Norm(stats, norm.weight, norm.bias, norm.eps)
