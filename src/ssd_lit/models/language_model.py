"""The model of training and evaluation: a backbone whose FFNs are ExpertFFNs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from ssd_lit.config import ModelConfig, MoEConfig, TrainingConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import IGNORED, Batch
from ssd_lit.models.family import family, swap_ffns
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import Mode

WHOLE_BLOCKS = "whole_blocks"
LAYER_KINDS = 4
"""Most kinds of layers in a model: the first and the others, of encoder and decoder."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention without a mask, causal where the module is, or over a window where it has one."""
    assert attention_mask is None, "blocks have no padding"
    window, length = settings.get("sliding_window"), query.shape[2]
    mask = None
    if window is not None and length > window:
        places = torch.arange(length, device=query.device)
        distance = places[:, None] - places
        mask = ((distance >= 0) & (distance < window))[None, None]
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **settings)
    return output


# No mask function is registered under that name, so Transformers builds no masks.
AttentionInterface.register(WHOLE_BLOCKS, _attend)


def attend_whole_blocks(backbone: Any) -> None:
    """Let a backbone attend without mask tensors, unless it is an encoder-decoder."""
    if not backbone.config.is_encoder_decoder:  # T5 adds a bias for every pair of places
        backbone.set_attn_implementation(WHOLE_BLOCKS)


def attend_beside_padding(backbone: Any) -> None:
    """Let a backbone attend with the masks it is given, for padded texts."""
    backbone.set_attn_implementation("sdpa")


class LanguageModel(nn.Module):
    """A language model of any family that switches between dense and sparse mode as a whole.

    `forward(batch) -> logits [B, S, V]`, or None without the `head`, often the most expensive layer. A batch
    {"inputs": [B, S], "targets": [B, S']} comes from the family's objective; S' is S except for an encoder-decoder.
    `router` is the name of the router, by default the config's; with `upcycled` every expert is a copy of the whole
    FFN. Without `read_weights` a pretrained checkpoint gives the shape only.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        vocab: VocabInfo,
        *,
        context: int,
        router: str | None = None,
        upcycled: bool = False,
        read_weights: bool = True,
    ):
        super().__init__()
        kind = family(config.family)
        self.objective_name = kind.objective
        self.backbone: Any
        if config.pretrained is None or not read_weights:
            self.backbone = kind.build(config, vocab, context)
        else:
            self.backbone = kind.load(Path(config.pretrained))
            _check_vocabulary(self.backbone, config.pretrained, vocab, context)
        # Training and scoring use no cache; the config of a folder may turn it on.
        self.backbone.config.use_cache = False
        attend_whole_blocks(self.backbone)
        # A plain tuple: the backbone already registers these modules.
        self._ffns = swap_ffns(self.backbone, kind, moe, router=router or moe.router, upcycled=upcycled)
        self._cross_entropy: Callable[[Tensor, Batch], Tensor] = cross_entropy
        self._graphs = False

    @property
    def ffns(self) -> Sequence[ExpertFFN]:
        """The FFNs, first layer first, an encoder's before a decoder's."""
        return self._ffns

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The Transformer layers, in the order in which the model runs them."""
        return [module for module in self.backbone.modules() if isinstance(module, GradientCheckpointingLayer)]

    def train_as(self, training: TrainingConfig) -> None:
        """Compute activations again, and run compiled code, where a config says so."""
        if training.activation_checkpointing:
            self.checkpoint_activations()
        if training.compile:
            self.compile_layers(graphs=not training.shard)

    def checkpoint_activations(self) -> None:
        """From now on compute the activations of each layer again in the backward pass instead of keeping them."""
        for layer in self.layers:
            # Inside of what is compiled, where Transformers puts it outside in some versions.
            layer.forward = _checkpointed(layer.forward)

    def compile_layers(self, *, graphs: bool = True) -> None:
        """From now on run the compiled code of each layer, and of `loss`; after `checkpoint_activations`, if at all.

        All layers share their code, so that a mode, and each k, is compiled in the time of one layer, however deep the
        model is. With `graphs` a GPU runs CUDA graphs of each layer's forward and backward pass: a sparse layer is a
        dozen short kernels, and launching them one by one would keep it waiting. Those that read weights at other
        places in every step, as sharded ones do, go without.
        """
        # Beyond its limits torch would run uncompiled. It counts the layers of an encoder-decoder together.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, LAYER_KINDS * (self._ffns[0].experts + 1))
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
        # What a learned router keeps of a forward pass need not be kept once more where activations are computed again.
        dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        self._graphs = graphs and torch.cuda.is_available()
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, mode="reduce-overhead" if self._graphs else None)
        # So that the logits of a large vocabulary need not be held in float32.
        self._cross_entropy = torch.compile(cross_entropy)

    def set_mode(self, mode: Mode, top_k: int | None = None, threshold: float | None = None) -> None:
        """Put every FFN into dense mode, or sparse mode with `top_k` experts a token or dynamic k."""
        for ffn in self._ffns:
            ffn.set_mode(mode, top_k, threshold)

    def forward(self, batch: Batch, *, head: bool = True) -> Any:
        if self._graphs:
            # Graphs of earlier passes may be written over from here on.
            torch.compiler.cudagraph_mark_step_begin()
        output = self._run(self.backbone if head else self.backbone.base_model, batch)
        return output.logits if head else None

    def _run(self, module: Any, batch: Batch) -> Any:
        extra = {"decoder_input_ids": self.decoder_inputs(batch)} if self.objective_name == "spans" else {}
        return module(input_ids=batch["inputs"], **extra)

    def decoder_inputs(self, batch: Batch) -> Tensor:
        """The inputs [B, S'] of the decoder of an encoder-decoder: the targets, shifted by one."""
        shifted: Tensor = self.backbone.prepare_decoder_input_ids_from_labels(batch["targets"])
        return shifted

    def loss(self, batch: Batch) -> Tensor:
        """`cross_entropy` of the model's logits."""
        return self._cross_entropy(self(batch), batch)

    def gate_losses(self) -> Tensor:
        """Load-balancing loss and z-loss [2] of the last sparse training pass, averaged over layers.

        Only with a learned router.
        """
        losses = [torch.stack(ffn.gate_losses) for ffn in self._ffns if ffn.gate_losses is not None]
        return torch.stack(losses).mean(dim=0)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **settings: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **settings)

    return run


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of logits [B, S', V] over the targets that are not IGNORED."""
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=IGNORED)


def _check_vocabulary(backbone: Any, folder: str, vocab: VocabInfo, context: int) -> None:
    rows = backbone.get_input_embeddings().weight.shape[0]
    if rows < vocab.vocab_size:
        raise ValueError(
            f"model.pretrained {folder}: embeds {rows} tokens, but the tokenizer has {vocab.vocab_size}; "
            "give its own tokenizer as data.tokenizer.folder"
        )
    longest = getattr(backbone.config, "max_position_embeddings", None)
    if longest is not None and longest < context:
        raise ValueError(f"model.pretrained {folder}: reads {longest} tokens, less than data.sequence_length {context}")
