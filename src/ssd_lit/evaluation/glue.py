"""GLUE scores of a run's final bert after fine-tuning, in both modes."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score
from tqdm import tqdm

from ssd_lit.config import GlueConfig, OptimConfig
from ssd_lit.data.benchmarks import TASKS, Task, read_task
from ssd_lit.evaluation.resumable import ResumableResults
from ssd_lit.models.language_model import LanguageModel, attend_beside_padding
from ssd_lit.training.optim import build_optimizer, build_scheduler

SCORED = 64
"""Examples scored at once."""


@dataclass(frozen=True)
class Texts:
    """Tokenized examples, padded on the right."""

    tokens: Tensor
    """[N, S], on the device."""
    lengths: Tensor
    """[N], on the host, for the width of batches."""
    cut: int
    """The number of examples that were too long."""

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, S] of those rows, S the longest length among them, and a mask [B, S] of the real ones."""
        lengths = self.lengths[rows]
        width, device = int(lengths.max()), self.tokens.device
        tokens = self.tokens[rows.to(device), :width]
        return tokens, torch.arange(width, device=device) < lengths.to(device)[:, None]


def encode(
    texts: Sequence[Sequence[str]], tokenizer: Tokenizer, eos_id: int, longest: int, device: torch.device
) -> Texts:
    """Tokenize texts or pairs of texts, as rows of at most `longest` tokens.

    An end-of-text token ends each text, and one more starts the row: so documents follow each other in pre-training,
    and the tokenizer has no [CLS] and no [SEP]. A row that is too long loses tokens at the end of its longest text.
    """
    columns: list[list[list[int]]] = [
        [encoding.ids for encoding in tokenizer.encode_batch_fast(list(column), add_special_tokens=False)]
        for column in zip(*texts, strict=True)
    ]
    room = longest - len(columns) - 1  # beside the end-of-text tokens
    examples = list(zip(*columns, strict=True))
    rows = [
        torch.tensor([eos_id, *(token for part in _shortened(example, room) for token in (*part, eos_id))])
        for example in examples
    ]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos_id)
    cut = sum(sum(map(len, example)) > room for example in examples)
    return Texts(padded.to(device), torch.tensor([len(row) for row in rows]), cut)


def _shortened(parts: Sequence[list[int]], most: int) -> list[list[int]]:
    """Drop tokens at the end of the longest part, one at a time, until at most `most` are left in all."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > most:
        lengths[lengths.index(max(lengths))] -= 1
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


class Classifier(nn.Module):
    """An encoder with a linear head on the mean of its last hidden states; tokens [B, S] -> outputs [B, C].

    The mean, not the first token's state: pre-training makes no token represent its whole text.
    """

    def __init__(self, model: LanguageModel, outputs: int, dropout: float = 0.1):
        super().__init__()
        attend_beside_padding(model.backbone)
        self.model = model
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(model.backbone.config.hidden_size, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        # Averaged in fp32 under autocast too.
        hidden = self.model.backbone.base_model(input_ids=tokens, attention_mask=real).last_hidden_state.float()
        weights = real[..., None].float()
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        outputs: Tensor = self.head(self.dropout(pooled))
        return outputs


def fine_tune(
    model: LanguageModel, texts: Texts, targets: Tensor, classes: int, settings: GlueConfig, seed: int, title: str
) -> Classifier:
    """Train the model in its current mode with a new head: classification, or regression if `classes` is 0.

    `targets` [N] are class ids or scores. All weights are trained but the routers' centres and the weights of frozen
    routers; a learned gate has no balancing loss here. A function of the weights and the seed, on one machine.
    """
    torch.manual_seed(seed)
    device = texts.tokens.device
    classifier = Classifier(model, classes or 1).to(device).train()
    targets = targets.to(device)
    steps = settings.epochs * -(-len(texts) // settings.batch_size)
    warmup = round(settings.warmup_fraction * steps)
    optim = OptimConfig(
        lr=settings.lr, weight_decay=settings.weight_decay, beta2=0.999, warmup_steps=warmup,
        schedule="wsd", decay_fraction=1 - warmup / steps, min_lr_fraction=0.0,
    )  # fmt: skip
    optimizer = build_optimizer(classifier, optim)
    scheduler = build_scheduler(optimizer, optim, steps)
    for rows in tqdm(_shuffled(len(texts), settings, seed), desc=title, total=steps, unit="step", disable=None):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = classifier(*texts.batch(rows)).float()
        labels = targets[rows.to(device)]
        loss = F.cross_entropy(outputs, labels.long()) if classes else F.mse_loss(outputs[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), optim.grad_clip)
        optimizer.step()
        scheduler.step()
    return classifier.eval()


def _shuffled(count: int, settings: GlueConfig, seed: int) -> Iterator[Tensor]:
    """The example indices of each batch, shuffled anew in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        yield from torch.randperm(count, generator=generator).split(settings.batch_size)


