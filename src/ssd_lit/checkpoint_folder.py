"""What a folder with a Hugging Face checkpoint says about itself, found without loading or running any of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_lit.files import read_json

# Our names for a shape, and those of each family's config.json.
KEYS: dict[str, dict[str, str]] = {
    "gpt2": {
        "layers": "n_layer", "d_model": "n_embd", "heads": "n_head", "d_ff": "n_inner",
        "activation": "activation_function",
    },
    "bert": {
        "layers": "num_hidden_layers", "d_model": "hidden_size", "heads": "num_attention_heads",
        "d_ff": "intermediate_size", "activation": "hidden_act",
    },
    "t5": {"layers": "num_layers", "d_model": "d_model", "heads": "num_heads", "d_ff": "d_ff"},
    "llama": {
        "layers": "num_hidden_layers", "d_model": "hidden_size", "heads": "num_attention_heads",
        "d_ff": "intermediate_size", "activation": "hidden_act",
    },
}  # fmt: skip

CODE_KEYS = frozenset({"auto_map", "attn_implementation", "_attn_implementation", "transformers_weights"})
"""What a config.json could have code fetched by, or other weights read."""


def checkpoint_shape(folder: Path) -> dict[str, Any]:
    """Family, layers, d_model, heads, d_ff and activation of the checkpoint in a folder.

    Raises ValueError if the folder has no config.json of a supported family or no weights as safetensors; weights
    that are pickled could run code when they are read, and are refused.
    """
    content = model_settings(folder)
    family = content["model_type"]
    weight_files(folder)
    shape = {ours: content[theirs] for ours, theirs in KEYS[family].items() if content.get(theirs) is not None}
    if family == "gpt2" and "d_model" in shape:
        shape.setdefault("d_ff", 4 * shape["d_model"])
    if family == "t5":
        projection = content.get("feed_forward_proj", "relu")
        shape["activation"] = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    unknown = [theirs for ours, theirs in KEYS[family].items() if ours not in shape]
    if unknown:
        raise ValueError(f"{folder}: config.json does not say {', '.join(unknown)}")
    return {"family": family, **shape}


def model_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, without what could lead to code.

    Raises ValueError if there is none, or none of a whole model of a supported family in plain weights.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in folder {str(folder)!r}" + ("" if folder.is_dir() else ": no such folder"))
    content = read_json(folder / "config.json")
    family = content.get("model_type") if isinstance(content, Mapping) else None
    if family not in KEYS:
        raise ValueError(f"{folder}: model_type {family!r}; allowed: {', '.join(KEYS)}")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: holds an adapter; merge it into the model first")
    if content.get("quantization_config") is not None:
        raise ValueError(f"{folder}: its weights are quantized; give the model they were made from")
    return {key: value for key, value in content.items() if key not in CODE_KEYS}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by name: one, or the shards that its index names.

    Raises ValueError if there are none as safetensors, or if a shard is missing.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        why = f"; pickled weights ({', '.join(pickled)}) are not read" if pickled else ""
        raise ValueError(f"no weights (model.safetensors) in folder {str(folder)!r}{why}")
    content = read_json(index)
    names = set(content["weight_map"].values()) if isinstance(content, Mapping) and "weight_map" in content else set()
    bad = sorted(name for name in names if Path(name).name != name or not (folder / name).is_file())
    if bad or not names or not all(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index}: names shards that are missing or no safetensors: {', '.join(bad or sorted(names))}")
    return [folder / name for name in sorted(names)]
