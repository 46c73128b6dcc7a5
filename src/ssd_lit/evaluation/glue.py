"""What the final bert of a run is worth on GLUE once it is fine-tuned, in both modes."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score

from ssd_lit.config import GlueConfig
from ssd_lit.data.glue import TASKS, Task, read_task
from ssd_lit.evaluation.classifier import Classifier, encode, fine_tune, outputs_for
from ssd_lit.evaluation.pieces import ResumableResults
from ssd_lit.models.language_model import LanguageModel

Scores = dict[str, float]

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": binary_accuracy,
    "f1": binary_f1_score,
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
}


def score_on_glue(
    model: LanguageModel,
    settings: GlueConfig,
    tokenizer: Tokenizer,
    *,
    eos_id: int,
    longest: int,
    modes: tuple[str, ...],
    pieces: ResumableResults,
    title: str,
) -> dict[str, Any]:
    """Fine-tune the model on every task with every seed, in each of the `modes`; returns glue of downstream.json.

    - scores: one entry a task, mode and seed. Mode dense is fine-tuned and scored densely, dense_to_sparse is that
      same model scored with its experts: neurons stay in theirs, whose centres follow the fine-tuned rows, while a
      trained router stays what it was. Mode sparse is fine-tuned and scored with experts, chosen as they were.
    - baseline: what always naming the commonest class of the training examples scores; no correlation, 0, for STS-B.
    - examples: those of train and dev, and how many of either were cut to `longest` tokens.

    The model itself stays as it is.
    """
    scores, baseline, examples = [], {}, {}
    for name in settings.tasks:
        task = _TaskData(name, settings, tokenizer, eos_id, longest, model.ffns[0].w_in.device)
        baseline[name], examples[name] = task.baseline(), task.counts
        for seed in settings.seeds:
            for mode in modes:
                tune = partial(_tuned, model, task, settings, seed, mode, modes, title)
                found = pieces.get(f"glue-{name}-{mode}-seed{seed}", tune)
                scores += [{"task": name, "mode": tried, "seed": seed, **values} for tried, values in found.items()]
    return {"examples": examples, "baseline": baseline, "scores": scores}


class _TaskData:
    """A task's examples as the model reads them."""

    def __init__(
        self, name: str, settings: GlueConfig, tokenizer: Tokenizer, eos_id: int, longest: int, device: torch.device
    ):
        self.task: Task = TASKS[name]
        source = Path(settings.folder)
        train, dev = read_task(source, name, "train", settings.limit), read_task(source, name, "dev")
        self.texts, self.dev_texts = (
            encode([one.texts for one in part], tokenizer, eos_id, longest, device) for part in (train, dev)
        )
        self.targets, self.dev_targets = (torch.tensor([one.target for one in part]) for part in (train, dev))
        self.counts = {
            "train": len(train),
            "dev": len(dev),
            "cut": self.texts.cut + self.dev_texts.cut,
        }

    def learnable_targets(self) -> Tensor:
        """Classes as they are, scores with mean 0 and variance 1, of which no correlation takes notice."""
        if self.task.labels:
            return self.targets
        return (self.targets - self.targets.mean()) / self.targets.std().clamp_min(1e-6)

    def score(self, classifier: Classifier) -> Scores:
        outputs = outputs_for(classifier, self.dev_texts)
        return self._measure(outputs.argmax(dim=1) if self.task.labels else outputs[:, 0])

    def baseline(self) -> Scores:
        return self._measure(torch.full_like(self.dev_targets, float(self.targets.mode().values)))

    def _measure(self, answers: Tensor) -> Scores:
        if not self.task.labels and float(answers.std()) == 0:
            # No correlation is defined with what is always the same.
            return dict.fromkeys(self.task.metrics, 0.0)
        targets = self.dev_targets.long() if self.task.labels else self.dev_targets
        return {metric: float(METRICS[metric](answers, targets)) for metric in self.task.metrics}


def _tuned(
    model: LanguageModel,
    data: _TaskData,
    settings: GlueConfig,
    seed: int,
    mode: str,
    modes: tuple[str, ...],
    title: str,
) -> dict[str, Scores]:
    """The scores of a copy of the model that was fine-tuned in a mode, in each way that it serves."""
    mine = copy.deepcopy(model)
    mine.set_mode("sparse" if mode == "sparse" else "dense")
    name = f"{title} {data.task.title} {mode} seed {seed}"
    texts, targets = data.texts, data.learnable_targets()
    classifier = fine_tune(mine, texts, targets, len(data.task.labels), settings, seed, name)
    found = {mode: data.score(classifier)}
    if mode == "dense" and "sparse" in modes:
        for ffn in mine.ffns:
            ffn.router.on_permuted(ffn.gating_weight)
        mine.set_mode("sparse")
        found["dense_to_sparse"] = data.score(classifier)
    return found
