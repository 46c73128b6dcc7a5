"""Model families: how a backbone is built and read, and where its FFNs are."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.config.pretrained import (
    SAME_ACTIVATION,
    WRAPPERS,
    check_shared_embeddings,
    check_weights,
    has_tied_head,
    model_settings,
    stored_tensors,
)
from ssd_lit.data.index import VocabInfo
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.permutation import upcycle_into
from ssd_lit.moe.routers import Router, build_router

NO_WEIGHTS = (
    r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|position_ids|pooler\.dense\.\w+|cls\.seq_relationship\.\w+)$"
)
"""Tensors of weight files that need not be read: computed masks and positions, and BERT's pooler and next-sentence
head, which its masked-token head does not use."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Precisions by their names in safetensors."""


@dataclass(frozen=True)
class FFNParts:
    """The weights of one FFN, neuron by neuron: w_in, w_gate and w_out [F, D], b_in and b_gate [F], b_out [D]."""

    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    b_gate: Tensor | None = None

    @classmethod
    def of(cls, ffn: ExpertFFN) -> "FFNParts":
        return cls(ffn.w_in, ffn.w_out, ffn.w_gate, ffn.b_in, ffn.b_out, ffn.b_gate)

    @torch.no_grad()
    def copy_to(self, ffn: ExpertFFN) -> None:
        """Give an ExpertFFN of the same shape these weights."""
        for part in fields(self):
            weight = getattr(self, part.name)
            if weight is not None:
                getattr(ffn, part.name).copy_(weight)


class Weight(NamedTuple):
    """The parameter of a layer that holds a part of its FFN."""

    name: str
    transposed: bool = False
    """Whether its shape is [D, F]: neurons are columns."""


class FFNSite:
    """An FFN of a backbone.

    `layer` is the name of a layer inside the backbone's base model, `weights` the layer's parameter for each part of
    FFNParts, and `modules` what an ExpertFFN replaces: the first becomes the FFN, the others the identity.
    """

    def __init__(
        self,
        backbone: Any,
        layer: str,
        weights: Mapping[str, Weight],
        modules: Sequence[str],
        *,
        activation: str,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ):
        # The names of a base model without a head have no prefix.
        prefix = "" if backbone.base_model is backbone else f"{backbone.base_model_prefix}."
        self._backbone = backbone
        self._modules = [f"{prefix}{layer}.{name}" for name in modules]
        self.weights = {part: Weight(f"{prefix}{layer}.{name}", turned) for part, (name, turned) in weights.items()}
        """The backbone's parameter for each part."""
        self.activation = SAME_ACTIVATION.get(activation, activation)
        self.dropout = dropout
        """Dropout probability of the output inside the replaced modules."""
        self.hidden_dropout = hidden_dropout
        """Dropout probability of the activations."""

    def read(self) -> FFNParts:
        """The backbone's weights; transposed ones are views."""
        values = {part: (self._backbone.get_parameter(name), turned) for part, (name, turned) in self.weights.items()}
        return FFNParts(**{part: value.T if turned else value for part, (value, turned) in values.items()})

    def state(self, parts: FFNParts) -> dict[str, Tensor]:
        """The parts under the backbone's names and in its layout."""
        values = {name: (getattr(parts, part), turned) for part, (name, turned) in self.weights.items()}
        return {name: (value.T if turned else value).detach() for name, (value, turned) in values.items()}

    def install(self, ffn: ExpertFFN) -> None:
        """Replace the FFN by `ffn`."""
        first, *others = self._modules
        self._backbone.set_submodule(first, ffn)
        for other in others:
            self._backbone.set_submodule(other, nn.Identity())


