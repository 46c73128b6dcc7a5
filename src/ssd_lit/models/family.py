"""What a model family tells the rest: how its backbone is built and where its FFNs are."""

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
"""What weight files may hold and nobody need read: masks and places that are computed, and BERT's head for the
next sentence with the pooler before it, which its head for masked tokens does without."""


FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Precisions by the names that safetensors gives them."""


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
            mine, theirs = getattr(self, part.name), getattr(ffn, part.name)
            if mine is not None:
                theirs.copy_(mine)


class Weight(NamedTuple):
    """Where a layer keeps a part of its FFN."""

    name: str
    transposed: bool = False
    """Whether it is kept as [D, F]: neurons are columns."""


class FFNSite:
    """A place in a backbone that holds an FFN.

    `layer` is the name of a layer inside the backbone's base model, `weights` where that layer keeps each part of
    FFNParts, and `modules` what an ExpertFFN replaces: the first becomes the FFN, the others pass on what they get.
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
        # A base model without a head is its own base: its names have no prefix.
        prefix = "" if backbone.base_model is backbone else f"{backbone.base_model_prefix}."
        self._backbone = backbone
        self._modules = [f"{prefix}{layer}.{name}" for name in modules]
        self.weights = {part: Weight(f"{prefix}{layer}.{name}", turned) for part, (name, turned) in weights.items()}
        """Where the backbone keeps each part: the names of its state."""
        self.activation = SAME_ACTIVATION.get(activation, activation)
        self.dropout = dropout
        """Probability with which outputs are dropped by what an ExpertFFN replaces."""
        self.hidden_dropout = hidden_dropout
        """The same for activations."""

    def read(self) -> FFNParts:
        """The weights as the backbone has them; views, where it keeps them transposed."""
        found = {part: self._backbone.get_parameter(weight.name) for part, weight in self.weights.items()}
        return FFNParts(**{part: value.T if self.weights[part].transposed else value for part, value in found.items()})

    def state(self, parts: FFNParts) -> dict[str, Tensor]:
        """The parts under the names and in the layout in which the backbone keeps them."""
        found = {weight.name: (getattr(parts, part), weight.transposed) for part, weight in self.weights.items()}
        return {name: (value.T if turned else value).detach() for name, (value, turned) in found.items()}

    def install(self, ffn: ExpertFFN) -> None:
        """Let the backbone compute `ffn` here."""
        first, *others = self._modules
        self._backbone.set_submodule(first, ffn)
        for other in others:
            self._backbone.set_submodule(other, nn.Identity())


