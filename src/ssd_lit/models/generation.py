"""Greedy generation with a causal model of Transformers in either mode, one token a step, without waiting for the host.

On a GPU reading a prompt is one CUDA graph, a step another. Shape letters: B batch, S tokens of the prompt, N places of
the cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from ssd_lit.moe.backends import Activation
from ssd_lit.moe.ffn import ExpertFFN

BLOCKS = 32
"""Blocks of a matrix."""


@contextmanager
def row_products(model: nn.Module) -> Iterator[None]:
    """Within this context a model's linear maps and dense FFNs take single float32 rows in blocks; inference only."""
    changed = []
    for module in model.modules():
        forward = _forward(module)
        if forward is not None:
            module.forward = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w.T + b: x [..., D], w [F, D], b [F]."""
    if not _in_blocks(x, w):
        return F.linear(x, w, b)
    blocks = w.view(BLOCKS, -1, w.shape[1]).transpose(1, 2)  # [BLOCKS, D, F / BLOCKS]
    row = x.reshape(1, -1).expand(BLOCKS, 1, -1)
    y = torch.bmm(row, blocks) if b is None else torch.baddbmm(b.view(BLOCKS, 1, -1), row, blocks)
    return y.view(*x.shape[:-1], -1)


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w + b: x [..., F], w [F, D], b [D]."""
    if _in_blocks(x, w):
        y = torch.bmm(x.reshape(BLOCKS, 1, -1), w.view(BLOCKS, -1, w.shape[1])).sum(0).view(*x.shape[:-1], -1)
    else:
        y = x @ w
    return y if b is None else y + b


def _in_blocks(x: Tensor, w: Tensor) -> bool:
    """Whether x is one row that all cores should share."""
    one = x.numel() == x.shape[-1] and x.dtype == torch.float32 and x.device.type == "cpu"
    return one and len(w) % BLOCKS == 0


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if isinstance(module, nn.Linear):
        return partial(linear, w=module.weight, b=module.bias)
    if isinstance(module, Conv1D):
        return partial(product, w=module.weight, b=module.bias)
    if isinstance(module, ExpertFFN) and module.mode == "dense":
        return partial(_dense, module)
    return None


def _dense(ffn: ExpertFFN, x: Tensor) -> Tensor:
    gate = None if ffn.w_gate is None else linear(x, ffn.w_gate, ffn.b_gate)
    hidden = Activation(ffn.activation)(linear(x, ffn.w_in, ffn.b_in), gate)
    return product(hidden, ffn.w_out, ffn.b_out)


class Generator:
    """Continues prompts by the likeliest tokens.

    `start(prompt)` reads a prompt, `advance(n)` adds n tokens, and calling the generator does both. With `compiled`,
    the step goes through torch.compile first. Graphs are made once for a shape of prompt and a mode and used again from
    then on. End-of-text does not stop it.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False):
        self.model: Any = model.eval()
        self._ffns = [module for module in model.modules() if isinstance(module, ExpertFFN)]
        self._compiled = compiled
        self._forward: Callable[..., Any] = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._made_for: tuple[Any, ...] | None = None

    def __call__(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """The prompts and what follows them: [B, S] -> [B, S + new_tokens].

        Raises ValueError if that is more than the model's positions.
        """
        if new_tokens < 1:
            return prompt
        self.start(prompt, new_tokens)
        self.advance(new_tokens - 1)
        return self.tokens

    @property
    def tokens(self) -> Tensor:
        """The prompts and what followed them so far."""
        return self._tokens[:, : self._seen + 1].clone()

    @torch.inference_mode()
    def start(self, prompt: Tensor, new_tokens: int) -> None:
        """Read prompts [B, S], find the first token after them and make room for `new_tokens`."""
        length, places = prompt.shape[1], prompt.shape[1] + new_tokens
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and places > longest:
            raise ValueError(f"{length} + {new_tokens} tokens: this model has {longest} positions")
        self._prepare(prompt, places)
        self._tokens[:, :length] = prompt
        if self._reading is not None:
            self._reading.replay()
        else:
            self._read(length)
        self.rewind(length)

    @torch.inference_mode()
    def rewind(self, length: int) -> None:
        """Go back to where the texts had that many tokens before their last one."""
        self._last.copy_(self._tokens[:, length, None])
        self._position.fill_(length)
        self._seen = length

    @torch.inference_mode()
    def advance(self, steps: int) -> None:
        """Add `steps` tokens to every text."""
        if self._graph is not None:
            for _ in range(steps):
                self._graph.replay()
            self._seen += steps
            return
        with nullcontext() if self._compiled else row_products(self.model):
            for _ in range(steps):
                self._seen += 1
                if not self._compiled:
                    self._cache.seen = self._seen
                self._step()

    def _prepare(self, prompt: Tensor, places: int) -> None:
        """Buffers of fixed addresses, and the graphs that work on them."""
        wanted = (prompt.shape, places, tuple((ffn.mode, ffn.top_k, ffn.backend) for ffn in self._ffns))
        if wanted == self._made_for:
            return
        self._made_for = wanted
        (batch, length), device = prompt.shape, prompt.device
        self._tokens = torch.zeros(batch, places, dtype=torch.long, device=device)
        self._last = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._slots = torch.arange(places, device=device)
        # One token tells the shapes of keys and values.
        like = self.model(input_ids=prompt[:, :1], use_cache=True).past_key_values
        self._cache = _FixedCache(like, places, self._position)
        on_gpu = device.type == "cuda"
        self._graph = self._captured(self._step) if on_gpu else None
        self._reading = self._captured(lambda: self._read(length)) if on_gpu else None

    def _read(self, length: int) -> None:
        """The first `length` tokens in one forward pass: their keys and values, and the token after them."""
        read = self.model(input_ids=self._tokens[:, :length], use_cache=True, logits_to_keep=1)
        for mine, layer in zip(self._cache.places, read.past_key_values.layers, strict=True):
            mine[0][:, :, :length] = layer.keys
            mine[1][:, :, :length] = layer.values
        self._tokens[:, length] = read.logits[:, -1].argmax(dim=-1)

    def _step(self) -> None:
        seen = self._slots[: self._cache.seen] <= self._position
        out = self._forward(
            input_ids=self._last,
            position_ids=self._position.expand(len(self._last), 1),
            attention_mask=seen.expand(len(self._last), 1, 1, -1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._last.copy_(out.logits[:, -1].argmax(dim=-1, keepdim=True))
        self._position.add_(1)
        self._tokens.index_copy_(1, self._position, self._last)

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and tunes what has to be
                self._position.zero_()
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._position.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


class _FixedCache(Cache):
    """Keys and values of N places whose addresses stay; the model writes those of one token at `position`."""

    def __init__(self, like: Any, places: int, position: Tensor):
        super().__init__(layers=[])
        self.places = [
            tuple(part.new_zeros(*part.shape[:2], places, part.shape[3]) for part in (layer.keys, layer.values))
            for layer in like.layers
        ]
        self.position = position
        self.seen = places
        """Places that attention looks at; a graph looks at all of them, since it does the same at every step."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Add a token's keys and values [B, heads, 1, width] to a layer's."""
        keys, values = self.places[layer_idx]
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.position