@torch.no_grad()
def outputs_for(classifier: Classifier, texts: Texts) -> Tensor:
    """The classifier's outputs for every example, [N, C], in fp32 and on the host."""
    order = texts.lengths.argsort(stable=True)
    outputs = torch.cat([classifier(*texts.batch(rows)) for rows in order.split(SCORED)]).float().cpu()
    return torch.empty_like(outputs).index_copy_(0, order, outputs)


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

    - scores: one entry a task, mode and seed. Mode dense is fine-tuned and scored densely. dense_to_sparse is the same
      model scored with its experts: neurons stay in their experts, whose centres are recomputed from the fine-tuned
      rows; a trained router stays unchanged. Mode sparse is fine-tuned and scored with experts and the same routers.
    - baseline: the score of always predicting the commonest training class; no correlation, 0, for STS-B.
    - examples: the numbers of train and dev examples, and of those cut to `longest` tokens.

    Does not change `model`.
    """
    scores, baseline, examples = [], {}, {}
    for name in settings.tasks:
        task = _TaskData(name, settings, tokenizer, eos_id, longest, model.ffns[0].w_in.device)
        baseline[name], examples[name] = task.baseline(), task.counts
        for seed in settings.seeds:
            for mode in modes:
                tune = partial(_tuned, model, task, settings, seed, mode, modes, title)
                by_mode = pieces.get(f"glue-{name}-{mode}-seed{seed}", tune)
                scores += [{"task": name, "mode": scored, "seed": seed, **values} for scored, values in by_mode.items()]
    return {"examples": examples, "baseline": baseline, "scores": scores}


class _TaskData:
    """A task's tokenized examples and their targets."""

    def __init__(
        self, name: str, settings: GlueConfig, tokenizer: Tokenizer, eos_id: int, longest: int, device: torch.device
    ):
        self.task: Task = TASKS[name]
        source = Path(settings.folder)
        train, dev = read_task(source, name, "train", settings.limit), read_task(source, name, "dev")
        self.texts, self.dev_texts = (
            encode([example.texts for example in part], tokenizer, eos_id, longest, device) for part in (train, dev)
        )
        self.targets, self.dev_targets = (torch.tensor([example.target for example in part]) for part in (train, dev))
        self.counts = {"train": len(train), "dev": len(dev), "cut": self.texts.cut + self.dev_texts.cut}

    def learnable_targets(self) -> Tensor:
        """Classes unchanged; scores standardised to mean 0 and variance 1, which changes no correlation."""
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
            # A correlation with a constant is not defined.
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
    """The scores of a copy of the model fine-tuned in one mode, by the mode in which it is scored."""
    model = copy.deepcopy(model)
    model.set_mode("sparse" if mode == "sparse" else "dense")
    name = f"{title} {data.task.title} {mode} seed {seed}"
    texts, targets = data.texts, data.learnable_targets()
    classifier = fine_tune(model, texts, targets, len(data.task.labels), settings, seed, name)
    scores = {mode: data.score(classifier)}
    if mode == "dense" and "sparse" in modes:
        for ffn in model.ffns:
            ffn.router.on_permuted(ffn.gating_weight)
        model.set_mode("sparse")
        scores["dense_to_sparse"] = data.score(classifier)
    return scores
