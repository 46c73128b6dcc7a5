"""`ssd-lit plan`: what an experiment will take, before anything runs."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ssd_lit.config import DataConfig, Experiment, FilesSource, RunConfig
from ssd_lit.data.index import VocabInfo, load_index
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.memory import largest_micro_batch, memory_of_device, memory_of_run
from ssd_lit.paths import data_dir
from ssd_lit.records import PhaseRecord, Totals
from ssd_lit.support.devices import count_gpus
from ssd_lit.training.schedule import next_phase, phase_flops, with_steps_for


@dataclass(frozen=True)
class Forecast:
    """What a run will take, each dense phase lasting to its ceiling."""

    config: RunConfig
    phases: Sequence[PhaseRecord]
    shared_steps: int
    """Steps of a first phase that another run trains for it."""
    shared_flops: float

    @property
    def total(self) -> Totals:
        return self.phases[-1].total

    @property
    def flops(self) -> float:
        """FLOPs that are spent for this run alone."""
        return self.total.flops - self.shared_flops

    @property
    def steps(self) -> dict[str, int]:
        """Steps that are taken for this run alone, by mode."""
        sparse = self.total.sparse_steps
        return {"dense": self.total.steps - sparse - self.shared_steps, "sparse": sparse}


class Outlook:
    """An experiment and what its runs will take."""

    def __init__(self, experiment: Experiment, results: Path):
        self.experiment = experiment
        self._data = data_dir(results, experiment.data)

    @cached_property
    def vocab(self) -> VocabInfo:
        """That of the encoded text; before there is one, that of the tokenizer as it is asked for."""
        if (self._data / "tokens" / "index.json").exists():
            return VocabInfo.of(load_index(self._data / "tokens"))
        tokenizer = self.experiment.data.tokenizer
        if tokenizer.folder is not None:
            from ssd_lit.data.tokenizer import load_tokenizer, sentinel_ids

            folder = Path(tokenizer.folder)
            size = load_tokenizer(folder).get_vocab_size(with_added_tokens=True)
            # Which special tokens it has changes no cost; that there are some does.
            return VocabInfo(size, 0, 1, tuple(sentinel_ids(folder)))
        sentinels = range(2, 2 + tokenizer.sentinels)
        return VocabInfo(tokenizer.vocab_size, 0, 1 if tokenizer.mask_token else None, tuple(sentinels))

    @cached_property
    def runs(self) -> dict[str, Forecast]:
        """What each run will take, by name."""
        configs = self.experiment.runs()
        found: dict[str, Forecast] = {}
        # Those last that may spend what another run does.
        for config in sorted(configs, key=lambda config: config.matches is not None):
            if config.matches is not None:
                config = with_steps_for(config, found[config.matches].total.flops, self.vocab)
            found[config.name] = self._forecast(config)
        return {config.name: found[config.name] for config in configs}

    def _forecast(self, config: RunConfig) -> Forecast:
        costs = forward_costs(config.model, config.moe, self.vocab, config.data.sequence_length)
        step_tokens = config.training.batch_size * config.data.sequence_length
        history: list[PhaseRecord] = []
        while (phase := next_phase(config, history)) is not None:
            steps = phase.max_steps
            if phase.mode == "router":
                flops = config.moe.router_steps * config.training.batch_size * costs.router_training()
            else:
                flops = phase_flops(config, phase, costs, phase.first_step + steps)
            spent = Totals(steps, steps if phase.mode == "sparse" else 0, steps * step_tokens, flops)
            before = history[-1].total if history else Totals()
            history.append(phase.record(config, history, before, spent, phase.at_max, []))
        first = history[0] if config.shares_warmup is not None else None
        return Forecast(config, history, first.steps if first else 0, first.flops if first else 0.0)

    def parameters(self, config: RunConfig) -> int:
        return memory_of_run(config, self.vocab).parameters

    def memory(self, config: RunConfig, device_bytes: float | None) -> float:
        """Bytes that training takes on a device, which has so many; None for one that has enough."""
        whole = config.training.micro_batch_size or config.training.local_batch_size
        if device_bytes is not None and config.training.micro_batch_size is None:
            whole = largest_micro_batch(config, self.vocab, device_bytes)
        return memory_of_device(config, self.vocab, whole)

    @cached_property
    def train_tokens(self) -> tuple[int, bool] | None:
        """Tokens of the training text, and whether they are counted or a guess; None where nothing is known yet."""
        if (self._data / "tokens" / "index.json").exists():
            return load_index(self._data / "tokens")["splits"]["train"]["tokens"], True
        size = _bytes_of_text(self.experiment.data)
        return None if size is None else (round(size / _bytes_per_token(self.vocab)), False)

    def step_seconds(self, repeats: int) -> Iterator[tuple[str, float]]:
        """Times steps of each run and mode on this machine; yields the run's name and its seconds in all."""
        import torch

        from ssd_lit.training.timing import step_seconds

        known: dict[str, float] = {}
        for name, run in self.runs.items():
            config = run.config
            torch.set_num_threads(max(1, config.training.threads // config.training.devices))
            seconds = 0.0
            for mode, steps in run.steps.items():
                if not steps:
                    continue
                key = _timed_alike(config, mode)
                if key not in known:
                    known[key] = step_seconds(config, self.vocab, "sparse" if mode == "sparse" else "dense", repeats)
                seconds += steps * known[key]
            yield name, seconds


def side_by_side(config: RunConfig) -> int:
    """How many runs like this one the workflow trains at once on this machine."""
    if gpus := count_gpus():
        return max(1, gpus // config.training.devices)
    return max(1, (os.cpu_count() or 1) // config.training.threads)


def device_bytes() -> int | None:
    """Memory of a GPU of this machine, None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _timed_alike(config: RunConfig, mode: str) -> str:
    """What decides the time of a step: runs with the same are timed once."""
    training = config.training.model_dump(exclude={"steps"})
    moe = config.moe.model_dump() if mode == "sparse" else None
    return json.dumps([mode, config.method == "upcycle", config.model.model_dump(), training, moe])


def _bytes_of_text(data: DataConfig) -> float | None:
    """Bytes of the training text, None if they cannot be seen: of packages, data sets and compressed files."""
    from ssd_lit.data.sources import files_of

    total = 0
    for source in data.sources:
        if not isinstance(source, FilesSource):
            return None
        files = files_of(source)
        if any(path.suffix not in (".txt", ".jsonl", ".ndjson", ".json") for path in files):
            return None
        total += sum(path.stat().st_size for path in files)
    kept = min(total, 1e6 * (data.max_megabytes or math.inf))
    return kept * (1 - data.validation_fraction - data.test_fraction)


def _bytes_per_token(vocab: VocabInfo) -> float:
    """A rule of thumb for English: 3.3 bytes with a vocabulary of 2048, 4.5 with 32,000."""
    return math.log2(vocab.vocab_size) / 3.3
