"""Open checkpoints: config.json and safetensors as `transformers` writes them, to our parameters and back.

A family is no class of its own: `config_of` reads a config.json as the fields of `ModelConfig`, `tensors_of` says from
those fields which tensors there are, and both ways of converting go by that one table.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import sentencepiece

from pit_jax import config as config_lib
from pit_jax.config import ModelConfig
from pit_jax.data import hugging_face
from pit_jax.data.tokenizer import CONTROL_SYMBOLS
from pit_jax.files import read_json, write_json_atomic
from pit_jax.types import Params

KINDS = ("language_model", "reward_model")
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""What tensors may be stored as, by the name in a safetensors file."""

DESCRIPTION = "model.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
"""Of a config.json: what no forward pass needs, but who reads the model again does."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")


class Family(NamedTuple):
    """What the config.json of a family leaves out, and what its models are called.

    Attributes:
      prefix: of the names of its classes.
      classifier: the prefix where one label is read.
      defaults: of transformers, for fields that a config.json does not have.
    """

    prefix: str
    classifier: str
    defaults: dict[str, Any]


_LOCAL = {"sliding_window": 4096}
_KV_HEADS = {"num_key_value_heads": 32}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA_2 = _GEMMA | _LOCAL | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
FAMILIES = {
    "llama": Family("Llama", "Llama", {}),
    "mistral": Family("Mistral", "Mistral", {"num_key_value_heads": 8, **_LOCAL}),
    "qwen2": Family("Qwen2", "Qwen2", {**_KV_HEADS, **_LOCAL}),
    "qwen3": Family("Qwen3", "Qwen3", {"head_dim": 128, **_KV_HEADS, **_LOCAL}),
    "gemma": Family("Gemma", "Gemma", {**_GEMMA, "num_key_value_heads": 16}),
    "gemma2": Family(
        "Gemma2",
        "Gemma2",
        {**_GEMMA_2, "num_key_value_heads": 4, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": Family("Gemma3", "Gemma3Text", {**_GEMMA_2, "num_key_value_heads": 4, "rope_theta": 1_000_000.0}),
}
"""model_type -> Family, in the order in which export tries them."""


class Description(NamedTuple):
    """model.json of a converted checkpoint: what its parameters are.

    Attributes:
      kind: of KINDS.
      family: a key of FAMILIES: that of the import.
      dtype: float32, bfloat16 or float16: of the files that were read.
      config: of the model.
      kept: KEPT fields of the config.json.
    """

    kind: str
    family: str
    dtype: str
    config: ModelConfig
    kept: dict[str, Any]


def write_description(folder: Path, description: Description) -> None:
    """Writes model.json."""
    values = description._asdict()
    values["model"] = json.loads(config_lib.to_json(values.pop("config")))
    write_json_atomic(Path(folder) / DESCRIPTION, values)


def read_description(folder: str | Path) -> Description:
    """Reads model.json.

    Raises:
      ValueError: where there is none, or it is of another version.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} has no {DESCRIPTION}: make one with `python -m pit_jax.convert --from=hf`")
    values = read_json(path)
    try:
        # How a model is computed, which an earlier version did not ask about, is not what it is.
        how = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in ("attention", "attention_block")}
        config = config_lib.from_config_dict(ModelConfig, how | values["model"], "model")
        return Description(values["kind"], values["family"], values["dtype"], config, values["kept"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not of this version of pit_jax ({error}): convert the model again") from error


# --------------------------------------------------------------------------------------------------------- config.json


def read_config(folder: str | Path) -> tuple[ModelConfig, str]:
    """Reads a config.json.

    Args:
      folder: with config.json.

    Returns:
      (config, kind): vocab_size is that of the file, num_tokens 0; activations are bfloat16 where the file says that
      the weights are, else float32. `kind` is "language_model", or "reward_model" for ...ForSequenceClassification
      with one label.

    Raises:
      ValueError: where there is none, and for a family or a feature that is not supported; it names the fields.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: name the folder of a model of Hugging Face")
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: restore it from a copy")
    return config_of(values, str(path))


def config_of(values: dict[str, Any], where: str = "config.json") -> tuple[ModelConfig, str]:
    """The content of a config.json as (config, kind); see `read_config`."""
    try:
        return _config_of(values, where)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{where} has a value of a wrong kind ({error}): download it again") from error


def _config_of(values: dict[str, Any], where: str) -> tuple[ModelConfig, str]:
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{where}: model_type is {name!r}, which is not supported. Supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    get = lambda field, default=None: values.get(field, family.defaults.get(field, default))  # noqa: E731
    problems: list[str] = []

    def refuse(field: str, wanted: str) -> None:
        problems.append(f"{field} is {values.get(field, get(field))!r}, but must be {wanted}")

    def cap(field: str) -> float:
        return _above_0(field, get(field), problems) if get(field) else 0.0

    for field in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if values.get(field):
            refuse(field, "false")
    if values.get("quantization_config"):
        refuse("quantization_config", "absent: take the model before its quantization")
    gemma = name.startswith("gemma")
    act_field = "hidden_activation" if name in ("gemma2", "gemma3_text") else "hidden_act"
    activations = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name == "gemma":  # there, "gelu" has always meant this one
        activations["gelu"] = "gelu_tanh"
    activation = get(act_field, "silu")
    if activation not in activations:
        refuse(act_field, "silu or gelu_pytorch_tanh")
    kind = _kind(values, family, problems)
    if not isinstance(get("tie_word_embeddings"), bool | None):
        refuse("tie_word_embeddings", "true or false")
    size_fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for field in size_fields:
        if not _is_count(values.get(field)):
            refuse(field, "a whole number above 0")
    if any(not _is_count(values.get(field)) for field in size_fields):
        raise ValueError(_unsupported(where, problems))
    D, heads, num_layers = (values[field] for field in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim, kv_heads = get("head_dim") or D // heads, get("num_key_value_heads") or heads
    for field, value in (("head_dim", head_dim), ("num_key_value_heads", kv_heads)):
        if not _is_count(value) or (field == "head_dim" and value % 2):
            refuse(field, "an even number above 0" if field == "head_dim" else "a whole number above 0")
    window, every = _windows(name, get, values, num_layers, problems)
    rope = _rope(name, get, values, bool(window), every, problems)
    caps = dict.fromkeys(("attention_softcap", "logit_softcap"), 0.0)
    query_scale = 0.0
    if name in ("gemma2", "gemma3_text"):
        caps["logit_softcap"] = cap("final_logit_softcapping")
        caps["attention_softcap"] = cap("attn_logit_softcapping")
        if name == "gemma3_text" and caps["attention_softcap"]:
            refuse("attn_logit_softcapping", "null")  # transformers itself does not apply it
        scale = get("query_pre_attn_scalar")
        query_scale = 0.0 if scale == head_dim else _above_0("query_pre_attn_scalar", scale, problems)
    epsilon = _above_0("rms_norm_eps", get("rms_norm_eps", 1e-6), problems)
    if problems:
        raise ValueError(_unsupported(where, problems))
    try:
        config = ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=num_layers,
            d_model=D,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_dim=values["intermediate_size"],
            norm_epsilon=epsilon,
            tie_embeddings=bool(get("tie_word_embeddings", False)),
            dtype="bfloat16" if values.get("dtype", values.get("torch_dtype")) == "bfloat16" else "float32",
            activation=activations[activation],
            embedding_scale=gemma,
            norm_offset=1.0 if gemma else 0.0,
            qkv_bias=name == "qwen2",
            qk_norm=name in ("qwen3", "gemma3_text"),
            post_norms=name in ("gemma2", "gemma3_text"),
            query_scale=query_scale,
            sliding_window=window,
            global_every=every,
            **rope,
            **caps,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config, kind


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _above_0(field: str, value, problems: list[str]) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        problems.append(f"{field} is {value!r}, but must be a number above 0")
        return 1.0
    return float(value)


def _unsupported(where: str, problems: Sequence[str]) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{where} is of a model that is not supported:{lines}\nSupported families: {', '.join(FAMILIES)}."


def _kind(values: dict[str, Any], family: Family, problems: list[str]) -> str:
    writer, scorer = f"{family.prefix}ForCausalLM", f"{family.classifier}ForSequenceClassification"
    names = values.get("architectures") or [writer]
    if names == [writer]:
        return "language_model"
    if names == [scorer]:
        labels = values.get("num_labels", len(values.get("id2label") or (0, 1)))
        if labels != 1:
            problems.append(f"num_labels (or the entries of id2label) is {labels}, but must be 1: a score")
        return "reward_model"
    problems.append(f"architectures is {names!r}, but must be {writer} or {scorer}")
    return "language_model"


def _windows(name: str, get, values: dict, num_layers: int, problems: list[str]) -> tuple[int, int]:
    """(sliding_window, global_every)."""
    window = get("sliding_window") or 0
    if name in ("llama", "gemma") or not window:
        return 0, 0
    if not _is_count(window):
        problems.append(f"sliding_window is {window!r}, but must be a whole number above 0, or null")
        return 0, 0
    if name == "mistral":
        return window, 0
    types = values.get("layer_types")
    if name.startswith("qwen") and not values.get("use_sliding_window"):
        return 0, 0
    if types is None:
        if name.startswith("qwen"):
            first = values.get("max_window_layers", 28)
            sliding = [layer >= first for layer in range(num_layers)]
        else:
            pattern = 2 if name == "gemma2" else values.get("sliding_window_pattern", 6)
            if not _is_count(pattern):
                problems.append(f"sliding_window_pattern is {pattern!r}, but must be a whole number above 0")
                return 0, 0
            sliding = [(layer + 1) % pattern > 0 for layer in range(num_layers)]
    else:
        sliding = [kind == "sliding_attention" for kind in types]
        if set(types) - {"sliding_attention", "full_attention"} or len(types) != num_layers:
            problems.append("layer_types must have sliding_attention or full_attention for each layer")
            return 0, 0
    if not any(sliding):
        return 0, 0
    if all(sliding):
        return window, 0
    every = sliding.index(False) + 1
    if every == 1 or sliding != [(layer + 1) % every > 0 for layer in range(num_layers)]:
        field = "layer_types" if types is not None else "max_window_layers"
        problems.append(f"{field}: full attention must come at every n-th layer, and the first must have a window")
        return 0, 0
    return window, every


_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
}


def _rope(name: str, get, values: dict, has_window: bool, every: int, problems: list[str]) -> dict[str, Any]:
    """Fields of the rotary embedding, from both of the forms that transformers has written them in.

    What its versions read differently is refused.
    """
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        problems.append(f"rope_parameters and rope_scaling are {new!r} and {old!r}, but must be objects or null")
        return {}
    if new and old and new != old:
        problems.append("rope_parameters and rope_scaling are both there and differ: keep the one it was trained with")
    local = {}
    if "full_attention" in new or "sliding_attention" in new:
        if name != "gemma3_text":
            problems.append("rope_parameters has entries per kind of layer, which only gemma3_text may have")
        new, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
    elif name == "gemma3_text" and new:
        problems.append("rope_parameters must have full_attention and sliding_attention in it")
    scaling = new or old
    field = "rope_parameters" if new else "rope_scaling"
    theta = _above_0("rope_theta", scaling.get("rope_theta") or get("rope_theta") or 10_000.0, problems)
    local_theta = local.get("rope_theta") or values.get("rope_local_base_freq") or 10_000.0
    local_theta = _above_0("rope_theta of sliding_attention", local_theta, problems)
    if local.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.sliding_attention.rope_type is {local['rope_type']!r}, but must be default")
    if scaling.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        problems.append("partial_rotary_factor must be 1")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        problems.append(f"{field}: rope_type is {kind!r}, but must be default, linear or llama3")
        return {}
    unknown = sorted(key for key in {**scaling, **local}.keys() - _ROPE_KEYS if {**local, **scaling}[key] is not None)
    if unknown:
        problems.append(f"{field} has {', '.join(unknown)}, which has no place here")
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    lacking = [key for key in needed if not isinstance(scaling.get(key), int | float)]
    if lacking:
        problems.append(f"{field}: rope_type {kind} needs the number {', '.join(lacking)}")
        return {}
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind != "default":
        fields |= {"rope_scaling": kind, "rope_factor": float(scaling["factor"])}
    if kind == "llama3":
        length = scaling.get("original_max_position_embeddings")
        if not _is_count(length) or values.get("original_max_position_embeddings"):
            problems.append(
                f"{field}: rope_type llama3 needs original_max_position_embeddings, a whole number, in {field} alone"
            )
            return {}
        fields |= {"rope_low_freq_factor": float(scaling["low_freq_factor"]), "rope_original_length": length}
        fields["rope_high_freq_factor"] = float(scaling["high_freq_factor"])
    if name == "gemma3_text" and has_window and (kind != "default" or local_theta != theta):
        if not every:  # no layer sees all: the rope of those that would is that of none
            return {"rope_theta": local_theta}
        fields["local_rope_theta"] = local_theta
    return fields


def json_of(config: ModelConfig, kind: str, family: str, dtype: str, kept: dict[str, Any]) -> dict[str, Any]:
    """A config.json of a family, which may not say all of `config`: `config_of` tells."""
    c = config
    classes = FAMILIES[family]
    suffix = f"{classes.prefix}ForCausalLM" if kind == KINDS[0] else f"{classes.classifier}ForSequenceClassification"
    newer_gemma = family in ("gemma2", "gemma3_text")
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[c.activation]
    values: dict[str, Any] = {
        "model_type": family,
        "architectures": [suffix],
        "torch_dtype": dtype,
        "vocab_size": c.num_tokens or c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_activation" if newer_gemma else "hidden_act": activation,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if c.rope_scaling != "none":
        values["rope_scaling"] = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        values["rope_scaling"] |= {
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_length,
        }
    if family != "qwen2":
        values["attention_bias"] = False
    if family == "mistral":
        values["sliding_window"] = c.sliding_window or None
    is_local = [bool(c.sliding_window) and not _is_global(c, layer) for layer in range(c.num_layers)]
    if family in ("qwen2", "qwen3"):
        values["use_sliding_window"] = any(is_local)
    if family in ("qwen2", "qwen3") or newer_gemma:
        values["layer_types"] = ["sliding_attention" if local else "full_attention" for local in is_local]
        values["sliding_window"] = c.sliding_window or (4096 if newer_gemma else None)
    if newer_gemma:
        scale = c.query_scale or c.head_dim
        values["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale
        values["attn_logit_softcapping"] = c.attention_softcap or None if family == "gemma2" else None
        values["final_logit_softcapping"] = c.logit_softcap or None
    if family == "gemma3_text":
        local_theta = c.local_rope_theta or c.rope_theta
        values["rope_local_base_freq"] = local_theta
        values["sliding_window_pattern"] = c.global_every or c.num_layers + 1
    if kind == "reward_model":
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return values | {key: value for key, value in kept.items() if key in KEPT}


def _is_global(config: ModelConfig, layer: int) -> bool:
    return bool(config.global_every) and (layer + 1) % config.global_every == 0


OURS_ALONE = ("vocab_size", "num_tokens", "dtype", "remat", "copy_init")
"""Fields that change nothing about what a trained model computes, or are sizes that each side pads as it likes."""


def _differing(config: ModelConfig, other: ModelConfig) -> list[str]:
    fields = [name for name in ModelConfig.__dataclass_fields__ if name not in OURS_ALONE]
    return [name for name in fields if getattr(config, name) != getattr(other, name)]


def exported_config(config: ModelConfig, family: str = "") -> tuple[ModelConfig, str]:
    """The model as a family of transformers can have it.

    Models that were trained here scale their embeddings by sqrt(d_model) without being a Gemma: the scale then goes
    into the table, and where that was the unembedding as well, the two part.

    Args:
      config: ours.
      family: tried first, then the others in the order of FAMILIES.

    Returns:
      (config, family): the config differs from ours at most in `embedding_scale` and `tie_embeddings`.

    Raises:
      ValueError: where no family can; it names the fields for each.
    """
    lines = []
    for name in dict.fromkeys([*([family] if family else []), *FAMILIES]):
        candidate = config
        if config.embedding_scale and not name.startswith("gemma"):
            candidate = dataclasses.replace(config, embedding_scale=False, tie_embeddings=False)
        try:
            read, _ = config_of(json_of(candidate, KINDS[0], name, "float32", {}))
            differing = _differing(candidate, read)
        except ValueError as error:
            differing = [str(error)]
        # transformers itself refuses such sizes in these families.
        if name in ("llama", "gemma2", "gemma3_text") and config.d_model % config.num_heads:
            differing.append("num_heads (must divide d_model)")
        if not differing:
            return candidate, name
        lines.append(f"\n  {name}: {', '.join(differing)}")
    raise ValueError("no family of transformers can express this model. Fields in the way:" + "".join(lines))


# ------------------------------------------------------------------------------------------------------------- tensors


class Tensor(NamedTuple):
    """One leaf of our parameters and its tensors there.

    A form names the axes by the letters of DESIGN's legend (1 is an axis without a letter): `KGH D -> D K G H` is a
    matrix whose rows are all entries of all heads, key/value head by key/value head.

    Attributes:
      ours: path of the leaf in {"params": ...}.
      theirs: name; with {} for the number of the layer, which is the first axis of ours.
      their_axes: a word of letters per axis.
      our_axes: the same letters in our order.
    """

    ours: tuple[str, ...]
    theirs: str
    their_axes: str
    our_axes: str


def tensors_of(config: ModelConfig, kind: str) -> list[Tensor]:
    """All leaves of a model that have a tensor: every one but the `bias` of a reward model."""
    c = config
    base = ("backbone",) if kind == "reward_model" else ()

    def layer(ours: str, theirs: str, their_axes: str, our_axes: str) -> Tensor:
        return Tensor((*base, "layers", *ours.split("/")), f"model.layers.{{}}.{theirs}", their_axes, our_axes)

    def norm(ours: str, theirs: str, axis: str = "D") -> Tensor:
        return layer(f"{ours}/scale", f"{theirs}.weight", axis, axis)

    tensors = [
        Tensor((*base, "embedding"), "model.embed_tokens.weight", "V D", "VD"),
        norm("attention_norm", "input_layernorm"),
        layer("q", "self_attn.q_proj.weight", "KGH D", "DKGH"),
        layer("k", "self_attn.k_proj.weight", "KH D", "DKH"),
        layer("v", "self_attn.v_proj.weight", "KH D", "DKH"),
        layer("o", "self_attn.o_proj.weight", "D KGH", "KGHD"),
        layer("gate", "mlp.gate_proj.weight", "F D", "DF"),
        layer("up", "mlp.up_proj.weight", "F D", "DF"),
        layer("down", "mlp.down_proj.weight", "D F", "FD"),
    ]
    if c.qkv_bias:
        for name, axes in (("q", "KGH"), ("k", "KH"), ("v", "KH")):
            tensors.append(layer(f"{name}_bias", f"self_attn.{name}_proj.bias", axes, axes))
    if c.qk_norm:
        tensors += [norm("q_norm", "self_attn.q_norm", "H"), norm("k_norm", "self_attn.k_norm", "H")]
    if c.post_norms:
        tensors.append(norm("attention_post_norm", "post_attention_layernorm"))
        tensors.append(norm("mlp_norm", "pre_feedforward_layernorm"))
        tensors.append(norm("mlp_post_norm", "post_feedforward_layernorm"))
    else:
        tensors.append(norm("mlp_norm", "post_attention_layernorm"))
    tensors.append(Tensor((*base, "norm", "scale"), "model.norm.weight", "D", "D"))
    if kind == "reward_model":
        tensors.append(Tensor(("head",), "score.weight", "1 D", "D"))
    elif not c.tie_embeddings:
        tensors.append(Tensor(("unembedding",), "lm_head.weight", "V D", "VD"))
    return tensors


def _sizes(config: ModelConfig, rows: int) -> dict[str, int]:
    c = config
    of_heads = {"K": c.num_kv_heads, "G": c.num_heads // c.num_kv_heads, "H": c.head_dim}
    return {"V": rows, "D": c.d_model, "F": c.mlp_dim, "1": 1} | of_heads


def _names(tensor: Tensor, num_layers: int) -> list[str]:
    return [tensor.theirs.format(i) for i in range(num_layers)] if "{}" in tensor.theirs else [tensor.theirs]


class TensorFiles:
    """The safetensors files of a folder, read in slices; one file is mapped at a time.

    Attributes:
      files: name of a tensor -> its file.
      shapes: name -> shape.
      dtypes: name -> as the file calls it, such as BF16.
    """

    def __init__(self, folder: str | Path):
        """Reads the headers.

        Raises:
          ValueError: where there is no safetensors file, or files are missing or damaged; it lists them all.
        """
        folder = Path(folder)
        self._stack, self._path = contextlib.ExitStack(), None
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        names: dict[str, str] | None = None
        if single.is_file():
            found = [single.name]
        elif index.is_file():
            content = read_json(index)
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not names or not all(isinstance(file, str) for file in names.values()):
                raise ValueError(f"{index} has no weight_map of names to files: restore it from a copy")
            found = sorted(set(names.values()))
        else:
            raise ValueError(_no_tensors(folder))
        problems = []
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in found:
            path = folder / file
            if Path(file).name != file:
                problems.append(f"{file}: the index names a file outside of the folder")
            elif not path.is_file():
                problems.append(f"{file}: is missing")
            else:
                try:
                    with _open(path) as tensors:
                        for name in tensors.keys():  # noqa: SIM118
                            if name in self.files:
                                problems.append(f"{file}: has {name}, which {self.files[name].name} has too")
                            elif names and names.get(name, file) != file:
                                problems.append(f"{file}: has {name}, which the index says is in {names[name]}")
                            part = tensors.get_slice(name)
                            self.files[name], self.shapes[name] = path, tuple(part.get_shape())
                            self.dtypes[name] = part.get_dtype()
                except ValueError as error:
                    problems.append(str(error))
        if names and not problems:
            absent = [name for name in names if name not in self.files]
            problems = [f"{names[name]}: lacks {name}, which the index says is there" for name in absent]
        if problems:
            raise ValueError(f"{folder} cannot be read; download it again:" + _lines(problems))

    def close(self) -> None:
        """Unmaps the file that was read last."""
        self._stack.close()
        self._path = None

    def read(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the dtype of the file."""
        path = self.files[name]
        if path != self._path:
            self._stack.close()
            self._tensors, self._path = self._stack.enter_context(_open(path)), path
        return self._tensors.get_slice(name)[where]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: is damaged or cut short ({error})") from error


def _safetensors():
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install -e '.[hf]'") from error
    return safetensors


def _no_tensors(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has its weights in {', '.join(pickled)}, which can run any code when it is loaded. Take a "
            "model.safetensors of this model, or write one where you trust the file: "
            'transformers.AutoModelForCausalLM.from_pretrained("...").save_pretrained("...")'
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" (but {', '.join(others)})" if others else ""
    return f"{folder} has neither model.safetensors nor model.safetensors.index.json{found}: download it again"


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def check_tensors(files: TensorFiles, config: ModelConfig, kind: str, folder: str | Path) -> str:
    """Compares the headers with what the config says, and two tables of a model that is said to have one.

    Args:
      files: of the folder.
      config: of `read_config`, whose vocab_size is the rows of the file.
      kind: of `read_config`.
      folder: for messages.

    Returns:
      The dtype of the files: float32 where they are not all of one.

    Raises:
      ValueError: lists all tensors that are missing, unknown, of another shape or of another kind of number; or where
        the tables differ.
    """
    sizes, expected = _sizes(config, config.vocab_size), {}
    for tensor in tensors_of(config, kind):
        shape = tuple(math.prod(sizes[a] for a in axis) for axis in tensor.their_axes.split())
        expected |= dict.fromkeys(_names(tensor, config.num_layers), shape)
    # Old Llamas keep frequencies, and some tied models their table twice, as transformers reads neither.
    ignored = re.compile(r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tie_embeddings else ""))
    there = {name for name in files.shapes if name in expected or not ignored.fullmatch(name)}
    problems = [f"{name}: is missing" for name in expected if name not in there]
    problems += [f"{name}: is unknown" for name in sorted(there - set(expected))]
    for name in sorted(there & set(expected)):
        if files.shapes[name] != expected[name]:
            problems.append(f"{name}: has shape {files.shapes[name]}, but config.json says {expected[name]}")
        if files.dtypes[name] not in DTYPES:
            problems.append(f"{name}: is stored as {files.dtypes[name]}, but must be one of {', '.join(DTYPES)}")
    if problems:
        raise ValueError(f"the tensors of {folder} are not those that its config.json describes:" + _lines(problems))
    tables = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_embeddings and kind == KINDS[0] and tables[1] in files.shapes and not _are_equal(files, *tables):
        raise ValueError(
            f"{folder} has an lm_head.weight that differs from model.embed_tokens.weight, but its config.json says, or "
            "leaves to the default of the family, that they are one (tie_word_embeddings). Set tie_word_embeddings to "
            "false there if the model was trained with both; else take lm_head.weight out of the file"
        )
    dtypes = {DTYPES[files.dtypes[name]].name for name in expected}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _are_equal(files: TensorFiles, a: str, b: str) -> bool:
    """Whether two tables have the same numbers; a slice at a time."""
    if files.shapes[a] != files.shapes[b] or files.dtypes[a] not in DTYPES or files.dtypes[b] not in DTYPES:
        return False
    rows, width = files.shapes[a]
    step = max(1, (1 << 24) // width)
    for start in range(0, rows, step):
        where = slice(start, min(start + step, rows)), slice(None)
        one, other = (np.asarray(files.read(name, where)).astype(np.float32) for name in (a, b))
        if not np.array_equal(one, other, equal_nan=True):
            return False
    return True


AT_ONCE = 1 << 24
"""Bytes of a leaf up to which all its layers are read together; of a larger one there is a layer at a time."""


def read_params(files: TensorFiles, config: ModelConfig, kind: str, rows: int, known: int, like: Params) -> Params:
    """Reads all tensors into our parameters, one by one and device by device.

    Beside the parameters a host holds what its own devices take of one tensor at a time (or of AT_ONCE), in float32:
    layers go straight into their place on the mesh. Rows of the tables behind those of the file are the mean of the
    rows that the tokenizer knows, rounded to the dtype of the file so that they come back bitwise from an export; rows
    behind `num_tokens` are zero.

    Args:
      files: checked by `check_tensors`.
      config: ours, with vocab_size >= rows and num_tokens.
      kind: of KINDS.
      rows: of the tables in the files.
      known: ids that the tokenizer has; 0: all rows.
      like: shapes and shardings of the parameters, as for `checkpoint.restore`; the mesh must be set.

    Returns:
      The parameters, float32.
    """
    sizes = _sizes(config, rows)
    params: dict = {}
    for tensor in tensors_of(config, kind):
        leaf = like["params"]
        for key in tensor.ours:
            leaf = leaf[key]
        names, new_row = _names(tensor, config.num_layers), None
        if tensor.our_axes[0] == "V" and config.num_tokens > rows:
            new_row = _mean_row(files, tensor.theirs, min(known or rows, rows))

        def read(index, tensor=tensor, shape=leaf.shape, names=names, new_row=new_row):
            if "{}" in tensor.theirs:
                lengths = [len(range(*s.indices(n))) for s, n in zip(index[1:], shape[1:], strict=True)]
                out = np.empty((len(names[index[0]]), *lengths), np.float32)
                for i, name in enumerate(names[index[0]]):
                    out[i] = _read(files, name, tensor, sizes, index[1:])
                return out
            if tensor.our_axes[0] == "V":
                return _read_table(files, tensor, sizes, index, shape, config.num_tokens, new_row)
            return _read(files, names[0], tensor, sizes, index)

        if "{}" in tensor.theirs and math.prod(leaf.shape) * 4 > AT_ONCE:
            value = _in_layers(leaf, [functools.partial(read, names=[name]) for name in names])
        else:
            value = jax.make_array_from_callback(leaf.shape, _sharding(leaf), read)
        _put(params, tensor.ours, value)
    if kind == "reward_model":
        params["bias"] = jax.device_put(np.zeros((), np.float32), _sharding(like["params"]["bias"]))
    files.close()
    return {"params": params}


def _in_layers(leaf, reads: Sequence[Callable]) -> jax.Array:
    """A leaf whose layers are read one after the other, each by a callback as of an array [1, ...]."""
    sharding = _sharding(leaf)
    value = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(leaf.shape, jnp.float32)
    for i, read in enumerate(reads):
        layer = jax.make_array_from_callback((1, *leaf.shape[1:]), sharding, read)
        value = _with_layer(value, layer, i).block_until_ready()  # else all layers could wait in the host's memory
    return value


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(value, layer, i):
    return jax.lax.dynamic_update_slice_in_dim(value, layer, i, 0)


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _sharding(leaf) -> jax.sharding.NamedSharding:
    spec = leaf.sharding.spec if isinstance(leaf.sharding, jax.sharding.NamedSharding) else jax.P()
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)


def _read(files: TensorFiles, name: str, tensor: Tensor, sizes: dict[str, int], index) -> np.ndarray:
    """The entries `index` (slices of our axes) of a leaf, or of a layer of one, float32."""
    wanted = {axis: s.indices(sizes[axis])[:2] for axis, s in zip(tensor.our_axes, index, strict=True)}
    where, shape = [], []
    for axes in tensor.their_axes.split():
        # Only the first axis of a word may be cut: the mesh cuts nothing else.
        first, inner = axes[0], math.prod(sizes[a] for a in axes[1:])
        start, stop = wanted.get(first, (0, sizes[first]))
        assert all(wanted[a] == (0, sizes[a]) for a in axes[1:]), f"{tensor} is cut inside a word"
        where.append(slice(start * inner, stop * inner))
        shape += [(a, stop - start if a == first else sizes[a]) for a in axes if a != "1"]
    values = np.asarray(files.read(name, tuple(where))).astype(np.float32)
    letters = [a for a, _ in shape]
    return values.reshape([n for _, n in shape]).transpose([letters.index(a) for a in tensor.our_axes])


def _read_table(files: TensorFiles, tensor: Tensor, sizes, index, shape, num_tokens: int, new_row) -> np.ndarray:
    """Rows of a table that is longer than that of the file."""
    start, stop, _ = index[0].indices(shape[0])
    columns = range(*index[1].indices(shape[1]))
    out = np.zeros((stop - start, len(columns)), np.float32)
    read = min(stop, sizes["V"])
    if start < read:
        out[: read - start] = _read(files, tensor.theirs, tensor, sizes, (slice(start, read), index[1]))
    if new_row is not None:
        out[max(sizes["V"] - start, 0) : max(num_tokens - start, 0)] = new_row[index[1]]
    return out


def _mean_row(files: TensorFiles, name: str, count: int) -> np.ndarray:
    """The mean of the first rows of a table, as a row of the file would be; a slice at a time."""
    width, total = files.shapes[name][1], np.zeros(files.shapes[name][1], np.float64)
    step = max(1, (1 << 24) // width)
    for start in range(0, count, step):
        rows = files.read(name, (slice(start, min(start + step, count)), slice(None)))
        total += np.asarray(rows).astype(np.float64).sum(0)
    return (total / count).astype(DTYPES[files.dtypes[name]]).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- export


def write(
    folder: str | Path,
    params: Params,
    description: Description,
    *,
    dtype: str = "",
    max_shard_bytes: int = 5 * 10**9,
) -> str:
    """Writes config.json and safetensors as transformers reads them, into a folder that must not exist.

    Args:
      folder: of the model.
      params: of a Transformer or a ScalarModel with `description.config`; jax or NumPy arrays.
      description: of the parameters; the family is tried first (`exported_config`).
      dtype: float32, bfloat16 or float16; empty: `description.dtype`.
      max_shard_bytes: of a file; more than one come with an index. One is in memory at a time.

    Returns:
      The family.

    Raises:
      ValueError: where no family can express the model, or the folder exists.
    """
    _safetensors()  # says that it is missing before anything is written
    folder, ours = Path(folder), description.config
    theirs, family = exported_config(ours, description.family)
    stored = next(d for d in DTYPES.values() if d.name == (dtype or description.dtype))
    num_tokens = ours.num_tokens or ours.vocab_size
    scale = np.float32(ours.d_model**0.5) if ours.embedding_scale and not theirs.embedding_scale else None
    sizes = _sizes(ours, num_tokens)
    # Of a tied model whose scale went into the table, the unembedding is the table as it was.
    source = lambda t: ("embedding",) if t.ours == ("unembedding",) and ours.tie_embeddings else t.ours  # noqa: E731

    def value(tensor: Tensor, path: tuple[str, ...], layer: int | None) -> np.ndarray:
        leaf = params["params"]
        for key in path:
            leaf = leaf[key]
        x = np.asarray(leaf if layer is None else _layer(leaf, layer), np.float32)
        if tensor.our_axes[0] == "V":
            x = x[:num_tokens]
        if scale is not None and tensor.ours[-1] == "embedding":
            x = x * scale
        letters = tensor.their_axes.replace(" ", "").replace("1", "")
        x = x.transpose([tensor.our_axes.index(a) for a in letters])
        shape = [math.prod(sizes[a] for a in axis) for axis in tensor.their_axes.split()]
        if stored == np.float16 and np.abs(x).max() > np.finfo(np.float16).max:
            raise ValueError(f"{'/'.join(path)} has numbers that float16 cannot hold: use --dtype=bfloat16")
        return np.ascontiguousarray(x.reshape(shape).astype(stored))

    planned = []  # (name, tensor, path of the leaf, layer), layer by layer as transformers has them
    for tensor in tensors_of(theirs, description.kind):
        names = _names(tensor, ours.num_layers)
        layers = range(len(names)) if "{}" in tensor.theirs else [None]
        planned += [(name, tensor, source(tensor), layer) for name, layer in zip(names, layers, strict=True)]
    planned.sort(key=lambda item: (item[3] is None, item[3] or 0))
    shards: list[list] = [[]]
    sizes_of, filled = {}, 0
    for item in planned:
        shape = [math.prod(sizes[a] for a in axis) for axis in item[1].their_axes.split()]
        sizes_of[item[0]] = math.prod(shape) * stored.itemsize
        if shards[-1] and filled + sizes_of[item[0]] > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += sizes_of[item[0]]
    folder.mkdir(parents=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        many = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = many if len(shards) > 1 else "model.safetensors"
        arrays = {name: value(tensor, path, layer) for name, tensor, path, layer in shard}
        write_tensors(folder / file, arrays)
        weight_map |= dict.fromkeys(arrays, file)
        del arrays
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes_of.values())}, "weight_map": weight_map}
        write_json_atomic(folder / "model.safetensors.index.json", index)
    write_json_atomic(folder / "config.json", json_of(theirs, description.kind, family, stored.name, description.kept))
    return family


def write_tensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes one file of tensors, contiguous arrays of DTYPES by name."""
    safetensors = _safetensors()
    specs = {
        name: safetensors.TensorSpec(dtype=x.dtype.name, shape=list(x.shape), data_ptr=x.ctypes.data, data_len=x.nbytes)
        for name, x in arrays.items()
    }
    safetensors.serialize_file(specs, str(path), {"format": "pt"})
    path.chmod(0o644)  # the library makes it for its owner alone


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one file by name.

    Raises:
      ValueError: where it is missing or damaged, or a tensor is of another dtype than DTYPES.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: safetensors are read, and nothing that is pickled")
    with _open(path) as tensors:
        dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        strange = sorted(set(dtypes.values()) - set(DTYPES))
        if strange:
            raise ValueError(f"{path} has tensors stored as {', '.join(strange)}; known are {', '.join(DTYPES)}")
        return {name: np.asarray(tensors.get_tensor(name)) for name in dtypes}


@jax.jit
def _take(leaf, layer):
    return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)


def _layer(leaf, layer: int):
    return _take(leaf, layer) if isinstance(leaf, jax.Array) else leaf[layer]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_size(folder: str | Path) -> tuple[int, list[str]] | None:
    """(ids that the tokenizer of a folder has, control symbols of ours that it lacks), or None where there is none.

    From tokenizer.json, or else tokenizer.model (SentencePiece), with the added tokens that stand beside them. Ids have
    gaps in some vocabularies, so the first is the highest id plus one.

    Raises:
      ValueError: where a file is damaged.
    """
    folder = Path(folder)
    fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
    ids: dict[str, int] = {}
    if fast.is_file():
        content = read_json(fast)
        try:
            vocab = content["model"]["vocab"]
            ids |= vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
            ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{fast} is no tokenizer of the tokenizers library ({error!r})") from error
    elif slow.is_file():
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=slow.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{slow} is no SentencePiece model ({error}): download it again") from error
        ids |= {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    else:
        return None
    ids |= {token["content"]: token["id"] for token in hugging_face.read_added(folder)}
    return max(ids.values()) + 1, [symbol for symbol in CONTROL_SYMBOLS if symbol not in ids]