@dataclass(frozen=True)
class Family:
    """A model family."""

    objective: Literal["causal", "masked", "spans"]
    """Training objective."""
    model_class: Any
    """The Transformers class, with the head for that objective."""
    base_class: Any
    """The class without a head."""
    head: str
    """Name of the head in `model_class`."""
    config: Callable[[ModelConfig, VocabInfo, int], Any]
    """The Transformers config of a fresh model, for blocks of a number of tokens."""
    sites: Callable[[Any], Sequence[FFNSite]]
    """The FFNs of a backbone, with any head or none: first layer first, an encoder's before a decoder's."""
    dispensable: Mapping[str, str] = field(default_factory=dict)
    """Modules that a base model may lack, each with the argument of its class that turns it off."""

    def build(self, config: ModelConfig, vocab: VocabInfo, context: int) -> nn.Module:
        """Returns a backbone with fresh weights, of the shape of the checkpoint folder if the config names one."""
        if config.pretrained is None:
            fresh: nn.Module = self.model_class(self.config(config, vocab, context))
            return fresh
        folder = Path(config.pretrained)
        backbone: nn.Module = self.model_class(self._config_of(folder))
        self._separate_head(backbone, folder)
        return backbone

    def load(self, folder: Path) -> nn.Module:
        """Returns the backbone of a checkpoint folder, in float32 and training mode; a missing head is initialised.

        Raises ValueError if other weights are missing.
        """
        return self._read(folder, self.model_class, torch.float32, may_lack=self.head).train()

    def open(self, folder: Path) -> nn.Module:
        """Returns the model of a checkpoint folder as it was saved, in the precision of its weight files.

        Its class is the one in config.json. If that is no class of this family in Transformers, or is the base class,
        the weights decide: the class with the family's head if they have that head, else the base class. Raises
        ValueError if weights are missing, or if there are some that the model does not have.
        """
        return self._read(folder, self._class_of(folder), _stored_dtype(folder)).eval()

    def _config_of(self, folder: Path) -> Any:
        try:
            config = self.model_class.config_class.from_dict(model_settings(folder))
        except Exception as error:  # a StrictDataclassError, which no built-in class covers
            raise ValueError(f"{folder}: config.json: {' '.join(str(error).split())}") from None
        if getattr(config, "chunk_size_feed_forward", 0):
            # The outputs are the same, but an FFN's inputs are read where all its tokens pass at once.
            config.chunk_size_feed_forward = 0
        return config

    def _class_of(self, folder: Path) -> Any:
        names = model_settings(folder).get("architectures")
        named = self._architecture(names[0] if isinstance(names, list) and names else None)
        if named not in (None, self.base_class):
            return named
        # If a class adds only a tied head to the base model, the weights do not show it.
        is_implied = named is None and has_tied_head(folder) and set(self._tied_targets) == {f"{self.head}.weight"}
        return self.model_class if self._has_head(folder) or is_implied else self.base_class

    def _architecture(self, name: Any) -> Any:
        """The class of that name if it belongs to this family, else None."""
        module, root = sys.modules[self.base_class.__module__], self.base_class.__bases__[0]
        named = getattr(module, name) if name in module.__all__ else None
        return named if isinstance(named, type) and issubclass(named, root) and named is not root else None

    def _has_head(self, folder: Path) -> bool:
        return any(name.startswith(f"{self.head}.") for name in stored_tensors(folder))

    def _read(self, folder: Path, model_class: Any, dtype: torch.dtype, may_lack: str | None = None) -> nn.Module:
        """Reads safetensors only, and runs no code of the folder."""
        check_weights(folder)
        check_shared_embeddings(folder)
        loaded, report = model_class.from_pretrained(
            folder,
            config=self._config_of(folder),
            key_mapping={WRAPPERS: ""},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **self._left_out(folder, model_class),
        )
        # Else saving would undo the mapping, and put the pattern before every name.
        loaded._weight_conversions = None
        optional = None if self._has_head(folder) else may_lack
        missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] != optional)
        if missing:
            raise ValueError(f"{folder}: the weights lack {len(missing)} of the model's, such as {missing[0]}")
        misshapen = sorted(str(name) for name, *_ in report["mismatched_keys"])
        if misshapen:
            raise ValueError(
                f"{folder}: {len(misshapen)} weights are not of the shape of the model's, such as {misshapen[0]}"
            )
        unread = sorted(name for name in report["unexpected_keys"] if not re.search(NO_WEIGHTS, name))
        if unread:
            raise ValueError(
                f"{folder}: the weights hold {len(unread)} that a {model_class.__name__} of this config.json does not "
                f"have, such as {unread[0]}"
            )
        self._separate_head(loaded, folder)
        backbone: nn.Module = loaded
        return backbone

    def _left_out(self, folder: Path, model_class: Any) -> dict[str, bool]:
        names = stored_tensors(folder)
        absent = [module for module in self.dispensable if not any(f"{module}." in name for name in names)]
        return {self.dispensable[module]: False for module in absent} if model_class is self.base_class else {}

    @property
    def _tied_targets(self) -> list[str]:
        """The tensors of the head that a tied head shares with the embeddings."""
        return [name for name in self.model_class._tied_weights_keys if name.split(".")[0] == self.head]

    def _separate_head(self, backbone: Any, folder: Path) -> None:
        """Give the head its own weights if the folder's is not tied to the embeddings but Transformers tied it.

        It builds every T5 tied, and ties equal weights.
        """
        if not hasattr(backbone, self.head) or has_tied_head(folder):
            return
        for target in self._tied_targets:
            if backbone.all_tied_weights_keys.pop(target, None) is not None:
                layer, _, name = target.rpartition(".")
                weight = backbone.get_parameter(target).detach().clone()
                setattr(backbone.get_submodule(layer), name, nn.Parameter(weight))
        backbone.config.tie_word_embeddings = False


