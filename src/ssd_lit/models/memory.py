"""Memory of training, estimated from fake tensors: no device is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd_lit.config import ModelConfig, MoEConfig, RunConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import build_objective
from ssd_lit.models.family import family
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.support.processes import this_process

MEMORY_FRACTION = 0.95
"""Fraction of a GPU's memory that training may take by the estimate (docs/performance.md, "Several GPUs")."""
STATE_BYTES = 16
"""Bytes of a parameter with its gradient and Adam's two moments, in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on a device: those of the state, and those of each block that is computed at once."""

    parameters: int
    casts: float
    """Weights in the precision of the products."""
    layers: float
    """Activations of all layers that the backward pass needs, for a block."""
    layer: float
    """Those of one layer."""
    between: float
    """The inputs of all layers, for a block: what is kept if activations are computed again."""
    logits: float
    """Logits and their gradient, for a block."""
    gathered: float
    """Weights and gradients that a device holds whole at once where the model is divided."""

    def of_step(self, blocks: int, *, shards: int = 1, checkpointing: bool = False, graphs: int = 1) -> float:
        """All bytes of a device that computes so many blocks at once.

        Its state is divided among `shards` devices, which then gather it layer by layer. CUDA graphs of different
        modes, `graphs` of them, each keep memory of their own for activations and logits.
        """
        state = (STATE_BYTES * self.parameters + self.casts) / shards + (self.gathered if shards > 1 else 0)
        kept = self.between + self.layer if checkpointing else self.layers
        return state + graphs * blocks * (kept + self.logits)


@cache
def training_memory(
    model: ModelConfig, moe: MoEConfig, vocab: VocabInfo, sequence_length: int, dtype: torch.dtype
) -> Memory:
    """The memory of training in dense mode, which takes more than sparse mode.

    Counts the tensors that autograd saves in an uncompiled forward pass; compiled code computes some of them again
    instead.
    """
    with FakeTensorMode():
        fake = LanguageModel(model, moe, vocab, context=sequence_length, read_weights=False)
        lengths = build_objective(family(model.family).objective, vocab).lengths(sequence_length)
        sizes = []
        for blocks in (1, 2):
            inputs, targets = (torch.zeros(blocks, length, dtype=torch.long) for length in lengths)
            with _saved(fake) as saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                fake({"inputs": inputs, "targets": targets}, head=False)
            sizes.append(float(sum(saved.values())))
    layers = sizes[1] - sizes[0]
    between = float(len(fake.layers) * max(lengths) * model.d_model * dtype.itemsize)
    # The loss and its gradient are one pass over the logits.
    logits = 2.0 * lengths[1] * vocab.vocab_size * dtype.itemsize
    parameters, layer = _parameters(fake), max(map(_parameters, fake.layers))
    outside = parameters - sum(map(_parameters, fake.layers))
    return Memory(
        parameters=parameters,
        casts=sizes[0] - layers,
        layers=layers,
        layer=layers / len(fake.layers),
        between=between,
        logits=logits,
        # In float32: two layers and the gradients of two, and all outside the layers with its gradients.
        gathered=4.0 * (4 * layer + 2 * outside),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def memory_of_run(config: RunConfig, vocab: VocabInfo) -> Memory:
    """The memory of the training of a run; of copies of FFNs all parameters, but the activations of one."""
    dtype, length = (
        torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        config.data.sequence_length,
    )
    memory = training_memory(config.model, config.moe, vocab, length, dtype)
    if config.method != "upcycle":
        return memory
    with FakeTensorMode():
        fake = LanguageModel(config.model, config.moe, vocab, context=length, upcycled=True, read_weights=False)
    return replace(memory, parameters=_parameters(fake))


def memory_of_device(config: RunConfig, vocab: VocabInfo, blocks: int) -> float:
    """Bytes that a device of a run takes which computes so many blocks at once."""
    training = config.training
    return memory_of_run(config, vocab).of_step(
        blocks,
        shards=training.processes if training.shard else 1,
        checkpointing=training.activation_checkpointing,
        graphs=2 if config.method == "ssd" and training.compile and not training.shard else 1,
    )


def largest_micro_batch(config: RunConfig, vocab: VocabInfo, memory: float) -> int:
    """The most blocks that by estimate fit so many bytes of a device, a divisor of its part of the batch; at least 1.

    A function of the config and the kind of GPU, so that a run that is resumed computes the same pieces.
    """
    whole = config.training.local_batch_size
    sizes = [n for n in range(1, whole + 1) if whole % n == 0]
    return max([n for n in sizes if memory_of_device(config, vocab, n) <= MEMORY_FRACTION * memory], default=1)


def blocks_at_once(config: RunConfig, vocab: VocabInfo) -> int:
    """The blocks that a device of this machine computes at once: the config's, else the most whose memory it has."""
    training = config.training
    if training.micro_batch_size is not None or not torch.cuda.is_available():
        return training.micro_batch_size or training.local_batch_size
    memory, whole = torch.cuda.get_device_properties(0).total_memory, training.local_batch_size
    size = largest_micro_batch(config, vocab, memory)
    if size < whole and this_process().is_first:
        print(f"{config.name}: {size} of {whole} blocks at once, for {memory / 2**30:.0f} GiB", flush=True)
    return size


@contextmanager
def _saved(model: LanguageModel) -> Iterator[dict[int, int]]:
    """Yields the sizes in bytes of what autograd saves, weights apart, each piece of memory once."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
