"""The final model of a run as a Hugging Face checkpoint folder."""

from pathlib import Path
from typing import get_args

from ssd_lit.config import ConfigError
from ssd_lit.huggingface.card import CARD, card_of_run
from ssd_lit.huggingface.experts import TOKENIZER_FILES, Experts, copy_files, write_experts
from ssd_lit.huggingface.saving import save_dense
from ssd_lit.models.family import family
from ssd_lit.moe.names import PosthocRouter
from ssd_lit.moe.routing import check_choice
from ssd_lit.run import Run
from ssd_lit.support.files import check_unfilled, whole_folder, write_text
from ssd_lit.training.checkpoint import final_model


def export_run(run: Run, target: Path, *, threshold: float | None = None, scores: str = "") -> bool:
    """Write the final model of a run, the tokenizer of its data and a card into a new folder.

    With a `threshold`, the folder's sparse mode has dynamic k unless told otherwise. `scores` are tables for the card.
    Returns whether the model has experts; without, the folder is a plain checkpoint. Raises ConfigError for a model
    without a dense mode, and for a threshold without experts; ValueError for one that the router does not allow.
    """
    config, moe = run.config, run.config.moe
    if not run.has_dense_mode:
        raise ConfigError(
            f"run {config.name}: its experts are copies of whole FFNs, which no dense checkpoint can hold"
        )
    if threshold is not None and not run.has_experts:
        raise ConfigError(f"run {config.name}: has no experts among which threshold {threshold} could choose")
    check_choice(moe.experts, None, threshold, non_negative=run.router in get_args(PosthocRouter))
    check_unfilled(target)
    model = final_model(run)
    experts = None
    if run.has_experts:
        experts = Experts(moe.experts, moe.top_k, moe.construction, run.router, moe.router_hidden, threshold)
    # Off in training, needed for generation.
    model.backbone.config.use_cache = True
    if model.backbone.can_generate():
        model.backbone.generation_config.use_cache = True
    with whole_folder(target) as part:
        save_dense(part, model.backbone, family(config.model.family), model.ffns)
        copy_files(run.tokenizer, part, TOKENIZER_FILES)
        write_text(part / CARD, card_of_run(run, experts, scores))
        if experts is not None:
            write_experts(part, model.ffns, experts)
    return experts is not None
