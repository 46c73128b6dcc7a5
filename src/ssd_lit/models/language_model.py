"""A backbone with its FFNs swapped: what training and evaluation hold in their hands."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.models import gpt2
from ssd_lit.moe.ffn import ExpertFFN, Mode

FAMILIES = {"gpt2": gpt2}


class LanguageModel(nn.Module):
    """A causal language model that switches between dense and sparse mode as a whole.

    `forward(tokens [B, S]) -> logits [B, S, V]`.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, *, vocab_size: int, context: int, end_of_text: int):
        super().__init__()
        family = FAMILIES[config.family]
        self.backbone = family.build(config, vocab_size=vocab_size, context=context, end_of_text=end_of_text)
        # A plain list: the backbone already registers these modules.
        self._ffns = tuple(family.swap_ffns(self.backbone, moe))

    @property
    def ffns(self) -> Sequence[ExpertFFN]:
        """The FFNs, first layer first."""
        return self._ffns

    def set_mode(self, mode: Mode, top_k: int | None = None) -> None:
        """Put every FFN into dense mode, or sparse mode with `top_k` experts a token."""
        for ffn in self._ffns:
            ffn.set_mode(mode, top_k)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.backbone(input_ids=tokens, use_cache=False).logits
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all tokens; inputs and targets [B, S]."""
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())
