"""Reading checkpoints and building what goes into them, with and without Lightning."""

import zipfile
from collections.abc import Iterator
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
from ssd_lit.support.files import whole_file

PREFIX = "model."  # The model is `Pretraining.model`, so its weights carry this prefix in a checkpoint.

ROUTER = ".router."  # In the names of a router's weights, and of no others.

SWITCH_STATE = "PhaseSwitch"  # The phase switch keeps its state under this key of a checkpoint's callbacks.


def build_model(
    config: RunConfig,
    vocab: VocabInfo,
    *,
    router: str | None = None,
    read_weights: bool = True,
    draw_weights: bool = True,
) -> LanguageModel:
    """The run's model with its first weights, a function of its config and seed.

    `router` names another way to choose experts than the config's. Where a checkpoint is loaded next, a pretrained
    one need not be read; where all of its weights are loaded, the routers' too, none need be drawn.
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
    """Leaves weights as their memory happens to be: drawing those of 124 M parameters takes a core three seconds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


def final_model(run: Run) -> LanguageModel:
    """The model at the end of a run, with the router that was trained for it if one was; on the CPU, dense mode.

    Raises ValueError if the run is not trained to its end.
    """
    stage = run.final().stage
    model = build_model(run.config, run.vocab, router=run.router, read_weights=False, draw_weights=False)
    load_weights(model, read_checkpoint(run.checkpoint(stage)))
    return model


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all; OSError if the disk takes no more."""
    with whole_file(path) as part:
        save(content, part)


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to a file that nobody reads yet; OSError if the disk takes no more."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # Told to write no more, torch complains that its archive has no end.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only; ValueError if it is missing or damaged.

    Tensors that are `mapped` are read when they are looked at, and the file must stay until they are gone.
    """
    if not path.exists():
        raise ValueError(f"{path}: not found; `ssd-lit train` makes it anew")
    try:
        check_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run again") from None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({told}); delete it and run again") from error
    return content


def check_checkpoint(path: Path) -> None:
    """Raise ValueError if a checkpoint is damaged.

    torch.save writes a zip archive with a checksum for each of its records, which torch.load does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # No record is a folder: one that says so would be left unread, its memory as it happened to be.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # an archive that is damaged raises whatever its reader stumbles over
        raise ValueError(f"{path}: damaged ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: damaged (the checksum of {damaged} does not fit)")


def load_weights(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load the weights of a checkpoint into the model, every one of them."""
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()})


def load_beside_routers(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load all weights but the routers', which may be of another kind or of other experts in the checkpoint."""
    theirs = {name: value for name, value in checkpoint["state_dict"].items() if ROUTER not in name}
    ours = {name: value for name, value in weights_of(model).items() if ROUTER in name}
    load_weights(model, {"state_dict": theirs | ours})


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that a checkpoint gives them."""
    return {PREFIX + name: value for name, value in model.state_dict().items()}


class Start(NamedTuple):
    """What a training process goes on from."""

    history: list[PhaseRecord]
    """The phases behind it."""
    checkpoint: Path | None = None
    """The state of the run there; None before there is any."""
    step: int = 0
    """The steps of the run that are done in it."""


def starting_point(run: Run) -> Start:
    """The farthest that a run has come: its rolling checkpoint, a phase that was kept, or the end of a stage.

    What was made from anything else than there is now does not count. A damaged checkpoint is named and removed, and
    the one before it taken.
    """
    phases, inputs = run.phases(), run.made_from()
    done = [stage for stage in run.training_stages if run.is_done(stage) and run.has_checkpoint(stage)]
    start = Start([])
    if done:
        record = run.stage(done[-1])
        start = Start(phases[: record.phase + 1], run.checkpoint(done[-1]), record.step)
    for path in _own_checkpoints(run, phases):
        try:
            content = read_checkpoint(path, mapped=True)
        except ValueError as error:
            path.unlink()
            print(f"{str(error).partition(';')[0]}; going on from what was before it", flush=True)
            continue
        state = content["callbacks"][SWITCH_STATE]
        if state["inputs"] == inputs and len(start.history) <= state["phase"] <= len(phases):
            return Start(phases[: state["phase"]], path, content["global_step"])
    return start


def spent_elsewhere(run: Run) -> Totals:
    """What the run whose final model this one starts from had spent."""
    return Totals() if run.config.parent_run is None else run.other(run.config.parent_run).chain()[-1].total


def _own_checkpoints(run: Run, phases: list[PhaseRecord]) -> Iterator[Path]:
    """Those within stages, the newest first."""
    rolling = rolling_checkpoint(run.folder)
    kept = [phase_dir(run.folder, record.index, record.mode) / "weights.ckpt" for record in reversed(phases)]
    yield from (path for path in (rolling, previous_checkpoint(rolling), *kept) if path.exists())