@dataclass(frozen=True)
class Family:
    """A kind of backbone."""

    objective: Literal["causal", "masked", "spans"]
    """What it is trained to predict."""
    model_class: Any
    """The Transformers class, with the head for that objective."""
    base_class: Any
    """The one without a head."""
    head: str
    """Name of the head in `model_class`."""
    config: Callable[[ModelConfig, VocabInfo, int], Any]
    """The Transformers config of a fresh model, for blocks of that many tokens."""
    sites: Callable[[Any], Sequence[FFNSite]]
    """The FFNs of a backbone, with any head or none: first layer first, an encoder's before a decoder's."""
    dispensable: Mapping[str, str] = field(default_factory=dict)
    """Modules that a base model may come without, each with the argument of its class that says whether it has one."""

    def build(self, config: ModelConfig, vocab: VocabInfo, context: int) -> nn.Module:
        """A backbone with fresh weights; of the shape of a checkpoint folder where the config names one."""
        built: nn.Module
        if config.pretrained is None:
            built = self.model_class(self.config(config, vocab, context))
        else:
            folder = Path(config.pretrained)
            built = self.model_class(self._config_of(folder))
            self._separate_head(built, folder)
        return built

    def load(self, folder: Path) -> nn.Module:
        """The backbone of a checkpoint folder, in float32, ready to train; a head that it lacks is drawn.

        Raises ValueError if other weights are missing.
        """
        return self._read(folder, self.model_class, torch.float32, may_lack=self.head).train()

    def open(self, folder: Path) -> nn.Module:
        """The model of a checkpoint folder as it was saved, in the precision of its weight files.

        Its class is the one that config.json names. Where that is not one of this family's in Transformers, or one
        without the head that the weights have, it is the class with that head, or without any if there is none. Raises
        ValueError if weights are missing, or if there are some that the model does not have.
        """
        return self._read(folder, self._class_of(folder), _kept_dtype(folder)).eval()

    def _config_of(self, folder: Path) -> Any:
        try:
            return self.model_class.config_class.from_dict(model_settings(folder))
        except Exception as error:  # a StrictDataclassError, which is none of Python's own
            raise ValueError(f"{folder}: config.json: {' '.join(str(error).split())}") from None

    def _class_of(self, folder: Path) -> Any:
        names = model_settings(folder).get("architectures")
        named = self._architecture(names[0] if isinstance(names, list) and names else None)
        if named not in (None, self.base_class):
            return named
        # A tied head may be all that a class adds to the base model, and then leaves no trace in the weights.
        is_implied = named is None and has_tied_head(folder) and set(self._tied_targets) == {f"{self.head}.weight"}
        return self.model_class if self._has_head(folder) or is_implied else self.base_class

    def _architecture(self, name: Any) -> Any:
        """The class of that name if it is one of this family's, else None."""
        module, root = sys.modules[self.base_class.__module__], self.base_class.__bases__[0]
        found = getattr(module, name) if name in module.__all__ else None
        return found if isinstance(found, type) and issubclass(found, root) and found is not root else None

    def _has_head(self, folder: Path) -> bool:
        return any(name.startswith(f"{self.head}.") for name in stored_tensors(folder))

    def _read(self, folder: Path, model_class: Any, dtype: torch.dtype, may_lack: str | None = None) -> nn.Module:
        """From safetensors only, running nothing of the folder."""
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
        # Or saving it would undo the mapping, and put the pattern before every name.
        loaded._weight_conversions = None
        may_draw = may_lack if may_lack is not None and not self._has_head(folder) else None
        missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] != may_draw)
        if missing:
            raise ValueError(f"{folder}: the weights lack {len(missing)} of the model's, such as {missing[0]}")
        other = sorted(str(name) for name, *_ in report["mismatched_keys"])
        if other:
            raise ValueError(f"{folder}: {len(other)} weights are not of the shape of the model's, such as {other[0]}")
        unread = sorted(name for name in report["unexpected_keys"] if not re.search(NO_WEIGHTS, name))
        if unread:
            raise ValueError(
                f"{folder}: the weights hold {len(unread)} that a {model_class.__name__} of this config.json does not "
                f"have, such as {unread[0]}"
            )
        self._separate_head(loaded, folder)
        found: nn.Module = loaded
        return found

    def _left_out(self, folder: Path, model_class: Any) -> dict[str, bool]:
        names = stored_tensors(folder)
        absent = [module for module in self.dispensable if not any(f"{module}." in name for name in names)]
        return {self.dispensable[module]: False for module in absent} if model_class is self.base_class else {}

    @property
    def _tied_targets(self) -> list[str]:
        """The tensors of the head that are the embeddings' where it is tied to them."""
        return [name for name in self.model_class._tied_weights_keys if name.split(".")[0] == self.head]

    def _separate_head(self, backbone: Any, folder: Path) -> None:
        """Give a head that is not tied to the embeddings weights of its own, as far as Transformers has tied them.

        It builds every T5 tied, and ties what is equal.
        """
        if not hasattr(backbone, self.head) or has_tied_head(folder):
            return
        for target in self._tied_targets:
            if backbone.all_tied_weights_keys.pop(target, None) is not None:
                layer, _, name = target.rpartition(".")
                weight = backbone.get_parameter(target).detach().clone()
                setattr(backbone.get_submodule(layer), name, nn.Parameter(weight))
        backbone.config.tie_word_embeddings = False


def _kept_dtype(folder: Path) -> torch.dtype:
    """The precision of the weights in a folder's files, whatever its config.json says: the highest, if there are some.

    Raises ValueError for weights that are no plain floating-point numbers.
    """
    kept = {tensor.dtype: name for name, tensor in stored_tensors(folder).items() if not re.search(NO_WEIGHTS, name)}
    unknown = kept.keys() - FLOATS.keys()
    if unknown:
        name = min(unknown)
        raise ValueError(f"{folder}: {kept[name]} is kept as {name}; allowed: {', '.join(FLOATS)}")
    return reduce(torch.promote_types, [FLOATS[name] for name in kept])


def swap_ffns(
    backbone: Any, family: Family, moe: MoEConfig, *, router: str, upcycled: bool = False
) -> tuple[ExpertFFN, ...]:
    """Replace every FFN by an ExpertFFN with the same weights; returns them in the family's order.

    With `upcycled` each expert is a copy of the whole FFN. Raises ValueError if the experts do not divide its neurons.
    """
    swapped = []
    for site in family.sites(backbone):
        parts = site.read()
        # Made where they belong: the fake tensors that FLOPs are counted on cannot be moved.
        with parts.w_in.device:
            ffn = _expert_ffn(
                parts, site, moe, build_router(router, parts.w_in.shape[1], moe.experts, moe.router_hidden)
            )
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
        # Beside weights of lower precision too: neighbouring scores are often close.
        ffn.router.to(torch.promote_types(parts.w_in.dtype, torch.float32))
    return ffn


def family(name: str) -> Family:
    """The family of that name, from the module of that name."""
    found: Family = getattr(import_module(f"ssd_lit.models.{name}"), name.upper())
    return found
