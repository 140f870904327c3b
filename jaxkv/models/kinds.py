"""How each layer of a Hugging Face config looks back: the rules of the model families."""

from __future__ import annotations

from collections.abc import Callable

from jaxkv.models.families import Fields
from jaxkv.models.spec import Kind

_NAMES = {
    "full_attention": Kind.FULL,
    "attention": Kind.FULL,
    "indexed_attention": Kind.FULL,  # sparse reads of a full cache (DeepSeek V3.2)
    "hybrid": Kind.FULL,  # attention beside a state of its own (Zamba)
    "sliding_attention": Kind.SLIDING,
    "chunked_attention": Kind.CHUNKED,
    "linear_attention": Kind.OWN,
    "mamba": Kind.OWN,
    "mamba2": Kind.OWN,
    "conv": Kind.OWN,
    "recurrent": Kind.OWN,
    "moe": Kind.NONE,
    "mlp": Kind.NONE,
}
"""What configs call their layers."""

_EVERY_LAYER_SLIDES = {
    *("mistral", "mixtral", "phi3", "phimoe", "phi4_multimodal", "starcoder2", "ministral"),
    *("qwen2_moe", "qwen3_moe", "minimax_m2"),
}
"""Families in which a `sliding_window` holds for all layers."""

_HAS_A_SWITCH = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "qwen2_vl", "qwen2_5_vl"}
"""Families in which `sliding_window` counts only beside `use_sliding_window`."""

_IS_MIXED = {"bamba", "granitemoehybrid", "kimi_linear", "lfm2", "minimax", "nemotron_h"}
"""Families with states of their own in layers that only a list can name."""

_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "gpt_oss": 2} | {
    "cohere2": 4,
    "exaone4": 4,
    "olmo3": 4,
    "qwen3_next": 4,
    "qwen3_5_text": 4,
    "qwen3_5_moe_text": 4,
}
"""Families in which every n-th layer is full, the others sliding or linear, where the file does not
say how many."""


def kinds_of(fields: Fields, count: int) -> tuple[list[Kind], list[str]]:
    """The kind of each of `count` layers, and what the config leaves open, in words.

    Raises:
      ValueError: names of layers that mean nothing here, or another number of them.
    """
    for rule in _RULES:
        found = rule(fields, count)
        if found is not None:
            if len(found) != count:
                raise ValueError(
                    f"the config names {len(found)} layers and counts {count}: give layer_types"
                )
            return found, []
    return _by_window(fields, count)


def _listed(fields: Fields, count: int) -> list[Kind] | None:
    """A list with the name of each layer; a short one repeats (RecurrentGemma)."""
    names = fields.get("layer_types") or fields.get("layers_block_type")
    cycle = fields.get("block_types")
    if not names and cycle:
        names = [cycle[i % len(cycle)] for i in range(count)]
    if not names:
        return None
    if unknown := set(names) - set(_NAMES):
        raise ValueError(
            f"layers of types {sorted(unknown)}: known are {sorted(_NAMES)}; give layer_types"
        )
    kinds = [_NAMES[name] for name in names]
    if fields.get("model_type") == "recurrent_gemma":
        kinds = [Kind.SLIDING if kind is Kind.FULL else kind for kind in kinds]
    if fields.get("model_type") == "gemma4_text":
        kinds[-1] = Kind.FULL  # whatever the list says
    return kinds


def _lettered(fields: Fields, count: int) -> list[Kind] | None:
    """A string with a letter for each layer (Nemotron H), or a flag (MiniMax)."""
    letters = {"M": Kind.OWN, "*": Kind.FULL, "-": Kind.NONE, "E": Kind.NONE}
    if pattern := fields.get("hybrid_override_pattern"):
        return [letters[letter] for letter in pattern]
    if flags := fields.get("attn_type_list"):
        return [Kind.FULL if flag else Kind.OWN for flag in flags]
    return None


def _numbered(fields: Fields, count: int) -> list[Kind] | None:
    """The numbers of the layers with full attention; the others have states of their own."""
    linear = fields.get("linear_attn_config") or {}
    if "full_attn_layers" in linear:  # counted from 1 (Kimi Linear)
        full = {number - 1 for number in linear["full_attn_layers"]}
    elif period := fields.get("attn_layer_period"):
        full = {i for i in range(count) if i % period == fields["attn_layer_offset"]}
    elif indices := fields.get("full_attn_idxs"):
        full = set(indices)
    elif "attn_layer_indices" in fields:
        full = set(fields["attn_layer_indices"] or ())
    else:
        return None
    return [Kind.FULL if i in full else Kind.OWN for i in range(count)]


def _chunked(fields: Fields, count: int) -> list[Kind] | None:
    """Layers with a rotary embedding look at their chunk, those without at everything (Llama 4)."""
    if fields.get("model_type") != "llama4_text" or not fields.get("attention_chunk_size"):
        return None
    interval = fields.get("no_rope_layer_interval") or 4
    rotary = fields.get("no_rope_layers") or [(i + 1) % interval for i in range(count)]
    return [Kind.CHUNKED if flag else Kind.FULL for flag in rotary]


def _every_nth(fields: Fields, count: int) -> list[Kind] | None:
    """Every n-th layer is full."""
    model_type = fields.get("model_type")
    period = fields.get("full_attention_interval")
    if period:
        other = Kind.OWN
    else:
        pattern = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern")
        period = pattern or _FULL_EVERY.get(str(model_type))
        is_linear = str(model_type).startswith(("qwen3_next", "qwen3_5"))
        other = Kind.OWN if is_linear else Kind.SLIDING
    if not period or (other is Kind.SLIDING and not fields.get("sliding_window")):
        return None
    if isinstance(period, str):  # "LLLG" (EXAONE 4)
        return [Kind.FULL if period[i % len(period)] == "G" else Kind.SLIDING for i in range(count)]
    return [other if (i + 1) % period else Kind.FULL for i in range(count)]


_RULES: tuple[Callable[[Fields, int], list[Kind] | None], ...] = (
    *(_listed, _lettered, _numbered, _chunked, _every_nth),
)


def _by_window(fields: Fields, count: int) -> tuple[list[Kind], list[str]]:
    """What `sliding_window` alone says."""
    model_type, window = fields.get("model_type"), fields.get("sliding_window")
    full = [Kind.FULL] * count
    if model_type in _IS_MIXED:
        raise ValueError(f"{model_type} mixes layers, and the config names none: give layer_types")
    if window is None or (model_type in _HAS_A_SWITCH and not fields.get("use_sliding_window")):
        return full, []
    if model_type in _EVERY_LAYER_SLIDES:
        return [Kind.SLIDING] * count, []
    if (first := fields.get("max_window_layers")) is not None:
        return [Kind.SLIDING if i >= first else Kind.FULL for i in range(count)], []
    return full, [
        f"sliding_window={window} does not say in which layers: all are counted as full; give "
        "layer_types"
    ]
