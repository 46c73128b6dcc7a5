"""Layers that are compiled one by one: the same losses and gradients, from few graphs without breaks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from ssd_lit.config import MoEConfig
from ssd_lit.models.language_model import LanguageModel
from tests.models.test_families import CONTEXT, FAMILIES, SPECIALS, batch, config

KINDS = {"t5": 4}
"""Layers that differ in more than their weights; all are alike in other families."""
CASES = [
    *((name, "sparse", "center", False) for name in FAMILIES),
    ("gpt2", "dense", "center", False),
    ("bert", "dense", "center", True),
    ("gpt2", "sparse", "gate", True),
    ("t5", "sparse", "gate", False),
]
"""Family, mode, router, and whether activations are computed again."""


def model(name: str, router: str) -> LanguageModel:
    torch.manual_seed(0)
    moe = MoEConfig(experts=4, top_k=2, backend="masked", router=router)
    return LanguageModel(config(name, dropout=0.0), moe, SPECIALS, context=CONTEXT).double()


def losses(built: LanguageModel, name: str) -> Tensor:
    """The loss, and those of a learned router."""
    loss = built.loss(batch(name))
    return torch.cat([loss[None], built.gate_losses()]) if built.ffns[0].gate_losses is not None else loss[None]


@pytest.mark.parametrize(("name", "mode", "router", "checkpointed"), CASES)
def test_compiled_layers_give_the_same_losses_and_gradients(
    name: str, mode: Any, router: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # which counts how often it compiles the same code
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    plain, compiled = model(name, router), model(name, router)
    if checkpointed:
        compiled.checkpoint_activations()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=keep, fullgraph=True))
        compiled.compile_layers()
    found = []
    for built in (plain, compiled):
        built.set_mode(mode)
        of = losses(built, name)
        of.sum().backward()
        found.append((of, {key: p.grad for key, p in built.named_parameters()}))
    torch.testing.assert_close(found[1], found[0])
    assert any(grad is not None for grad in found[0][1].values())
    *layers, _ = graphs  # the last is the cross-entropy
    assert len(layers) == KINDS.get(name, 1)
    if name != "t5" and not checkpointed:
        (call,) = (node for node in layers[0].graph.nodes if "scaled_dot_product" in str(node.target))
        assert call.kwargs["attn_mask"] is None
        assert call.kwargs["is_causal"] == (name != "bert")
