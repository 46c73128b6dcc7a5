"""The final model of a run: its loss in both modes and over k, and how sparse it is."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from tqdm import tqdm

from ssd_lit.config import EvaluationConfig, RunConfig
from ssd_lit.data.blocks import TokenBlocks, load_index
from ssd_lit.layout import PhaseRecord, phase_dir
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.models.probe import ffn_inputs
from ssd_lit.moe.ffn import Mode
from ssd_lit.moe.statistics import active_ratio, routing_recall
from ssd_lit.training.checkpoint import build_model, load_weights, read_checkpoint

SPLIT = "validation"
BATCH = 16


@torch.no_grad()
def evaluate_run(
    run_dir: Path, config: RunConfig, settings: EvaluationConfig, chain: list[PhaseRecord], tokens_dir: Path
) -> dict[str, Any]:
    """Measure the last checkpoint of the chain on validation blocks, in fp32; returns evaluation.json.

    Losses are nats a token. `active_ratio` and `active_neurons` (a token and layer, of d_ff) are those of dense
    mode. A model that was never MoEfied has no sparse mode: its sparse figures are null and its curve empty.
    """
    index = load_index(tokens_dir)
    model = build_model(config, vocab_size=index["vocab_size"], end_of_text=index["eos_id"])
    load_weights(model, read_checkpoint(phase_dir(run_dir, chain[-1].index, chain[-1].mode) / "last.ckpt"))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    blocks = TokenBlocks(tokens_dir, SPLIT)
    count = min(settings.blocks, len(blocks))
    subset = torch.utils.data.Subset(blocks, range(count))
    batches = DataLoader(subset, batch_size=BATCH)

    dense, by_layer = _dense(model, batches)
    moefied = any(record.mode == "moefy" for record in chain)
    k = config.moe.top_k
    curve = sorted({k, *(one for one in settings.top_k_curve if one <= config.moe.experts)}) if moefied else []
    scored = {one: _loss(model, batches, "sparse", one) for one in tqdm(curve, desc="top-k curve", disable=None)}
    recall = _recall(model, batches, k) if moefied else None
    ratio = sum(by_layer) / len(by_layer)
    return {
        "split": SPLIT,
        "blocks": count,
        "tokens": count * config.data.sequence_length,
        "loss_dense": dense,
        "loss_sparse": scored.get(k),
        "experts": config.moe.experts if moefied else None,
        "top_k": k if moefied else None,
        "curve": [{"top_k": one, "loss": loss} for one, loss in scored.items()],
        "active_ratio": by_layer,
        "active_neurons": ratio * config.model.d_ff,
        "routing_recall": recall,
    }


def _loss(model: LanguageModel, batches: DataLoader[Any], mode: Mode, k: int) -> float:
    model.set_mode(mode, k)
    mean = MeanMetric().to(_device(model))
    for batch in batches:
        targets = batch["targets"].to(_device(model))
        mean.update(model.loss(batch["inputs"].to(_device(model)), targets), weight=targets.numel())
    return float(mean.compute())


def _dense(model: LanguageModel, batches: DataLoader[Any]) -> tuple[float, list[float]]:
    """Loss in dense mode, and the active-neuron ratio of each layer."""
    loss = _loss(model, batches, "dense", 1)
    ratios = [
        [active_ratio(ffn, x) for ffn, x in zip(model.ffns, seen, strict=True)] for seen in _inputs(model, batches)
    ]
    return loss, torch.tensor(ratios).mean(dim=0).tolist()


def _recall(model: LanguageModel, batches: DataLoader[Any], k: int) -> list[float]:
    """Routing recall of each layer on the tokens that sparse mode itself brings there."""
    model.set_mode("sparse", k)
    recalls = [
        [routing_recall(ffn, x) for ffn, x in zip(model.ffns, seen, strict=True)] for seen in _inputs(model, batches)
    ]
    return torch.tensor(recalls).mean(dim=0).tolist()


def _inputs(model: LanguageModel, batches: DataLoader[Any]) -> list[list[Tensor]]:
    return [ffn_inputs(model, batch["inputs"].to(_device(model))) for batch in list(batches)[:8]]


def _device(model: LanguageModel) -> torch.device:
    return model.ffns[0].w_in.device