def _stored_dtype(folder: Path) -> torch.dtype:
    """The highest precision of the weights in a folder's files, whatever its config.json says.

    Raises ValueError for weights that are no plain floating-point numbers.
    """
    stored = {tensor.dtype: name for name, tensor in stored_tensors(folder).items() if not re.search(NO_WEIGHTS, name)}
    unknown = stored.keys() - FLOATS.keys()
    if unknown:
        dtype = min(unknown)
        raise ValueError(f"{folder}: {stored[dtype]} is kept as {dtype}; allowed: {', '.join(FLOATS)}")
    return reduce(torch.promote_types, [FLOATS[dtype] for dtype in stored])


def swap_ffns(
    backbone: Any, family: Family, moe: MoEConfig, *, router: str, upcycled: bool = False
) -> tuple[ExpertFFN, ...]:
    """Replace every FFN by an ExpertFFN with the same weights; returns them in the family's order.

    With `upcycled` each expert is a copy of the whole FFN. Raises ValueError if the experts do not divide its neurons.
    """
    swapped = []
    for site in family.sites(backbone):
        parts = site.read()
        # On the device of the weights: fake tensors, used to count FLOPs, cannot be moved.
        with parts.w_in.device:
            built = build_router(router, parts.w_in.shape[1], moe.experts, moe.router_hidden)
            ffn = _expert_ffn(parts, site, moe, built)
            parts.copy_to(ffn)
            if upcycled:
                slices, ffn = ffn, _expert_ffn(parts, site, moe, ffn.router, upcycled=True)
                upcycle_into(slices, ffn)
        site.install(ffn.train(backbone.training))
        swapped.append(ffn)
    return tuple(swapped)


def _expert_ffn(parts: FFNParts, site: Any, moe: MoEConfig, router: Router, *, upcycled: bool = False) -> ExpertFFN:
    d_ff, d_model = parts.w_in.shape
    ffn = ExpertFFN(
        d_model,
        d_ff * moe.experts if upcycled else d_ff,
        experts=moe.experts,
        top_k=moe.top_k,
        router=router,
        activation=site.activation,
        gated=parts.w_gate is not None,
        bias=parts.b_in is not None,
        gate_bias=parts.b_gate is not None,
        dropout=site.dropout,
        hidden_dropout=site.hidden_dropout,
        backend=moe.backend,
        upcycled=upcycled,
    )
    if ffn.w_in.dtype != parts.w_in.dtype:
        ffn.to(parts.w_in.dtype)
        # At least float32, even if the weights have less: neighbouring scores are often close.
        ffn.router.to(torch.promote_types(parts.w_in.dtype, torch.float32))
    return ffn


def family(name: str) -> Family:
    """The family of that name, from the module of that name."""
    named: Family = getattr(import_module(f"ssd_lit.models.{name}"), name.upper())
    return named
