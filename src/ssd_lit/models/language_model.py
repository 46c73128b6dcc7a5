"""A backbone with its FFNs swapped: what training and evaluation hold in their hands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import IGNORED, Batch
from ssd_lit.models.family import family, swap_ffns
from ssd_lit.moe.ffn import ExpertFFN, Mode

WHOLE_BLOCKS = "whole_blocks"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention without a mask, causal where the module is."""
    assert attention_mask is None, "blocks have no padding"
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **settings)
    return found


# No mask is registered under that name: Transformers then builds none.
AttentionInterface.register(WHOLE_BLOCKS, _attend)


def attend_whole_blocks(backbone: Any) -> None:
    """Let a backbone attend without masks, wherever the kernels give the mask of its own attention by themselves."""
    if not backbone.config.is_encoder_decoder:  # T5's has a bias for every pair of places
        backbone.set_attn_implementation(WHOLE_BLOCKS)


def attend_beside_padding(backbone: Any) -> None:
    """Let a backbone attend with the masks that it is given, for texts that are filled up to one length."""
    backbone.set_attn_implementation("sdpa")


class LanguageModel(nn.Module):
    """A language model of any family that switches between dense and sparse mode as a whole.

    `forward(batch) -> logits [B, S, V]`, where a batch {"inputs": [B, S], "targets": [B, S']} comes from the family's
    objective; S' is S except for an encoder with a decoder. `router` names what chooses experts, the config's own if
    None; with `upcycled` every expert is a copy of the whole FFN. A pretrained checkpoint's weights may be left unread.
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
        # Training and scoring read no cache; a folder's own config may ask for one.
        self.backbone.config.use_cache = False
        attend_whole_blocks(self.backbone)
        # A plain tuple: the backbone already registers these modules.
        self._ffns = swap_ffns(self.backbone, kind, moe, router=router or moe.router, upcycled=upcycled)

    @property
    def ffns(self) -> Sequence[ExpertFFN]:
        """The FFNs, first layer first, an encoder's before a decoder's."""
        return self._ffns

    def set_mode(self, mode: Mode, top_k: int | None = None) -> None:
        """Put every FFN into dense mode, or sparse mode with `top_k` experts a token."""
        for ffn in self._ffns:
            ffn.set_mode(mode, top_k)

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self._read(self.backbone, batch).logits
        return logits

    def run_layers(self, batch: Batch) -> None:
        """A forward pass for what is seen on the way; leaves out the head, the most expensive layer, if it can."""
        self._read(self.backbone.base_model, batch)

    def _read(self, reader: Any, batch: Batch) -> Any:
        extra = {}
        if self.objective_name == "spans":
            extra["decoder_input_ids"] = self.decoder_inputs(batch)
        return reader(input_ids=batch["inputs"], **extra)

    def decoder_inputs(self, batch: Batch) -> Tensor:
        """What the decoder of an encoder-decoder reads, [B, S']: the targets, one place later."""
        shifted: Tensor = self.backbone.prepare_decoder_input_ids_from_labels(batch["targets"])
        return shifted

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats over all targets but the ignored ones."""
        return F.cross_entropy(self(batch).flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=IGNORED)

    def gate_losses(self) -> Tensor:
        """Load-balancing loss and z-loss [2] of the last sparse forward pass in training, averaged over layers.

        Only with a learned router.
        """
        losses = [torch.stack(ffn.gate_losses) for ffn in self._ffns if ffn.gate_losses is not None]
        return torch.stack(losses).mean(dim=0)


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
