"""Model cards: what a folder holds, from which data and settings it came, its scores, and its limits."""

from collections.abc import Sequence
from typing import Any

import yaml

from ssd_lit.huggingface.experts import Experts
from ssd_lit.models.family import family as family_of
from ssd_lit.run import Run

CARD = "README.md"
PIPELINES = {"causal": "text-generation", "masked": "fill-mask", "spans": "text2text-generation"}
"""The task of the hub's for each objective."""

UNKNOWN_DATA = "See the card of the model that this one was made from: nothing is recorded here."
UNKNOWN_SCORES = "None were measured with these weights."
LIMITS = (
    "It continues or completes text as its training data does, mistakes and prejudice included. It was not trained to "
    "follow instructions, nor to be safe.",
)
SPARSE_LIMITS = (
    "Sparse mode needs ssd_lit. Transformers and other programs open the folder as the dense model.",
    "Scores in sparse mode are those of the number of experts a token that they name; with fewer they are worse.",
    "Sparse mode reads fewer weights for a token, but all of them stay in memory.",
)


def card_of_run(run: Run, experts: Experts | None, scores: str = "") -> str:
    """The card of a run's exported model; `scores` are tables of what was measured."""
    config = run.config
    total = run.chain()[-1].total
    spent = (
        f"Trained for {total.steps:,} steps on {total.tokens:,} tokens ({total.flops:.2e} FLOPs), seed {config.seed}."
    )
    sections = {
        name: getattr(config, name).model_dump(mode="json")
        for name in ("model", "moe", "optim", "training", "switching")
    }
    settings = yaml.safe_dump({"method": config.method, **sections}, sort_keys=False, allow_unicode=True)
    return _card(
        f"{config.experiment}: {config.name}",
        config.model.family,
        experts,
        data=_data(run),
        settings=f"{spent}\n\n```yaml\n{settings}```",
        scores=scores or UNKNOWN_SCORES,
        limits=[f"It was trained on blocks of {config.data.sequence_length} tokens; longer text is unknown to it."],
    )


def card_of_moefied(name: str, family: str, experts: Experts, *, seed: int) -> str:
    """The card of a checkpoint's model that was MoEfied; `name` is that of the checkpoint."""
    return _card(
        f"{name}, MoEfied",
        family,
        experts,
        data=f"Its weights are those of `{name}`, in another order; no training was added. {UNKNOWN_DATA}",
        settings=f"Seed {seed}.",
        scores=UNKNOWN_SCORES,
    )


def card_of_saved(model: Any, experts: Experts) -> str:
    """The card of a model that was opened, perhaps trained, and saved."""
    return _card(
        f"{type(model).__name__} with experts",
        model.config.model_type,
        experts,
        data=UNKNOWN_DATA,
        settings="Saved by `save_pretrained`; the training before that is not recorded here.",
        scores=UNKNOWN_SCORES,
    )


def _card(
    title: str,
    family: str,
    experts: Experts | None,
    *,
    data: str,
    settings: str,
    scores: str,
    limits: Sequence[str] = (),
) -> str:
    tags = ["ssd-lit", *(["mixture-of-experts", "activation-sparsity"] if experts else [])]
    header = {"library_name": "transformers", "pipeline_tag": PIPELINES[family_of(family).objective], "tags": tags}
    about, use = "A dense model.", 'model = ssd_lit.load("FOLDER")'
    if experts is not None:
        about = (
            f"One set of weights that runs densely or as a Mixture of Experts: {experts.experts} experts in each FFN, "
            f"of which a token uses {_choice(experts)}. Grouping: {experts.construction}; router: {experts.router}."
        )
        use = 'model = ssd_lit.load("FOLDER", mode="sparse")  # or "dense"'
    bounds = [*limits, *LIMITS, *(SPARSE_LIMITS if experts else ())]
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {title}

{about} Family: {family}. Made with ssd_lit (Switchable Sparse-Dense Learning, arXiv 2410.03440).

```python
import ssd_lit

{use}
```

## Data

{data}

## Settings

{settings}

## Scores

{scores}

## Limits

{chr(10).join(f"- {bound}" for bound in bounds)}
"""


def _choice(experts: Experts) -> str:
    if experts.threshold is None:
        return str(experts.top_k)
    return f"those whose score is at least {experts.threshold} of the best one's"


def _data(run: Run) -> str:
    """The card of the run's text, its title left out."""
    path = run.data / "documents" / "card.md"
    if not path.is_file():
        return f"Text `{run.config.data.name}`; its card is not there any more."
    title, _, rest = path.read_text(encoding="utf-8").partition("\n")
    return f"{title.lstrip('# ')}\n\n{rest.strip()}"
