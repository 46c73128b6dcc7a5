"""A MoEfied model as a Hugging Face checkpoint folder: Transformers opens it densely, ssd_lit in either mode.

The folder is a dense checkpoint whose neurons are in expert order, which leaves the dense function unchanged. In
addition it has experts.safetensors, with the router and neuron ids of each layer, and experts.json, written last.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssd_lit.config import MoEConfig
from ssd_lit.config.pretrained import checkpoint_shape, model_settings, plain_name, weight_files
from ssd_lit.config.renamed import current_router
from ssd_lit.models.family import Family, FFNParts, family, swap_ffns
from ssd_lit.moe.backends import NAMES
from ssd_lit.moe.ffn import ExpertFFN, Mode
from ssd_lit.support.files import read_json, write_json

INDEX = "model.safetensors.index.json"
FORMAT = 1
"""Version of the format; raised when older versions of this package cannot read the folder."""


@dataclass(frozen=True)
class Experts:
    """experts.json: how neurons were grouped into experts, and the router."""

    experts: int
    """E: experts of one FFN."""
    top_k: int
    """K: experts a token in sparse mode, by default."""
    construction: str
    router: str
    router_hidden: int
    """Width of a trained router."""

    @classmethod
    def read(cls, folder: Path) -> tuple["Experts", str]:
        """Reads experts.json of a folder; also returns the fingerprint of its neurons.

        Raises ValueError for another format or missing entries.
        """
        path = folder / "experts.json"
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(f"{path}: not of format {FORMAT}, the one that this version of ssd_lit reads")
        try:
            settings = {key: value for key, value in content.items() if key not in ("format", "fingerprint")}
            return cls(**{**settings, "router": current_router(settings["router"])}), content["fingerprint"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a record of experts ({error})") from None


def open_folder(folder: Path, *, mode: Mode = "dense", top_k: int | None = None, backend: str = "auto") -> nn.Module:
    """Returns the Transformers model of a folder, ready for inference; with experts, every FFN is an ExpertFFN.

    Weights have their precision in the files, routers at least float32; a T5 in float16, of which Transformers keeps
    parts in float32, becomes float32 as a whole. Raises ValueError if the folder is no checkpoint of a supported
    family, if its experts were made for other weights, or for a mode, top_k or backend that it does not have.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r}: allowed are {', '.join(get_args(Mode))}")
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r}: allowed are {', '.join(NAMES)}")
    if (folder / "experts.json").is_file():
        return _open_experts(folder, mode, top_k, backend)
    if mode == "sparse" or top_k is not None:
        raise ValueError(
            f"mode {mode!r}, top_k {top_k}: no experts.json in folder {str(folder)!r}, so it is dense only; "
            "`ssd-lit moefy --model` makes one with experts"
        )
    return _open_backbone(folder)


def _open_experts(folder: Path, mode: Mode, top_k: int | None, backend: str) -> nn.Module:
    experts, fingerprint = Experts.read(folder)
    if top_k is not None and not 1 <= top_k <= experts.experts:
        raise ValueError(f"top_k {top_k}: allowed are 1 to {experts.experts}")
    backbone: Any = _open_backbone(folder)
    moe = MoEConfig(experts=experts.experts, top_k=experts.top_k, router_hidden=experts.router_hidden)
    ffns = swap_ffns(backbone, _family_of(folder), moe, router=experts.router)
    if fingerprint != _fingerprint(ffns):
        raise ValueError(f"{folder}: experts.json was made for other weights, or another order of neurons")
    _read_routers(folder / "experts.safetensors", ffns)
    for ffn in ffns:
        ffn.backend = backend
    set_mode(backbone, mode, top_k)
    # The class's save_pretrained would write FFNs under unknown names. Unlike a method, this is copied with the model.
    backbone.save_pretrained = partial(save_folder, backbone, experts)
    opened: nn.Module = backbone
    return opened


def _open_backbone(folder: Path) -> nn.Module:
    backbone = _family_of(folder).open(folder)
    if len({parameter.dtype for parameter in backbone.parameters()}) > 1:
        backbone.float()
    return backbone


def _family_of(folder: Path) -> Family:
    return family(checkpoint_shape(folder)["family"])


