"""Reading and writing checkpoints, building models from them, and finding where a run resumes."""

import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_lit.config import RunConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.paths import phase_dir, previous_checkpoint, rolling_checkpoint
from ssd_lit.records import PhaseRecord, Totals
from ssd_lit.run import Run
from ssd_lit.support.files import remove, whole_file
from ssd_lit.training.shards import check_shards, read_shards

PREFIX = "model."  # Of the weights' names in a checkpoint: the model is `Pretraining.model`.
ROUTER = ".router."  # In the names of a router's weights, and of no others.
SWITCH_STATE = "PhaseSwitch"  # Key of the phase switch's state among a checkpoint's callbacks.


def build_model(
    config: RunConfig,
    vocab: VocabInfo,
    *,
    router: str | None = None,
    read_weights: bool = True,
    draw_weights: bool = True,
) -> LanguageModel:
    """Build the run's model with its initial weights, a function of its config and seed.

    `router` replaces the config's router. A caller that loads a checkpoint next can skip reading pretrained weights
    (`read_weights`); one that loads all weights, the routers' included, can skip drawing them (`draw_weights`).
    """
    torch.manual_seed(config.seed)
    with nullcontext() if draw_weights else _Undrawn():  # type: ignore[no-untyped-call]
        return LanguageModel(
            config.model,
            config.moe,
            vocab,
            context=config.data.sequence_length,
            router=router,
            upcycled=config.method == "upcycle",
            read_weights=read_weights,
        )


class _Undrawn(TorchDispatchMode):
    """Leaves weights uninitialised: drawing 124 M parameters takes one core three seconds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


def final_model(run: Run) -> LanguageModel:
    """The final model of a run, with its post-hoc router if one was trained; on the CPU, in dense mode.

    Raises ValueError if the run is not trained to its end.
    """
    path = run.checkpoint(run.final().stage)
    model = build_model(run.config, run.vocab, router=run.router, read_weights=False, draw_weights=False)
    load_weights(model, read_checkpoint(path))
    return model


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values atomically. Raises OSError if the disk is full."""
    with whole_file(path) as part:
        save(content, part)


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to a temporary file. Raises OSError if the disk is full."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # After a failed write torch raises that its archive is incomplete, and hides the cause.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only. Raises ValueError if it is missing or damaged.

    Tensors that are `mapped` are read on first use, and need the file as long as they live. Of a folder of shards the
    moments are left out, and if `mapped` the weights.
    """
    if not path.exists():
        raise ValueError(f"{path}: not found; `ssd-lit train` writes it again")
    try:
        check_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run again") from None
    if path.is_dir():
        return read_shards(path, mapped=mapped)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); delete it and run again") from error
    return content


def check_checkpoint(path: Path) -> None:
    """Raise ValueError if a checkpoint is damaged, a file or a folder of shards.

    torch.save writes a zip archive with a checksum for each record, which torch.load does not verify.
    """
    if path.is_dir():
        check_shards(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # No record is a folder: torch.load would skip one marked as such, and leave its tensor uninitialised.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise ValueError(f"{path}: damaged ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: damaged (the checksum of {damaged} does not fit)")


def load_weights(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load all weights of a checkpoint into the model."""
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()})


def load_beside_routers(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load all weights except the routers', which may differ in kind or in number of experts in the checkpoint."""
    loaded = {name: value for name, value in checkpoint["state_dict"].items() if ROUTER not in name}
    routers = {name: value for name, value in weights_of(model).items() if ROUTER in name}
    load_weights(model, {"state_dict": loaded | routers})


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that a checkpoint gives them."""
    return {PREFIX + name: value for name, value in model.state_dict().items()}


class Delivery(NamedTuple):
    """Options of writing a checkpoint."""

    previous: Path | None = None
    """Where the replaced file is moved to; None deletes it."""
    done: Callable[[], None] | None = None
    """Called once the file is written."""


class Start(NamedTuple):
    """Where training resumes."""

    history: list[PhaseRecord]
    """The phases that are done."""
    checkpoint: Path | None = None
    """The state after them; None if there is none yet."""
    step: int = 0
    """The run's steps that are done in it."""


def starting_point(run: Run) -> Start:
    """The furthest state of a run: its rolling checkpoint, a kept phase, or the end of a stage.

    Ignores states made from other inputs than the current ones. Removes a damaged checkpoint, with a message, and
    falls back to the one before it.
    """
    phases, inputs = run.phases(), run.made_from()
    done = [stage for stage in run.training_stages if run.is_done(stage) and run.has_checkpoint(stage)]
    start = Start([])
    if done:
        record = run.stage(done[-1])
        start = Start(phases[: record.phase + 1], run.checkpoint(done[-1]), record.step)
    rolling = rolling_checkpoint(run.folder)
    kept = [phase_dir(run.folder, record.index, record.mode) / "weights.ckpt" for record in reversed(phases)]
    for path in filter(Path.exists, [rolling, previous_checkpoint(rolling), *kept]):  # newest first
        try:
            content = read_checkpoint(path, mapped=True)
        except ValueError as error:
            remove(path)
            print(f"{str(error).partition(';')[0]}; resuming from the checkpoint before it", flush=True)
            continue
        state = content["callbacks"][SWITCH_STATE]
        if state["inputs"] == inputs and len(start.history) <= state["phase"] <= len(phases):
            return Start(phases[: state["phase"]], path, content["global_step"])
    return start


def spent_elsewhere(run: Run) -> Totals:
    """The totals of the run whose final model this one starts from."""
    return Totals() if run.config.parent_run is None else run.other(run.config.parent_run).chain()[-1].total
