"""From a Hugging Face config to the rotary embedding of a layer, and whether its keys have a bias
before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxkv.models.families import Fields
from jaxkv.models.spec import Kind
from jaxkv.rotary import Rotary

INTERLEAVED = {
    *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5", "glm"),
    *("glm4", "gptj", "codegen", "chatglm", "llama4", "llama4_text"),
}
"""Families that turn neighbours; the others turn the halves of a head."""

BIASED = {"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "phi"}
"""Families whose keys have a bias that their config does not name."""

BIAS_FIELDS = ("attention_bias", "qkv_bias", "add_qkv_bias", "use_qkv_bias", "use_bias")

Scaling = NDArray[np.float64] | None


def has_key_bias(fields: Fields) -> bool:
    """Whether something is added to all keys before they are turned."""
    return fields.get("model_type") in BIASED or any(fields.get(name) for name in BIAS_FIELDS)


def rotary_of(fields: Fields, kind: Kind, index: int, head_dim: int) -> Rotary | None:
    """The rotary embedding of layer number `index` over heads of `head_dim` elements; None where it
    has none, or one that is not known here."""
    flags = fields.get("no_rope_layers")
    if isinstance(flags, Sequence) and index < len(flags) and not flags[index]:
        return None
    recipe = _recipe(fields, kind)
    base = recipe.get("rope_theta", fields.get("rope_theta"))
    part = recipe.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
    name = recipe.get("rope_type", recipe.get("type", "default" if "factor" not in recipe else ""))
    if base is None or name not in SCALINGS:
        return None
    dim = int(head_dim * part)
    pairing = "interleaved" if fields.get("model_type") in INTERLEAVED else "halves"
    try:
        scaling = SCALINGS[name](_radians(float(base), dim), {**fields, **recipe})
    except KeyError:  # a recipe that lacks a field
        return None
    factors = None if scaling is None else tuple(scaling.tolist())
    return Rotary(float(base), pairing, factors, None if dim == head_dim else dim)


def _recipe(fields: Fields, kind: Kind) -> Fields:
    """What is said of the layers of a kind, or of all."""
    recipe: Fields = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    nested, local = f"{kind.value}_attention", fields.get("rope_local_base_freq")
    if nested not in recipe and kind is Kind.SLIDING and local:
        return {"rope_theta": local}  # Gemma 3's files of 2025
    found: Fields = recipe.get(nested, recipe)
    return found


def _radians(base: float, dim: int) -> NDArray[np.float64]:
    """What each pair turns by per position, [dim // 2]."""
    return base ** (-np.arange(0, dim, 2) / dim)


def _unscaled(radians: NDArray[np.float64], recipe: Fields) -> Scaling:
    return None


def _linear(radians: NDArray[np.float64], recipe: Fields) -> Scaling:
    """Positions drawn together (Chen et al. 2023)."""
    return np.full(len(radians), 1 / recipe["factor"])


def _llama3(radians: NDArray[np.float64], recipe: Fields) -> Scaling:
    """Slow pairs alone, with a ramp by how often each turns in the first context (Llama 3.1)."""
    low, high = recipe.get("low_freq_factor", 1.0), recipe.get("high_freq_factor", 4.0)
    turns = recipe["original_max_position_embeddings"] * radians / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept + (1 - kept) / recipe["factor"]


def _yarn(radians: NDArray[np.float64], recipe: Fields) -> Scaling:
    """The same by a ramp over the numbers of the pairs (Peng et al. 2024)."""
    context = recipe.get("original_max_position_embeddings") or recipe["max_position_embeddings"]
    step = math.log(radians[0] / radians[-1]) / (len(radians) - 1)

    def pair(turns: float) -> float:
        return math.log(context / (turns * 2 * math.pi)) / step

    first, last = pair(recipe.get("beta_fast") or 32.0), pair(recipe.get("beta_slow") or 1.0)
    if recipe.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0.0), min(last, 2.0 * len(radians) - 1)
    slow = np.clip((np.arange(len(radians)) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return 1 - slow + slow / recipe["factor"]


SCALINGS: dict[str, Callable[[NDArray[np.float64], Fields], Scaling]] = {
    "default": _unscaled,
    "mrope": _unscaled,  # of a text, whose three positions are one
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""What stretches a rotary embedding, by name, as factors [dim // 2] of what its pairs turn by.
(`dynamic` and `longrope` change with the length: there is no constant that describes them.)"""