def save_folder(
    model: Any, experts: Experts, save_directory: str | PathLike[str], *, max_shard_size: int | str = "50GB"
) -> None:
    """Write a model that `open_folder` returned as such a folder, with its present weights and routers.

    Replaces the model's `save_pretrained`, of whose options only `max_shard_size` is left.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Left from an earlier save, these would be read instead of shards, or with other weights.
    for name in ("experts.json", "model.safetensors", INDEX):
        (folder / name).unlink(missing_ok=True)
    ffns = [module for module in model.modules() if isinstance(module, ExpertFFN)]
    save_dense(folder, model, family(model.config.model_type), ffns, max_shard_size=max_shard_size)
    write_experts(folder, ffns, experts)


def set_mode(model: nn.Module, mode: Mode, top_k: int | None = None) -> None:
    """Put every ExpertFFN of a model into dense mode, or sparse mode with `top_k` experts a token.

    With None each keeps its number. Raises ValueError if the model has no ExpertFFN.
    """
    ffns = [module for module in model.modules() if isinstance(module, ExpertFFN)]
    if not ffns:
        raise ValueError(f"this {type(model).__name__} has no FFNs with experts; open its folder with ssd_lit.load")
    for ffn in ffns:
        ffn.set_mode(mode, top_k)


def write_experts(folder: Path, ffns: Sequence[ExpertFFN], experts: Experts) -> None:
    """Add experts.safetensors and experts.json for `ffns`, in the family's order, to a folder with their weights."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in _expert_tensors(ffns).items()}
    save_file(tensors, folder / "experts.safetensors")
    write_json(folder / "experts.json", {"format": FORMAT, **asdict(experts), "fingerprint": _fingerprint(ffns)})


def _read_routers(path: Path, ffns: Sequence[ExpertFFN]) -> None:
    stored, tensors = load_file(path), _expert_tensors(ffns)
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ValueError(f"{path}: its routers are not of the kind that experts.json names")
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(stored[name])


def _expert_tensors(ffns: Sequence[ExpertFFN]) -> dict[str, Tensor]:
    """The tensors of each ExpertFFN that a dense FFN lacks, not copied, named `LAYER.name`."""
    return {
        f"{layer}.{name}": value
        for layer, ffn in enumerate(ffns)
        for name, value in ffn.state_dict().items()
        if name == "neuron_ids" or name.startswith("router.")
    }


def _fingerprint(ffns: Sequence[ExpertFFN]) -> str:
    """16 hexadecimal digits that depend on one weight of each neuron and on the order of the neurons."""
    digest = hashlib.sha256()
    for ffn in ffns:
        column: Any = ffn.gating_weight[:, 0].detach().cpu().double().numpy()
        digest.update(column.tobytes())
    return digest.hexdigest()[:16]


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def copy_in_new_order(
    source: Path, target: Path, backbone: nn.Module, family: Family, orders: Sequence[Tensor]
) -> None:
    """Copy a checkpoint folder with its neurons in a new order; all other tensors stay the same.

    orders: for each FFN of the family's sites in `backbone`, [F], the old place of the neuron now at i. Names lose the
    prefix of a wrapper. Config, generation settings and tokenizer are copied; code and pickled weights are not. Raises
    ValueError if an FFN is missing from the weight files.
    """
    moves = _moves(backbone, family, orders)
    done: set[str] = set()
    for file in weight_files(source):
        with safe_open(file, framework="pt") as opened:
            tensors = {plain_name(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        for name, value in tensors.items():
            # With or without the prefix of the base model: its files may be opened with a head, and the reverse.
            base_name = name if name in moves else name.partition(".")[2]
            if base_name in moves:
                order, dimension = moves[base_name]
                tensors[name] = value.index_select(dimension, order)
                done.add(base_name)
        save_file(tensors, target / file.name, metadata=metadata)
    if done != moves.keys():
        raise ValueError(f"{source}: the weight files have no {min(moves.keys() - done)}")
    write_json(target / "config.json", {**model_settings(source), "architectures": [type(backbone).__name__]})
    if (source / INDEX).is_file():
        index = read_json(source / INDEX)
        weight_map = {plain_name(weight): file for weight, file in index["weight_map"].items()}
        write_json(target / INDEX, {**index, "weight_map": weight_map})
    copy_files(source, target, ["generation_config.json", *TOKENIZER_FILES])


def save_dense(
    folder: Path, backbone: Any, family: Family, ffns: Sequence[ExpertFFN], *, max_shard_size: int | str = "50GB"
) -> None:
    """Write a backbone whose FFNs were swapped for `ffns` as Transformers writes one with its own FFNs."""
    swapped = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, ExpertFFN))
    state = {name: value for name, value in backbone.state_dict().items() if not name.startswith(swapped)}
    for site, ffn in zip(family.sites(backbone), ffns, strict=True):
        state |= site.state(FFNParts.of(ffn))
    # The class's method: that of a model opened with experts calls this function.
    type(backbone).save_pretrained(backbone, folder, state_dict=state, max_shard_size=max_shard_size)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _moves(backbone: Any, family: Family, orders: Sequence[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """The order of the neurons and their dimension, for each tensor of an FFN, by its name in the base model."""
    moves = {}
    for site, order in zip(family.sites(backbone), orders, strict=True):
        for part, (name, transposed) in site.weights.items():
            if part != "b_out":
                moves[name.removeprefix(f"{backbone.base_model_prefix}.")] = (order.cpu(), int(transposed))
    return moves
