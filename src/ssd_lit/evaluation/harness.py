"""Models with experts in EleutherAI's lm-evaluation-harness: the model type ssd_lit, and its tasks on a run's model.

    python -m ssd_lit.evaluation.harness run --model ssd_lit --model_args path=DIR,mode=sparse,top_k=8 --tasks ...

is the command line of lm_eval with that model type. lm_eval finds no model types of other packages by itself.
"""

from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssd_lit.config import ConfigError, HarnessConfig
from ssd_lit.huggingface.folder import open_folder
from ssd_lit.models.language_model import LanguageModel, attend_beside_padding
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.statistics import mean_k


@register_model("ssd_lit")
class FolderLM(HFLM):  # type: ignore[misc]
    """The model of a folder that `ssd-lit moefy` or `ssd-lit export` wrote, in either mode.

    `path` is the folder, with its tokenizer; `mode`, `top_k` and `threshold` are those of `ssd_lit.load`. All other
    arguments are those of lm_eval's own type hf.
    """

    def __init__(
        self,
        path: str,
        mode: Any = "dense",
        top_k: int | None = None,
        threshold: float | None = None,
        device: str | None = None,
        **hf: Any,
    ):
        k, share = None if top_k is None else int(top_k), None if threshold is None else float(threshold)
        model: Any = open_folder(Path(path), mode=mode, top_k=k, threshold=share)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        super().__init__(pretrained=model, tokenizer=tokenizer, device=device, **hf)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval records of a model, and with dynamic k the mean number of experts a token (padding counts)."""
        info: dict[str, Any] = super().get_model_info()
        ffns = [module for module in self.model.modules() if isinstance(module, ExpertFFN)]
        return {**info, "mean_k": mean_k(ffns) if ffns else None}


def score_on_harness(model: LanguageModel, settings: HarnessConfig, tokenizer: Path) -> list[dict[str, Any]]:
    """Every metric of every task for a model in its current mode: task, metric, value, samples.

    `tokenizer` is the folder of the tokenizer. Raises ConfigError for tasks that there are not.
    """
    attend_beside_padding(model.backbone)
    wrapped = HFLM(
        pretrained=model.backbone.eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tokenizer, local_files_only=True),
        batch_size=settings.batch_size,
    )
    # Tasks of the package read data sets from the network; those of a folder need no others.
    tasks = TaskManager(include_path=settings.folder, include_defaults=settings.folder is None)
    unknown = sorted(set(settings.tasks) - set(tasks.all_tasks))
    if unknown:
        place = settings.folder or "lm_eval"
        raise ConfigError(f"downstream.harness.tasks {unknown[0]!r}: no such task in {place}")
    found: Any = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(settings.tasks),
        task_manager=tasks,
        num_fewshot=settings.few_shot,
        limit=settings.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    return [
        {"task": task, "metric": name.removesuffix(",none"), "value": float(value), "samples": _samples(found, task)}
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    ]


def _samples(found: Any, task: str) -> int | None:
    counts = found["n-samples"].get(task)
    return None if counts is None else int(counts["effective"])


if __name__ == "__main__":
    cli_evaluate()
