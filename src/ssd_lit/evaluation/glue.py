"""What the final bert of a run is worth on GLUE once it is fine-tuned, in both modes."""

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
    """Examples as a model reads them, filled up behind."""

    tokens: Tensor
    """[N, S], on the device."""
    lengths: Tensor
    """[N], on the host, which cuts batches by it."""
    cut: int
    """How many of them were too long."""

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Those rows, tokens [B, S] and which of them are real [B, S], no longer than the longest of them."""
        lengths = self.lengths[rows]
        width, device = int(lengths.max()), self.tokens.device
        tokens = self.tokens[rows.to(device), :width]
        return tokens, torch.arange(width, device=device) < lengths.to(device)[:, None]


def encode(
    texts: Sequence[Sequence[str]], tokenizer: Tokenizer, eos_id: int, longest: int, device: torch.device
) -> Texts:
    """Texts or pairs of them as rows of at most `longest` tokens.

    Each text is ended by the end-of-text token, and one more stands before the first: the documents of the
    pre-training follow each other so, and our tokenizer has no [CLS] and no [SEP]. Too long a row loses tokens at
    the end of its longest text.
    """
    columns: list[list[list[int]]] = [
        [one.ids for one in tokenizer.encode_batch_fast(list(column), add_special_tokens=False)]
        for column in zip(*texts, strict=True)
    ]
    room = longest - len(columns) - 1  # beside the end-of-text tokens
    whole = list(zip(*columns, strict=True))
    parts = [_shortened(one, room) for one in whole]
    rows = [torch.tensor([eos_id, *(token for part in one for token in (*part, eos_id))]) for one in parts]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos_id)
    cut = sum(sum(map(len, one)) > room for one in whole)
    return Texts(padded.to(device), torch.tensor([len(row) for row in rows]), cut)


def _shortened(parts: Sequence[list[int]], most: int) -> list[list[int]]:
    """The parts without the last tokens of the longest of them, so that no more than `most` are left."""
    kept = [len(part) for part in parts]
    while sum(kept) > most:
        kept[kept.index(max(kept))] -= 1
    return [part[:count] for part, count in zip(parts, kept, strict=True)]


class Classifier(nn.Module):
    """An encoder with a linear head on the mean of its last hidden states; tokens [B, S] -> outputs [B, C].

    The mean, and not the first token's state: pre-training has made no token stand for its whole text.
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
        # Averaged in full precision under autocast too.
        hidden = self.model.backbone.base_model(input_ids=tokens, attention_mask=real).last_hidden_state.float()
        weights = real[..., None].float()
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        outputs: Tensor = self.head(self.dropout(pooled))
        return outputs


def fine_tune(
    model: LanguageModel, texts: Texts, targets: Tensor, classes: int, settings: GlueConfig, seed: int, title: str
) -> Classifier:
    """Train the model, in the mode that it is in, and a head for it: on classes, or on a score if there are none.

    `targets` [N] are numbers of classes, or scores. All weights but the routers' centres are trained; those of a
    frozen router stay, and a learned gate has no balancing loss here. A function of the weights and the seed, on one
    machine.
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
        mine = targets[rows.to(device)]
        loss = F.cross_entropy(outputs, mine.long()) if classes else F.mse_loss(outputs[:, 0], mine)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), optim.grad_clip)
        optimizer.step()
        scheduler.step()
    return classifier.eval()


def _shuffled(count: int, settings: GlueConfig, seed: int) -> Iterator[Tensor]:
    """The numbers of the examples of each batch, every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        yield from torch.randperm(count, generator=generator).split(settings.batch_size)


@torch.no_grad()
def outputs_for(classifier: Classifier, texts: Texts) -> Tensor:
    """What the classifier says of every example, [N, C], in fp32 and on the host."""
    order = texts.lengths.argsort(stable=True)
    found = torch.cat([classifier(*texts.batch(rows)) for rows in order.split(SCORED)]).float().cpu()
    return torch.empty_like(found).index_copy_(0, order, found)


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
