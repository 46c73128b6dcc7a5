"""A model divided among the devices (FSDP2): weights, gradients and moments, with checkpoints that are divided too."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ssd_lit.models.language_model import LanguageModel
from ssd_lit.training.checkpoint import Delivery, check_checkpoint, save
from ssd_lit.training.shards import STATE, seal, unsealed_folder


class Shards(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes; its checkpoints are folders that appear whole.

    A checkpoint is read by any number of processes. Saving waits for the disk.
    """

    def __init__(self, processes: int):
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write to the folder `filepath`; `storage_options` is a `Delivery`."""
        delivery = storage_options or Delivery()
        path = Path(filepath)
        part = self.broadcast(unsealed_folder(path) if self.is_global_zero else None)
        assert part is not None
        states = {"state_dict": checkpoint.pop("state_dict")}
        states |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        dcp.save(states, checkpoint_id=part)
        if self.is_global_zero:
            save(checkpoint, part / STATE)
            seal(part)
            if path.exists() and delivery.previous is not None:
                shutil.rmtree(delivery.previous, ignore_errors=True)
                path.replace(delivery.previous)
            shutil.rmtree(path, ignore_errors=True)
            part.replace(path)
            if delivery.done is not None:
                delivery.done()
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        check_checkpoint(Path(checkpoint_path))
        return super().load_checkpoint(checkpoint_path, weights_only)


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Divide the weights of a model among the devices of a mesh of one dimension, layer by layer.

    Layers are gathered in float32, so that a step computes what it computes on one device.
    """
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> Mapping[str, Tensor]:
    """The state of a model, gathered in the memory of the first process's host; empty in the others."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Mapping[str, Any] = get_model_state_dict(model, options=options)
    return state
