"""Switchable Sparse-Dense Learning (ICML 2024, arXiv 2410.03440) as an experiment suite."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(
    folder: str | PathLike[str],
    *,
    mode: Literal["dense", "sparse"] = "dense",
    top_k: int | None = None,
    threshold: float | None = None,
    backend: str = "auto",
) -> Any:
    """The Transformers model of a folder that `ssd-lit moefy --model` or `ssd-lit export` wrote, in either mode.

    In sparse mode a token runs through `top_k` experts of each FFN, or with a `threshold` through every expert whose
    score is at least this share of the token's best one (dynamic k, for trained routers); the folder says how many if
    both are None. `backend` says how they are computed. A folder without experts, of a run that was never MoEfied,
    opens in dense mode only. The model's `save_pretrained` writes such a folder again. Reads safetensors only and runs
    nothing of the folder. Raises ValueError for a mode, top_k, threshold or backend that the folder does not have.
    """
    from ssd_lit.huggingface.folder import open_folder

    return open_folder(Path(folder), mode=mode, top_k=top_k, threshold=threshold, backend=backend)


def set_mode(
    model: "nn.Module",
    mode: Literal["dense", "sparse"],
    top_k: int | None = None,
    threshold: float | None = None,
) -> None:
    """Switch a model that `load` gave to another mode, to `top_k` experts a token, or to dynamic k by a threshold.

    Nothing is copied. With both None the choice stays what it was. Raises ValueError for a model without experts, or a
    mode, top_k or threshold that it cannot have.
    """
    from ssd_lit.huggingface.folder import set_mode

    set_mode(model, mode, top_k, threshold)


def mean_k(model: "nn.Module") -> float | None:
    """Experts a token with dynamic k, averaged over a model's FFNs and all tokens since `load` or `set_mode`.

    Or since a `Generator` read its last prompts. Padding counts as tokens do. None without dynamic k. Raises ValueError
    for a model without experts.
    """
    from ssd_lit.huggingface.folder import mean_k

    return mean_k(model)
