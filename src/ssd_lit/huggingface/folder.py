"""A MoEfied model as a Hugging Face checkpoint folder: Transformers opens it densely, ssd_lit in either mode.

The folder is a dense checkpoint whose neurons are in expert order, which leaves the dense function unchanged. In
addition it has experts.safetensors, with the router and neuron ids of each layer, and experts.json, written last.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssd_lit.config import MoEConfig
from ssd_lit.config.pretrained import checkpoint_shape, model_settings, plain_name, weight_files
from ssd_lit.huggingface.experts import TOKENIZER_FILES, Experts, copy_files, fingerprint, read_routers
from ssd_lit.huggingface.saving import INDEX, keep_experts
from ssd_lit.models.family import Family, family, swap_ffns
from ssd_lit.moe import statistics
from ssd_lit.moe.backends import NAMES
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import Mode, PosthocRouter
from ssd_lit.moe.routing import check_choice
from ssd_lit.support.files import read_json, write_json


def open_folder(
    folder: Path,
    *,
    mode: Mode = "dense",
    top_k: int | None = None,
    threshold: float | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Returns the Transformers model of a folder, ready for inference; with experts, every FFN is an ExpertFFN.

    Weights have their precision in the files, routers at least float32; a T5 in float16, of which Transformers keeps
    parts in float32, becomes float32 as a whole. Raises ValueError if the folder is no checkpoint of a supported
    family, if its experts were made for other weights, or for a mode, top_k, threshold or backend that it does not
    have.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r}: allowed are {', '.join(get_args(Mode))}")
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r}: allowed are {', '.join(NAMES)}")
    if (folder / "experts.json").is_file():
        return _open_experts(folder, mode, top_k, threshold, backend)
    if mode == "sparse" or top_k is not None or threshold is not None:
        raise ValueError(
            f"mode {mode!r}, top_k {top_k}, threshold {threshold}: no experts.json in folder {str(folder)!r}, "
            "so it is dense only; "
            "`ssd-lit moefy --model` makes one with experts"
        )
    return _open_backbone(folder)


def _open_experts(folder: Path, mode: Mode, top_k: int | None, threshold: float | None, backend: str) -> nn.Module:
    experts, told = Experts.read(folder)
    if top_k is None and threshold is None:
        threshold = experts.threshold
    check_choice(experts.experts, top_k, threshold, non_negative=experts.router in get_args(PosthocRouter))
    backbone: Any = _open_backbone(folder)
    moe = MoEConfig(experts=experts.experts, top_k=experts.top_k, router_hidden=experts.router_hidden)
    ffns = swap_ffns(backbone, _family_of(folder), moe, router=experts.router)
    if told != fingerprint(ffns):
        raise ValueError(f"{folder}: experts.json was made for other weights, or another order of neurons")
    read_routers(folder / "experts.safetensors", ffns)
    for ffn in ffns:
        ffn.backend = backend
    set_mode(backbone, mode, top_k, threshold)
    keep_experts(backbone, experts, folder.absolute())
    opened: nn.Module = backbone
    return opened


def _open_backbone(folder: Path) -> nn.Module:
    backbone = _family_of(folder).open(folder)
    if len({parameter.dtype for parameter in backbone.parameters()}) > 1:
        backbone.float()
    return backbone


def _family_of(folder: Path) -> Family:
    return family(checkpoint_shape(folder)["family"])


def set_mode(model: nn.Module, mode: Mode, top_k: int | None = None, threshold: float | None = None) -> None:
    """Put every ExpertFFN of a model into dense mode, or sparse mode with `top_k` experts a token or dynamic k.

    With neither each keeps its choice. Raises ValueError if the model has no ExpertFFN.
    """
    for ffn in _ffns_of(model):
        ffn.set_mode(mode, top_k, threshold)


def mean_k(model: nn.Module) -> float | None:
    """`moe.statistics.mean_k` of every ExpertFFN of a model. Raises ValueError if it has none."""
    return statistics.mean_k(_ffns_of(model))


def _ffns_of(model: nn.Module) -> list[ExpertFFN]:
    ffns = [module for module in model.modules() if isinstance(module, ExpertFFN)]
    if not ffns:
        raise ValueError(f"this {type(model).__name__} has no FFNs with experts; open its folder with ssd_lit.load")
    return ffns


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


def _moves(backbone: Any, family: Family, orders: Sequence[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """The order of the neurons and their dimension, for each tensor of an FFN, by its name in the base model."""
    moves = {}
    for site, order in zip(family.sites(backbone), orders, strict=True):
        for part, (name, transposed) in site.weights.items():
            if part != "b_out":
                moves[name.removeprefix(f"{backbone.base_model_prefix}.")] = (order.cpu(), int(transposed))
    return moves
