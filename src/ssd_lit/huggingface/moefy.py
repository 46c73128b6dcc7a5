"""MoEfication of any Hugging Face checkpoint folder of a supported family."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ssd_lit.config import MoEConfig
from ssd_lit.config.pretrained import checkpoint_shape
from ssd_lit.data.documents import Progress, silent
from ssd_lit.data.readers import check_format, read_documents
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.huggingface.card import CARD, card_of_moefied
from ssd_lit.huggingface.experts import Experts, write_experts
from ssd_lit.huggingface.folder import copy_in_new_order
from ssd_lit.models.family import family, swap_ffns
from ssd_lit.models.hooks import capture_inputs
from ssd_lit.moe.activations import ACTIVATIONS
from ssd_lit.moe.construction import construct
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import NEEDS_ACTIVATIONS, allowed_experts
from ssd_lit.moe.permutation import moefy
from ssd_lit.moe.routing import check_choice
from ssd_lit.support.files import check_unfilled, whole_folder, write_text
from ssd_lit.training.routers import Example, contributions, fit_routers

TOKENS_A_STEP = 1024
"""Tokens of one training step of a router."""


def moefy_folder(
    source: Path,
    target: Path,
    moe: MoEConfig,
    *,
    seed: int = 0,
    text: Path | None = None,
    calibration_tokens: int = 8192,
    threshold: float | None = None,
    progress: Progress = silent,
) -> None:
    """Write the model of a checkpoint folder into a new one, its neurons grouped into experts.

    `moe` sets the number of experts, their construction and the router. Its posthoc_router is trained, and activations
    are measured, on the first `calibration_tokens` tokens of a text file. With a `threshold`, the folder's sparse mode
    has dynamic k unless told otherwise. Everything is computed in float32 (float64
    for a model in float64); weights keep their values and precision. Raises ValueError for arguments that cannot work,
    before any long computation.
    """
    check_choice(moe.experts, None, threshold, non_negative=moe.posthoc_router is not None)
    check_folders(source, target, moe, text)
    kind = family(checkpoint_shape(source)["family"])
    torch.manual_seed(seed)
    backbone: Any = kind.open(source)
    backbone.to(torch.promote_types(backbone.dtype, torch.float32))
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    router = moe.posthoc_router or moe.router
    ffns = swap_ffns(backbone, kind, moe, router=router)
    inputs: Sequence[Tensor | None] = [None] * len(ffns)
    if text is not None and needs_text(moe):
        inputs = text_inputs(backbone, ffns, source, text, calibration_tokens)
        progress(f"read {len(inputs[0])} tokens of {text}")

    orders = []
    for layer, (ffn, x) in enumerate(zip(ffns, inputs, strict=True)):
        activations = ffn.activations(x).detach() if x is not None and moe.construction in NEEDS_ACTIVATIONS else None
        labels = construct(
            moe.construction, ffn.gating_weight, moe.experts, seed=1000 * seed + layer, activations=activations
        )
        orders.append(moefy(ffn, labels))
        if moe.posthoc_router is not None and x is not None:
            fit_router(ffn, x, moe, seed=1000 * seed + layer)
        progress(f"layer {layer + 1} of {len(ffns)}")

    with whole_folder(target) as part:
        copy_in_new_order(source, part, backbone, kind, orders)
        experts = Experts(moe.experts, moe.top_k, moe.construction, router, moe.router_hidden, threshold)
        write_text(
            part / CARD, card_of_moefied(source.resolve().name, checkpoint_shape(source)["family"], experts, seed=seed)
        )
        write_experts(part, ffns, experts)


def check_folders(source: Path, target: Path, moe: MoEConfig, text: Path | None) -> None:
    """Raise ValueError for arguments that cannot work, without loading the model."""
    shape = checkpoint_shape(source)
    if shape["d_ff"] % moe.experts:
        raise ValueError(
            f"experts {moe.experts}: does not divide the {shape['d_ff']} neurons of an FFN of {source}; "
            f"allowed: {allowed_experts(shape['d_ff'])}"
        )
    if shape["activation"] not in ACTIVATIONS:
        raise ValueError(f"{source}: activation {shape['activation']!r}; allowed: {', '.join(ACTIVATIONS)}")
    check_unfilled(target)
    if text is not None:
        check_text(text, source)
    elif needs_text(moe):
        name = moe.posthoc_router or moe.construction
        raise ValueError(f"{name} needs text to measure the model's activations: give a file with --text")


def needs_text(moe: MoEConfig) -> bool:
    """Whether the construction or the router needs the model's activations on text."""
    return moe.construction in NEEDS_ACTIVATIONS or moe.posthoc_router is not None


def fit_router(ffn: ExpertFFN, x: Tensor, moe: MoEConfig, *, seed: int) -> None:
    """Train only the router of an FFN, on inputs x [T, D], for moe.router_steps steps."""
    assert moe.posthoc_router is not None
    targets = contributions(ffn, x, moe.posthoc_router)
    generator = torch.Generator().manual_seed(seed)

    def examples() -> Iterator[list[Example]]:
        while True:
            rows = torch.randint(len(x), (min(TOKENS_A_STEP, len(x)),), generator=generator).to(x.device)
            yield [(x[rows], targets[rows])]

    for _ in fit_routers([ffn], examples(), moe):
        pass


LONGEST = 512
"""Most tokens of one forward pass."""


def check_text(text: Path, folder: Path) -> None:
    """Raise ValueError unless the file is of a known format and the folder has a tokenizer."""
    check_format(text)
    if not text.is_file():
        raise ValueError(f"{text}: no such file")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in folder {str(folder)!r}: without it no text can be read")


@torch.no_grad()
def text_inputs(backbone: Any, ffns: Sequence[ExpertFFN], folder: Path, text: Path, tokens: int) -> list[Tensor]:
    """The inputs [T, D] of every FFN on the first T >= `tokens` tokens of a text, or on all if it has fewer.

    Each document is read by itself, in pieces of at most the model's context, with the special tokens that the folder's
    tokenizer adds. The decoder of an encoder-decoder reads the encoder's tokens, shifted by one. Raises ValueError
    for a text without tokens, or a tokenizer of another model.
    """
    base, config = backbone.base_model, backbone.config
    length = min(LONGEST, getattr(config, "max_position_embeddings", LONGEST))
    parts: list[list[Tensor]] = [[] for _ in ffns]
    read = 0
    for ids in _pieces(load_tokenizer(folder), text, length):
        if max(ids) >= config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has token {max(ids)}, the model only {config.vocab_size}")
        inputs = torch.tensor([ids], device=backbone.device)
        extra = {}
        if hasattr(base, "encoder") and hasattr(base, "decoder"):
            extra["decoder_input_ids"] = F.pad(inputs[:, :-1], (1, 0), value=config.pad_token_id or 0)
        with capture_inputs(ffns) as captured:
            base(input_ids=inputs, use_cache=False, **extra)
        for rows, ffn in zip(parts, ffns, strict=True):
            rows.append(captured[ffn])
        read += len(ids)
        if read >= tokens:
            break
    if not read:
        raise ValueError(f"{text}: no text in it")
    return [torch.cat(rows) for rows in parts]


def _pieces(tokenizer: Tokenizer, text: Path, length: int) -> Iterator[list[int]]:
    tokenizer.enable_truncation(length)
    for document in read_documents(text, "text"):
        encoding = tokenizer.encode(document)
        yield from (piece.ids for piece in [encoding, *encoding.overflowing] if piece.ids)
