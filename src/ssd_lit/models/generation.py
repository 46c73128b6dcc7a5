"""Generation with a causal model of Transformers in either mode, one token a step, without waiting for the host.

On a GPU, reading a prompt is one CUDA graph and a step another, of kernels of our own where the family has them
(`models.decoding`). Shape letters: B batch, S tokens of the prompt, N
places of the cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from ssd_lit.models.sampling import Sampling
from ssd_lit.models.text import check_causal, stream
from ssd_lit.moe.backends import Activation
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.kernels import runs_on
from ssd_lit.moe.statistics import mean_k

BLOCKS = 32
"""Blocks into which a matrix is cut."""


@contextmanager
def row_products(model: nn.Module) -> Iterator[None]:
    """In this context a model's linear maps and dense FFNs compute single float32 rows in blocks; inference only.

    Those whose `forward` is not their class's, such as offloaded ones, are left alone.
    """
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
    """Whether x is one row whose product is worth spreading over all cores."""
    is_row = x.numel() == x.shape[-1] and x.dtype == torch.float32 and x.device.type == "cpu"
    return is_row and len(w) % BLOCKS == 0


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if "forward" in vars(module):
        return None
    # A class of its own, such as an adapter's, has a forward of its own.
    if type(module) is nn.Linear:
        return partial(linear, w=module.weight, b=module.bias)
    if type(module) is Conv1D:
        return partial(product, w=module.weight, b=module.bias)
    if type(module) is ExpertFFN and module.mode == "dense":
        return partial(_dense, module)
    return None


def _dense(ffn: ExpertFFN, x: Tensor) -> Tensor:
    gate = None if ffn.w_gate is None else linear(x, ffn.w_gate, ffn.b_gate)
    hidden = Activation(ffn.activation)(linear(x, ffn.w_in, ffn.b_in), gate)
    return product(hidden, ffn.w_out, ffn.b_out)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """In this context a model is in evaluation mode; then each module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Generator:
    """Continues prompts, with the likeliest tokens unless `sampling` says otherwise.

    `start` reads prompts, `advance` adds tokens, and calling the generator does both, one text or batch after the
    other. With `compiled`, a step that has no kernels of its own goes through torch.compile first. Graphs are made once
    for a shape of prompt and a mode, then reused. End-of-text does not stop tokens; with a `tokenizer`, of Transformers
    or of tokenizers, it takes and gives text, which ends there. The model generates without dropout and is left in
    training mode if it was; of its generation_config only end-of-text is read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        compiled: bool = False,
    ):
        self.model: Any = model
        self.starts = 0
        """How often `start` was called."""
        self.tokenizer = tokenizer
        self._choose = sampling
        self._ffns = [module for module in model.modules() if isinstance(module, ExpertFFN)]
        self._compiled = compiled
        self._forward: Callable[..., Any] = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._prepared_for: tuple[Any, ...] | None = None

    @overload
    def __call__(self, prompt: Tensor, new_tokens: int) -> Tensor: ...

    @overload
    def __call__(self, prompt: str, new_tokens: int) -> str: ...

    def __call__(self, prompt: Tensor | str, new_tokens: int) -> Tensor | str:
        """The prompts and their continuations: [B, S] -> [B, S + new_tokens], or one text to a longer one.

        Raises ValueError if the model has fewer positions, or attends to a shorter window.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, new_tokens))
        if new_tokens < 1:
            return prompt
        self.start(prompt, new_tokens)
        self.advance(new_tokens - 1)
        return self.tokens

    def stream(self, prompt: str, new_tokens: int) -> Iterator[str]:
        """The text that follows a prompt, piece by piece: see `ssd_lit.models.text.stream`."""
        if self.tokenizer is None:
            raise ValueError("this generator was made without a tokenizer, so it takes tokens only")
        return stream(self, self.tokenizer, prompt, new_tokens)

    @property
    def tokens(self) -> Tensor:
        """The prompts and their continuations so far."""
        return self._tokens[:, : self._length + 1].clone()

    @property
    def mean_k(self) -> float | None:
        """With dynamic k: experts a token, averaged over FFNs and all tokens that the model read since the prompts.

        It is `ssd_lit.mean_k`, whose count begins anew behind the prompts. None without dynamic k, or before `advance`.
        Waits for the device.
        """
        return mean_k(self._ffns) if self._ffns and self.starts else None

    @torch.inference_mode()
    def start(self, prompt: Tensor, new_tokens: int) -> None:
        """Read prompts [B, S], find the first token after them and make space for `new_tokens`.

        Raises ValueError if there is nothing to read, or no space, or for a model that does not continue text.
        """
        check_causal(self.model)
        length, places = prompt.shape[1], prompt.shape[1] + new_tokens
        if not length:
            raise ValueError("a prompt without tokens: there is nothing to continue")
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and places > longest:
            raise ValueError(f"{length} + {new_tokens} tokens: this model has {longest} positions")
        window = getattr(self.model.config, "sliding_window", None)
        if window is not None and places > window:
            raise ValueError(
                f"{length} + {new_tokens} tokens: more than the window of {window} that this model attends to"
            )
        self.starts += 1
        with _without_dropout(self.model):
            self._prepare(prompt, places)
            self._tokens[:, :length] = prompt
            if self._reading is not None:
                self._reading.replay()
            else:
                self._read(length)
        self.rewind(length)

    @torch.inference_mode()
    def rewind(self, length: int) -> None:
        """Go back to texts of `length` + 1 tokens."""
        for ffn in self._ffns:
            if ffn.threshold is not None:
                ffn.tally.zero_()
        self._last.copy_(self._tokens[:, length, None])
        self._position.fill_(length)
        self._length = length

    @torch.inference_mode()
    def advance(self, steps: int) -> None:
        """Add `steps` tokens to each text. Raises ValueError if `start` made no space for so many."""
        if self._length + steps >= self._tokens.shape[1]:
            left = self._tokens.shape[1] - self._length - 1
            raise ValueError(f"{steps} more tokens: there is space for {left}")
        if self._graph is not None:
            for _ in range(steps):
                self._graph.replay()
            self._length += steps
            return
        with _without_dropout(self.model), nullcontext() if self._compiled else row_products(self.model):
            for _ in range(steps):
                self._length += 1
                if not self._compiled:
                    self._cache.visible = self._length
                self._step()

    def _prepare(self, prompt: Tensor, places: int) -> None:
        """Make buffers of fixed addresses, and graphs over them."""
        first = next(self.model.parameters())
        where = (prompt.device, first.dtype, first.data_ptr())
        choices = tuple((ffn.mode, ffn.top_k, ffn.threshold, ffn.backend) for ffn in self._ffns)
        key = (prompt.shape, places, where, choices)
        if key == self._prepared_for:
            return
        self._prepared_for = None
        (batch, length), device = prompt.shape, prompt.device
        self._tokens = torch.zeros(batch, places, dtype=torch.long, device=device)
        self._last = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._slots = torch.arange(places, device=device)
        # A forward pass over one token, for the shapes of keys and values.
        like = self.model(input_ids=prompt[:, :1], use_cache=True).past_key_values
        self._cache = _FixedCache(like, places, self._position)
        on_gpu = device.type == "cuda"
        self._kernels = None
        if on_gpu and batch == 1 and runs_on(prompt):
            from ssd_lit.models.decoding.gpt2 import GPT2Step, can_step

            if can_step(self.model):
                self._kernels = GPT2Step(self.model, self._last, self._position, self._cache.places)
        self._graph = self._captured(self._step) if on_gpu else None
        self._reading = self._captured(lambda: self._read(length)) if on_gpu else None
        self._prepared_for = key

    def _read(self, length: int) -> None:
        """Fill the cache from the first `length` tokens in one forward pass, and add the token after them."""
        if self._kernels is not None:
            self._kernels.refresh()
        out = self.model(input_ids=self._tokens[:, :length], use_cache=True, logits_to_keep=1)
        for (keys, values), layer in zip(self._cache.places, out.past_key_values.layers, strict=True):
            keys[:, :, :length] = layer.keys
            values[:, :, :length] = layer.values
        self._tokens[:, length] = self._choose(out.logits[:, -1])

    def _step(self) -> None:
        logits = self._logits() if self._kernels is None else self._kernels()
        if self._kernels is not None and self._choose.temperature == 0:
            token = self._kernels.likeliest
        else:
            token = self._choose(logits)
        self._last.copy_(token[:, None])
        self._position.add_(1)
        self._tokens.index_copy_(1, self._position, self._last)

    def _logits(self) -> Tensor:
        mask = self._slots[: self._cache.visible] <= self._position
        out = self._forward(
            input_ids=self._last,
            position_ids=self._position.expand(len(self._last), 1),
            attention_mask=mask.expand(len(self._last), 1, 1, -1),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # warm-up: compiles and tunes
                self._position.zero_()
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._position.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


class _FixedCache(Cache):
    """Keys and values of N places at fixed addresses; the model writes those of one token at `position`."""

    def __init__(self, like: Any, places: int, position: Tensor):
        super().__init__(layers=[])
        self.places = [
            tuple(part.new_zeros(*part.shape[:2], places, part.shape[3]) for part in (layer.keys, layer.values))
            for layer in like.layers
        ]
        self.position = position
        self.visible = places
        """Places that attention reads; a graph always reads all of them, since its shapes are fixed."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Add a token's keys and values [B, heads, 1, width] to a layer's."""
        keys, values = self.places[layer_idx]
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.position
