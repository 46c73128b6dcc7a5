"""A run's final model behind MLflow's interface: scores texts and continues them.

`mlflow.pyfunc.load_model` and `mlflow models serve` call `_load_pyfunc` for a model that `ssd_lit.tracking.models`
logged.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ssd_lit.data.objectives import build_objective
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.blimp import log_likelihoods
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.models.generation import Generator
from ssd_lit.models.language_model import attend_beside_padding
from ssd_lit.moe.names import Mode
from ssd_lit.run import Run
from ssd_lit.support.files import read_json
from ssd_lit.training.checkpoint import final_model


class ServedModel:
    """A final model in one mode, with its tokenizer."""

    def __init__(self, run: Run, mode: Mode):
        self._model = final_model(run).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._objective = build_objective(self._model.objective_name, run.vocab)
        self._tokenizer = load_tokenizer(run.tokenizer)
        self._config, self._eos, self._mode = run.config, run.vocab.eos_id, mode
        backbone = self._model.backbone
        self._generator: Generator | None = None
        if self._model.objective_name == "causal":
            backbone.config.use_cache = True
            attend_beside_padding(backbone)
            self._generator = Generator(backbone)

    def predict(self, texts: pd.DataFrame, params: Mapping[str, int] | None = None) -> pd.DataFrame:
        """Scores of the column `text`: its tokens, the mean loss in nats a token, and the perplexity.

        Texts are cut to the length of the training's blocks. A model that predicts hidden tokens is scored on those
        that its objective hides, always the same ones. With the parameter `new_tokens` a column `continuation` holds
        that many likeliest tokens after each text; `top_k` is the number of experts a token in sparse mode, 0 for the
        run's own. Raises ValueError for a top_k that the model does not have, and where it cannot continue a text.
        """
        new_tokens, top_k = (int((params or {}).get(name, 0)) for name in ("new_tokens", "top_k"))
        moe = self._config.moe
        if not 0 <= top_k <= moe.experts:
            raise ValueError(f"top_k {top_k}: allowed are 1 to {moe.experts}, and 0 for {moe.top_k}")
        self._model.set_mode(self._mode, top_k or moe.top_k)
        text = [str(value) for value in texts["text"]]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(text, add_special_tokens=False)]
        losses = self._losses([tokens[: self._config.data.sequence_length] for tokens in ids])
        result = pd.DataFrame(
            {
                "text": text,
                "tokens": [min(len(tokens), self._config.data.sequence_length) for tokens in ids],
                "loss": losses,
                "perplexity": [None if loss is None else perplexity(loss) for loss in losses],
            }
        )
        if new_tokens > 0:
            result["continuation"] = [self._continued(tokens, new_tokens) for tokens in ids]
        return result

    def _losses(self, ids: Sequence[Sequence[int]]) -> list[float | None]:
        """The loss of each text, None where it has too few tokens for one."""
        if self._generator is not None:
            sums = log_likelihoods(self._model, ids, self._eos)
            return [-total / len(tokens) if tokens else None for total, tokens in zip(sums, ids, strict=True)]
        return [self._loss_of_hidden(tokens) if len(tokens) > 1 else None for tokens in ids]

    @torch.no_grad()
    def _loss_of_hidden(self, ids: Sequence[int]) -> float:
        tokens = torch.tensor([ids])
        shape = (*tokens.shape, self._objective.noise_per_token)
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        batch = self._objective({"inputs": tokens, "targets": tokens}, noise)
        return float(self._model.loss({name: value.to(self._device) for name, value in batch.items()}))

    def _continued(self, ids: Sequence[int], new_tokens: int) -> str:
        """The likeliest tokens after a text, which follows an end-of-text token as documents do in training."""
        if self._generator is None:
            raise ValueError(f"new_tokens {new_tokens}: a {self._config.model.family} model does not continue texts")
        prompt = torch.tensor([[self._eos, *ids]], device=self._device)
        found = self._generator(prompt, new_tokens)[0, prompt.shape[1] :].tolist()
        return str(self._tokenizer.decode(found))

    @property
    def _device(self) -> torch.device:
        return self._model.ffns[0].w_in.device


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedModel:
    """The model that a file run.json tells of, from the run's folder.

    That is looked for in the results folder above the file, which may have moved, then where it was. Raises ValueError
    if it is not there, or was trained anew since.
    """
    place = read_json(Path(path))
    for results in (*Path(path).absolute().parents, Path(place["results"])):
        folder = results / place["run"]
        if (folder / "config.yaml").exists():
            break
    else:
        raise ValueError(f"{place['results']}: holds no run {place['run']}, whose weights this model is made of")
    run = Run.open(folder)
    if run.final().weights != place["weights"]:
        raise ValueError(f"{folder}: was trained anew since this model was logged; load its newest version")
    return ServedModel(run, place["mode"])
