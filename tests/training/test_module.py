"""What a step of training costs beside its arithmetic."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Bench

TRAINING = {"steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
            "checkpoint_every": 4, "compile": True}  # fmt: skip
MOE = {"experts": 16, "top_k": 2, "backend": "masked"}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of every graph that is compiled from now on; no code is generated."""
    found: list[int] = []
    compile_for_real = torch.compile

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    real = partial(compile_for_real, backend=note, fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function))
    return found


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointed"])
def test_a_mode_compiles_one_layer_however_deep_the_model_is(
    tmp_path: Path, graphs: list[int], more: dict[str, Any]
) -> None:
    """Once, with monitors, validations and checkpoints between; beside it the cross-entropy."""
    model = {"layers": 3, "d_model": 16, "heads": 2, "d_ff": 32}
    bench = Bench(tmp_path, training={**TRAINING, **more}, model=model, moe=MOE)
    bench.phases("ssd")
    assert len(graphs) == 3


def test_every_number_of_experts_is_compiled_however_many_there_are(tmp_path: Path, graphs: list[int]) -> None:
    """More than the eight that torch compiles of one function by default."""
    model = {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 24}
    moe = {**MOE, "experts": 12, "top_k": 12, "k_schedule": {"kind": "linear", "start": 1}}
    Bench(tmp_path, training=TRAINING, model=model, moe=moe).phases("sparse")
    assert len(graphs) == 1 + 12
