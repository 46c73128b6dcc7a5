"""What a folder with a Hugging Face checkpoint says about itself, found without loading or running any of it."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ssd_lit.support.files import read_json

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
    "opt": {
        "layers": "num_hidden_layers", "d_model": "hidden_size", "heads": "num_attention_heads", "d_ff": "ffn_dim",
        "activation": "activation_function",
    },
}  # fmt: skip
KEYS |= dict.fromkeys(("mistral", "qwen2", "qwen3", "gpt_neox"), KEYS["llama"])

# Where the base model of each family keeps its token embeddings; T5 may have them under more than one name.
EMBEDDINGS = {
    "gpt2": ("wte.weight",),
    "bert": ("embeddings.word_embeddings.weight",),
    "t5": ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "llama": ("embed_tokens.weight",),
    "mistral": ("embed_tokens.weight",),
    "qwen2": ("embed_tokens.weight",),
    "qwen3": ("embed_tokens.weight",),
    "opt": ("decoder.embed_tokens.weight",),
    "gpt_neox": ("embed_in.weight",),
}

# The modules with a weight that every base model has, by the prefix of their names; {} is the layer. FFNs are looked at
# by themselves.
MODULES = {
    "gpt2": {"": "wpe ln_f", "h.{}.": "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_proj"},
    "bert": {
        "embeddings.": "position_embeddings token_type_embeddings LayerNorm",
        "encoder.layer.{}.": "attention.self.query attention.self.key attention.self.value attention.output.dense "
        "attention.output.LayerNorm output.dense output.LayerNorm",
    },
    "t5": {
        "encoder.": "final_layer_norm",
        "encoder.block.{}.": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
        "layer.0.SelfAttention.o layer.0.layer_norm layer.1.DenseReluDense.wo layer.1.layer_norm",
        "decoder.": "final_layer_norm",
        "decoder.block.{}.": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
        "layer.0.SelfAttention.o layer.0.layer_norm layer.1.EncDecAttention.q layer.1.EncDecAttention.k "
        "layer.1.EncDecAttention.v layer.1.EncDecAttention.o layer.1.layer_norm layer.2.DenseReluDense.wo "
        "layer.2.layer_norm",
    },
    "llama": {
        "": "norm",
        "layers.{}.": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj input_layernorm "
        "mlp.gate_proj mlp.down_proj post_attention_layernorm",
    },
    # The weights of its norms are optional.
    "opt": {
        "decoder.": "embed_positions",
        "decoder.layers.{}.": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc2",
    },
    "gpt_neox": {
        "": "final_layer_norm",
        "layers.{}.": "input_layernorm attention.query_key_value attention.dense post_attention_layernorm "
        "mlp.dense_4h_to_h",
    },
}
MODULES |= {"mistral": MODULES["llama"], "qwen2": MODULES["llama"]}
MODULES["qwen3"] = {
    **MODULES["llama"],
    "layers.{}.": f"{MODULES['llama']['layers.{}.']} self_attn.q_norm self_attn.k_norm",
}

# Where those families that learn positions keep them.
POSITIONS = {"gpt2": "wpe.weight", "bert": "embeddings.position_embeddings.weight"}

# The tensors of a head that are shared where the head is tied to the embeddings, and what each is shared with.
TIED = {
    "gpt2": {"lm_head.weight": "wte.weight"},
    "bert": {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
             "cls.predictions.decoder.bias": "cls.predictions.bias"},
    "t5": {"lm_head.weight": "shared.weight"},
    "llama": {"lm_head.weight": "embed_tokens.weight"},
    "opt": {"lm_head.weight": "decoder.embed_tokens.weight"},
    "gpt_neox": {"lm_head.weight": "embed_in.weight"},
}  # fmt: skip
TIED |= dict.fromkeys(("mistral", "qwen2", "qwen3"), TIED["llama"])

# The families whose head is not tied to the embeddings unless config.json says so.
UNTIED = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")

# The families that turn pairs of a head's numbers, and those whose config.json may give a head a width of its own.
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
HEAD_WIDTH = {"t5": "d_kv", "mistral": "head_dim", "qwen2": "head_dim", "qwen3": "head_dim"}

# The matrices of an FFN that read its input, of which any may be there, and the dimension that counts neurons.
FFN_INPUTS = {
    "gpt2": (("h.{}.mlp.c_fc.weight",), 1),
    "bert": (("encoder.layer.{}.intermediate.dense.weight",), 0),
    "t5": (("encoder.block.{}.layer.1.DenseReluDense.wi.weight",
            "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight"), 0),
    "llama": (("layers.{}.mlp.up_proj.weight",), 0),
    "opt": (("decoder.layers.{}.fc1.weight",), 0),
    "gpt_neox": (("layers.{}.mlp.dense_h_to_4h.weight",), 0),
}  # fmt: skip
FFN_INPUTS |= dict.fromkeys(("mistral", "qwen2", "qwen3"), FFN_INPUTS["llama"])

# Further names of activations, each with the one that we have for its function.
SAME_ACTIVATION = {
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "swish": "silu",
}

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
    if "activation" in shape:
        shape["activation"] = SAME_ACTIVATION.get(shape["activation"], shape["activation"])
    unknown = [theirs for ours, theirs in KEYS[family].items() if ours not in shape]
    if unknown:
        raise ValueError(f"{folder}: config.json does not say {', '.join(unknown)}")
    has_own_width = content.get(HEAD_WIDTH.get(family, "")) is not None or family in ("t5", "qwen3")
    if not has_own_width and shape["d_model"] % shape["heads"]:
        names = KEYS[family]
        raise ValueError(
            f"{folder}: {names['heads']} {shape['heads']} does not divide {names['d_model']} {shape['d_model']}; "
            "Transformers builds no such model"
        )
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
    places = content.get("position_embedding_type")
    if places not in (None, "absolute"):
        raise ValueError(f"{folder}: position_embedding_type {places!r}; allowed: absolute")
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


WRAPPERS = r"^(?:module\.|_orig_mod\.)+"
"""What a model that was compiled, or trained by several processes, puts before the names of its weights."""


def plain_name(name: str) -> str:
    """The name that a weight has without such a wrapper."""
    return re.sub(WRAPPERS, "", name)


def _known_name(name: str) -> str:
    """The name that Transformers knows a weight by: the head of GPT-NeoX has another one in files."""
    return re.sub(r"^embed_out\.", "lm_head.", plain_name(name))


class StoredTensor(NamedTuple):
    """What the header of a weight file says of a tensor, and where its bytes are."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    stop: int

    def same_as(self, other: "StoredTensor") -> bool:
        return self[1:3] == other[1:3] and self._bytes() == other._bytes()

    def _bytes(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's weight files by the names that Transformers knows; only their headers are read.

    Raises ValueError for a file that is no safetensors or is cut off, and for shards that do not hold what their index
    says.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in _header(file).items():
            name = _known_name(name)
            if name in found:
                raise ValueError(f"{folder}: {name} is in {found[name].file.name} and in {file.name}")
            found[name] = tensor
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        told = {_known_name(name): file for name, file in read_json(index)["weight_map"].items()}
        for name in sorted(told.keys() | found.keys()):
            place = found[name].file.name if name in found else "no shard"
            if told.get(name) != place:
                raise ValueError(f"{index}: puts {name} into {told.get(name, 'no shard')}, but it is in {place}")
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as opened:
        size = file.stat().st_size
        begin = 8 + int.from_bytes(opened.read(8), "little")
        try:
            content = json.loads(opened.read(begin - 8) if begin <= size else b"")
            entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
            tensors = {
                name: StoredTensor(
                    file, entry["dtype"], tuple(entry["shape"]), *(begin + n for n in entry["data_offsets"])
                )
                for name, entry in entries.items()
            }
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{file}: not a safetensors file, or damaged") from None
    if max((tensor.stop for tensor in tensors.values()), default=begin) != size:
        raise ValueError(f"{file}: cut off, or longer than its header says")
    return tensors


def find_tensor(tensors: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """A tensor by its name in the base model, which a model with a head puts a prefix before."""
    return next((tensor for key, tensor in tensors.items() if name in (key, key.partition(".")[2])), None)


def _first(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> StoredTensor | None:
    return next((tensor for name in names if (tensor := find_tensor(tensors, name))), None)


def check_weights(folder: Path) -> None:
    """Raise ValueError where weights have not the shape that config.json says, as far as headers show.

    Looks at what is most often changed by hand: the token embeddings, and the width of every FFN.
    """
    shape, tensors = checkpoint_shape(folder), stored_tensors(folder)
    family = shape["family"]
    _check_embeddings(folder, family, tensors)
    names, dimension = FFN_INPUTS[family]
    for layer in range(shape["layers"]):
        at = [name.format(layer) for name in names]
        ffn = _first(tensors, at)
        if ffn is None:
            raise ValueError(f"{folder}: the weights lack {' or '.join(at)}")
        if len(ffn.shape) != 2 or ffn.shape[dimension] != shape["d_ff"]:
            raise ValueError(
                f"{folder}: the FFN of layer {layer} is of shape {list(ffn.shape)}, but config.json says "
                f"{shape['d_ff']} neurons ({KEYS[family]['d_ff']}) for every layer"
            )


def check_complete(folder: Path) -> None:
    """Raise ValueError if the base model of a checkpoint lacks a weight matrix or norm, as far as names show."""
    settings, tensors = model_settings(folder), stored_tensors(folder)
    family = settings["model_type"]
    layers = settings[KEYS[family]["layers"]]
    # What models with a head put a prefix before, and what the first BERTs called the weight of a norm.
    names = {name.replace(".gamma", ".weight") for name in tensors}
    names |= {name.partition(".")[2] for name in names}
    for stack, modules in MODULES[family].items():
        count = settings.get("num_decoder_layers") or layers if stack.startswith("decoder.block") else layers
        for place in [stack.format(layer) for layer in range(count)] if "{}" in stack else [stack]:
            for module in modules.split():
                name = f"{place}{module}.weight"
                if name not in names:
                    raise ValueError(f"{folder}: the weights lack {name}")


def has_tied_head(folder: Path) -> bool:
    """Whether the head for the family's objective shares its weights with the embeddings, in this checkpoint.

    config.json decides, but a head of its own in the weight files is one, whatever config.json says: two tensors that
    differ cannot be shared.
    """
    settings, tensors = model_settings(folder), stored_tensors(folder)
    if not _says_tied(settings):
        return False
    for target, source in TIED[settings["model_type"]].items():
        names = EMBEDDINGS[settings["model_type"]]
        shared = _first(tensors, names if source in names else (source,))
        own = find_tensor(tensors, target)
        if own is not None and shared is not None and not own.same_as(shared):
            return False
    return True


def check_shared_embeddings(folder: Path) -> None:
    """Raise ValueError if a family that has embeddings under several names has them with several values."""
    family, tensors = model_settings(folder)["model_type"], stored_tensors(folder)
    first, *others = _embeddings(folder, family, tensors)
    if any(not other.same_as(first) for other in others):
        raise ValueError(f"{folder}: {', '.join(EMBEDDINGS[family])} differ; they are one tensor in every T5")


def _says_tied(settings: Mapping[str, Any]) -> bool:
    told = settings.get("tie_word_embeddings")
    return settings["model_type"] not in UNTIED if told is None else bool(told)


def embedded_tokens(folder: Path) -> int:
    """How many tokens the checkpoint in a folder has embeddings of. Raises ValueError if it has none."""
    family, tensors = model_settings(folder)["model_type"], stored_tensors(folder)
    return _embeddings(folder, family, tensors)[0].shape[0]


def longest_input(folder: Path) -> int | None:
    """How many tokens the checkpoint in a folder has positions for; None for families that count no positions."""
    settings, tensors = model_settings(folder), stored_tensors(folder)
    name = POSITIONS.get(settings["model_type"])
    if name is None:
        # Rotary positions turn by any angle, but the model is built for so many; OPT has two rows more.
        longest = settings.get("max_position_embeddings")
        return longest if isinstance(longest, int) else None
    positions = find_tensor(tensors, name)
    return None if positions is None else positions.shape[0]


def _check_embeddings(folder: Path, family: str, tensors: Mapping[str, StoredTensor]) -> None:
    found = _embeddings(folder, family, tensors)
    told = model_settings(folder).get("vocab_size")
    if told is not None and found[0].shape[0] != told:
        raise ValueError(f"{folder}: embeds {found[0].shape[0]} tokens, but config.json says vocab_size {told}")


def _embeddings(folder: Path, family: str, tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    found = [tensor for name in EMBEDDINGS[family] if (tensor := find_tensor(tensors, name))]
    if not found and _says_tied(model_settings(folder)):
        # Of tensors that are one, some programs keep that of the head.
        found = [tensor for name in list(TIED[family])[:1] if (tensor := find_tensor(tensors, name))]
    if not found or any(len(tensor.shape) != 2 for tensor in found):
        raise ValueError(f"{folder}: the weights lack {EMBEDDINGS[family][0]}, the embeddings of the tokens")
    return found
