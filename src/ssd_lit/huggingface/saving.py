"""A model with experts is saved, pushed to a hub and loaded again under Transformers' names of its weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ssd_lit.config.pretrained import stored_tensors
from ssd_lit.huggingface.card import CARD, card_of_saved
from ssd_lit.huggingface.experts import TOKENIZER_FILES, Experts, copy_files, write_experts
from ssd_lit.models.family import Family, FFNParts, family
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support.files import write_text

INDEX = "model.safetensors.index.json"


def keep_experts(model: Any, experts: Experts, source: Path) -> None:
    """Let a model that was opened from the folder `source` be saved, pushed and loaded as one with experts.

    The class's own methods know nothing of ExpertFFNs: they would write unknown names, and read none of the FFNs.
    """
    # Unlike methods, these are copied with the model.
    model.save_pretrained = partial(save_folder, model, experts, source)
    model.push_to_hub = partial(push_folder, model)
    model.register_load_state_dict_pre_hook(_take_dense_names)


def save_folder(
    model: Any,
    experts: Experts,
    source: Path,
    save_directory: str | PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a model that `open_folder` returned as such a folder, with its present weights and routers.

    Replaces the model's `save_pretrained`, of whose options the others are refused. A `state_dict` has the names of
    the model's own. The tokenizer comes from `source`, the folder that the model was opened from, and so does the card
    as long as the weights are the same. All is written beside what the folder holds, and takes its place at the end.
    """
    if not is_main_process:
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    kind, ffns = family(model.config.model_type), list(_ffns(model).values())
    with TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        new = Path(beside)
        save_dense(new, model, kind, ffns, state=state_dict, max_shard_size=max_shard_size)
        write_experts(new, ffns, experts)
        copy_files(source, new, [name for name in TOKENIZER_FILES if not (folder / name).exists()])
        if folder.resolve() != source.resolve() and (source / CARD).is_file() and _same_weights(new, source):
            copy_files(source, new, [CARD])
        else:
            write_text(new / CARD, card_of_saved(model, experts))
        _take_place(new, folder)


def push_folder(
    model: Any,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
) -> str:
    """Push the folder that `save_folder` writes, card and tokenizer included, to a repository, made if there is none.

    Replaces the model's `push_to_hub`, with its options. Returns the address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def save_dense(
    folder: Path,
    backbone: Any,
    family: Family,
    ffns: Sequence[ExpertFFN],
    *,
    state: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a backbone whose FFNs were swapped for `ffns` as Transformers writes one with its own FFNs.

    `state` has the weights by the backbone's names, by default its present ones.
    """
    state = backbone.state_dict() if state is None else state
    places = _ffns(backbone)
    written = {name: value for name, value in state.items() if not name.startswith(tuple(f"{p}." for p in places))}
    for site, place in zip(family.sites(backbone), places, strict=True):
        parts = FFNParts(**{part: state[f"{place}.{part}"] for part in site.weights})
        written |= site.state(parts)
    # The class's method: that of a model opened with experts calls this function.
    type(backbone).save_pretrained(backbone, folder, state_dict=written, max_shard_size=max_shard_size)


def _ffns(model: nn.Module) -> dict[str, ExpertFFN]:
    """The FFNs of a model by the names of their modules, in the family's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertFFN)}


def _take_place(new: Path, folder: Path) -> None:
    """Move the files of a saved model into a folder, in place of those of an earlier one.

    Without experts.json, which goes first and comes last, a folder does not open with experts.
    """
    weights = (folder / "model.safetensors", folder / INDEX, *folder.glob("model-*-of-*.safetensors"))
    for old in (folder / "experts.json", *weights):
        old.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "experts.json"):
        file.replace(folder / file.name)


def _same_weights(folder: Path, other: Path) -> bool:
    stored, others = stored_tensors(folder), stored_tensors(other)
    return stored.keys() == others.keys() and all(stored[name].same_as(others[name]) for name in stored)


def _take_dense_names(
    model: Any, state: dict[str, Tensor], prefix: str, _: Any, __: bool, ___: Any, ____: Any, errors: list[str]
) -> None:
    """Before a state dict is loaded, give the FFNs in it that have Transformers' names those of ExpertFFNs.

    So a trainer of Transformers reads its checkpoints. These hold no routers: a model keeps its own, unless it has a
    gate, whose weights were trained with the others.
    """
    for site, (place, ffn) in zip(family(model.config.model_type).sites(model), _ffns(model).items(), strict=True):
        names = {part: (f"{prefix}{name}", transposed) for part, (name, transposed) in site.weights.items()}
        if not all(name in state for name, _ in names.values()):
            continue
        own = ffn.state_dict(prefix=f"{prefix}{place}.")
        for part, (name, transposed) in names.items():
            value = state.pop(name)
            own[f"{prefix}{place}.{part}"] = value.T if transposed else value
        if ffn.router.weighted:
            errors.append(f"{place}: a dense checkpoint lacks the gate; open its folder with ssd_lit.load")
        state.update(own)
