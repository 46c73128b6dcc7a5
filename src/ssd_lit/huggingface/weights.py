"""The dense half of a MoEfied folder: weights under the names and in the layout of Transformers."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssd_lit.config.pretrained import model_settings, plain_name, weight_files
from ssd_lit.models.family import Family, FFNParts
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support.files import read_json, write_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def copy_in_new_order(
    source: Path, target: Path, backbone: nn.Module, family: Family, orders: Sequence[Tensor]
) -> None:
    """Copy a checkpoint folder, its neurons in a new order; whatever else the weight files hold stays as it is.

    Names lose what a wrapper had put before them.

    orders: for each FFN of the family's sites in `backbone`, [F] the old place of the neuron that stands at i. Config,
    generation settings and tokenizer come along, code and pickled weights do not. Raises ValueError if the files do not
    hold the FFNs.
    """
    moves = _moves(backbone, family, orders)
    done: set[str] = set()
    for file in weight_files(source):
        with safe_open(file, framework="pt") as opened:
            tensors = {plain_name(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            about = opened.metadata()
        for name, value in tensors.items():
            # A base model's files may be opened with a head, and the other way round.
            place = next((one for one in (name, name.partition(".")[2]) if one in moves), None)
            if place is not None:
                order, dimension = moves[place]
                tensors[name] = value.index_select(dimension, order)
                done.add(place)
        save_file(tensors, target / file.name, metadata=about)
    if done != moves.keys():
        raise ValueError(f"{source}: the weight files have no {min(moves.keys() - done)}")
    write_json(target / "config.json", {**model_settings(source), "architectures": [type(backbone).__name__]})
    _copy_index(source, target)
    copy_files(source, target, ["generation_config.json", *TOKENIZER_FILES])


def _copy_index(source: Path, target: Path) -> None:
    name = "model.safetensors.index.json"
    if (source / name).is_file():
        index = read_json(source / name)
        places = {plain_name(weight): file for weight, file in index["weight_map"].items()}
        write_json(target / name, {**index, "weight_map": places})


def save_dense(
    folder: Path, backbone: Any, family: Family, ffns: Sequence[ExpertFFN], *, max_shard_size: int | str = "50GB"
) -> None:
    """Write a backbone whose FFNs were swapped for `ffns` as Transformers would without the swap."""
    inside = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, ExpertFFN))
    state = {name: value for name, value in backbone.state_dict().items() if not name.startswith(inside)}
    for site, ffn in zip(family.sites(backbone), ffns, strict=True):
        state |= site.state(FFNParts.of(ffn))
    # The class's own: a model that was opened with its experts saves itself through here.
    type(backbone).save_pretrained(backbone, folder, state_dict=state, max_shard_size=max_shard_size)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _moves(backbone: Any, family: Family, orders: Sequence[Tensor]) -> dict[str, tuple[Tensor, int]]:
    """For every tensor that counts neurons, by its name in the base model: their order, and the dimension they are."""
    moves = {}
    for site, order in zip(family.sites(backbone), orders, strict=True):
        for part, (name, transposed) in site.weights.items():
            if part != "b_out":
                moves[name.removeprefix(f"{backbone.base_model_prefix}.")] = (order.cpu(), int(transposed))
    return moves
