"""The final model of a run as a Hugging Face checkpoint folder."""

from collections.abc import Sequence
from pathlib import Path

from ssd_lit.config import ConfigError, RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.data.objectives import Specials
from ssd_lit.files import check_unfilled, whole_folder
from ssd_lit.layout import PhaseRecord
from ssd_lit.models.families import family
from ssd_lit.models.folder import Experts, write_experts
from ssd_lit.models.folder_weights import TOKENIZER_FILES, copy_files, save_dense
from ssd_lit.training.checkpoint import final_model


def export_run(run_dir: Path, config: RunConfig, chain: Sequence[PhaseRecord], data: Path, target: Path) -> bool:
    """Write the last checkpoint of the chain, and the tokenizer of its data folder, into a new folder.

    Returns whether the model has experts: one that was never MoEfied makes a plain checkpoint folder. Raises
    ConfigError for a model that has no dense mode.
    """
    if config.method == "upcycle":
        raise ConfigError(
            f"run {config.name}: its experts are copies of whole FFNs, which no dense checkpoint can hold"
        )
    check_unfilled(target)
    model = final_model(run_dir, config, chain, Specials.of(load_index(data / "tokens")))
    # Training has no use for it, generation has.
    model.backbone.config.use_cache = True
    if model.backbone.can_generate():
        model.backbone.generation_config.use_cache = True
    has_experts = any(record.mode == "moefy" for record in chain)
    moe = config.moe
    trained = moe.trained_router if chain[-1].mode == "router" else None
    with whole_folder(target) as part:
        save_dense(part, model.backbone, family(config.model.family), model.ffns)
        copy_files(data / "tokenizer", part, TOKENIZER_FILES)
        if has_experts:
            told = Experts(moe.experts, moe.top_k, moe.construction, trained or moe.router, moe.router_hidden)
            write_experts(part, model.ffns, told)
    return has_experts
