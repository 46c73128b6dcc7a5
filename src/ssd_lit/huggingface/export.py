"""The final model of a run as a Hugging Face checkpoint folder."""

from pathlib import Path

from ssd_lit.config import ConfigError
from ssd_lit.huggingface.folder import TOKENIZER_FILES, Experts, copy_files, save_dense, write_experts
from ssd_lit.models.family import family
from ssd_lit.run import Run
from ssd_lit.support.files import check_unfilled, whole_folder
from ssd_lit.training.checkpoint import final_model


def export_run(run: Run, target: Path) -> bool:
    """Write the final model of a run, and the tokenizer of its data, into a new folder.

    Returns whether the model has experts; without, the folder is a plain checkpoint. Raises ConfigError for a model
    without a dense mode.
    """
    config, moe = run.config, run.config.moe
    if not run.has_dense_mode:
        raise ConfigError(
            f"run {config.name}: its experts are copies of whole FFNs, which no dense checkpoint can hold"
        )
    check_unfilled(target)
    model = final_model(run)
    # Off in training, needed for generation.
    model.backbone.config.use_cache = True
    if model.backbone.can_generate():
        model.backbone.generation_config.use_cache = True
    with whole_folder(target) as part:
        save_dense(part, model.backbone, family(config.model.family), model.ffns)
        copy_files(run.tokenizer, part, TOKENIZER_FILES)
        if run.has_experts:
            experts = Experts(moe.experts, moe.top_k, moe.construction, run.router, moe.router_hidden)
            write_experts(part, model.ffns, experts)
    return run.has_experts
