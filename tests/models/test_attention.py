"""Attention without masks, and what it takes to compile a loss."""

from typing import Any

import pytest
import torch

from ssd_lit.config import MoEConfig
from ssd_lit.models.language_model import WHOLE_BLOCKS, LanguageModel
from tests.models.test_families import CONTEXT, FAMILIES, SPECIALS, batch, config


def model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    moe = MoEConfig(experts=4, top_k=2, backend="grouped")
    return LanguageModel(config(name, dropout=0.0), moe, SPECIALS, context=CONTEXT)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_blocks_are_attended_to_as_with_a_mask(name: str) -> None:
    """In float64: the eager attention of Transformers adds a mask to every score."""
    built = model(name).double()
    assert built.backbone.config._attn_implementation == WHOLE_BLOCKS
    without = built(batch(name))
    built.backbone.set_attn_implementation("eager")
    torch.testing.assert_close(without, built(batch(name)))


def test_a_saved_model_keeps_its_own_attention() -> None:
    assert WHOLE_BLOCKS not in model("gpt2").backbone.config.to_json_string(use_diff=False)


MODES = [(name, mode) for name in FAMILIES for mode in ("dense", "sparse") if mode == "sparse" or name in FAMILIES[:4]]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_loss_is_one_graph_and_masks_nothing_it_need_not(name: str, mode: Any) -> None:
    torch._dynamo.reset()  # which counts how often it compiles the same code
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    built = model(name)
    built.set_mode(mode)
    compiled = torch.compile(built.loss, backend=keep, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(batch(name)), built.loss(batch(name)))
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(calls) == (6 if name == "t5" else 2)
    if name != "t5":
        assert all(call.kwargs["attn_mask"] is None for call in calls)
        assert all(call.kwargs["is_causal"] == (name != "bert") for call in calls)
