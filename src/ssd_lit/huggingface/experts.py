"""The files that a folder with experts has beside a dense checkpoint: experts.json and experts.safetensors."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssd_lit.config.renamed import current_router
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support.files import read_json, write_json

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
    threshold: float | None = None
    """Dynamic k by default, instead of K: see `ExpertFFN.set_mode`."""

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


def write_experts(folder: Path, ffns: Sequence[ExpertFFN], experts: Experts) -> None:
    """Add experts.safetensors and experts.json for `ffns`, in the family's order, to a folder with their weights."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in expert_tensors(ffns).items()}
    save_file(tensors, folder / "experts.safetensors")
    # Without a threshold, versions that know none read the folder too.
    told = {name: value for name, value in asdict(experts).items() if value is not None}
    write_json(folder / "experts.json", {"format": FORMAT, **told, "fingerprint": fingerprint(ffns)})


def read_routers(path: Path, ffns: Sequence[ExpertFFN]) -> None:
    stored, tensors = load_file(path), expert_tensors(ffns)
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ValueError(f"{path}: its routers are not of the kind that experts.json names")
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(stored[name])


def expert_tensors(ffns: Sequence[ExpertFFN]) -> dict[str, Tensor]:
    """The tensors of each ExpertFFN that a dense FFN lacks, not copied, named `LAYER.name`."""
    return {
        f"{layer}.{name}": value
        for layer, ffn in enumerate(ffns)
        for name, value in ffn.state_dict().items()
        if name == "neuron_ids" or name.startswith("router.")
    }


def fingerprint(ffns: Sequence[ExpertFFN]) -> str:
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


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
