"""Configurations with names, chosen by measurement (README, quality), and policies that differ by
layer."""

from __future__ import annotations

from typing import Any

from jaxkv.config import KvCacheConfig, Migration
from jaxkv.formats import Precision, QuantSpec, adapting

PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "FP32": (
        dict(tail_precision=Precision.FP32, store_precision=Precision.FP32),
        "For tests against a model's own cache: bit for bit what was given.",
    ),
    "FP16": (
        dict(store_precision=Precision.FP16),
        "No quantization; what the others are measured against.",
    ),
    "Q8": (
        dict(store_precision=Precision.Q8),
        "When nothing may be lost: half the memory, no measurable difference.",
    ),
    "Q4": (
        dict(store_precision=Precision.Q4),
        "The default: 28 % of the memory. Key biases (Qwen2) need `rotary=`; `layers_of` gives it.",
    ),
    "Q4_SINKS": (
        dict(store_precision=Precision.Q4, sink_tokens=64),
        "The default with its first 64 tokens exact. Key biases need `rotary=` here, too.",
    ),
    "Q4K": (
        dict(store_precision=Precision.Q4K),
        "Smaller groups at Q4's price: for wide outliers. Key biases need `rotary=`.",
    ),
    "Q4_BIAS": (
        dict(
            key_quant=QuantSpec(4, 32, axis="channel", turned_mean=True),
            value_quant=adapting(4),
            migration=Migration.BATCHED,
            migration_batch=32,
            sink_tokens=64,
        ),
        "Also called Q4_BEST: the least loss at 4 bits, key biases included; keys per channel.",
    ),
    "K4V2": (
        dict(key_quant=adapting(4), value_quant=adapting(2), sink_tokens=64),
        "A fifth of the memory: values bear 2 bits, keys do not. Key biases need `rotary=`.",
    ),
    "K3V2": (
        dict(key_quant=adapting(3), value_quant=adapting(2), sink_tokens=64),
        "Between K4V2 and Q2, slower to read than both. Key biases need `rotary=`.",
    ),
    "Q2": (
        dict(store_precision=Precision.Q2, sink_tokens=64),
        "The longest context that still reads well: sinks exact. Key biases need `rotary=`.",
    ),
    "KIVI2": (
        dict(
            key_quant=QuantSpec(2, 32, axis="channel"),
            value_quant=QuantSpec(2, 32),
            migration=Migration.BATCHED,
            migration_batch=32,
        ),
        "KIVI's 2 bits (Liu et al. 2024), for comparison: keys per channel, values per token.",
    ),
}
"""Name -> the fields of `KvCacheConfig` that it sets, and when to use it."""

ALIASES = {"Q4_BEST": "Q4_BIAS"}


def preset(name: str, **fields: Any) -> KvCacheConfig:
    """The configuration of a preset; other fields (max_tokens, num_kv_heads, head_dim, ...) as
    given. A tail that is not given is as long as `max_tokens` leaves room for, 256 at most.

    Raises:
      ValueError: no such preset.
    """
    known = ALIASES.get(name.upper(), name.upper())
    if known not in PRESETS:
        raise ValueError(f"no preset {name!r}: there are {', '.join(PRESETS)}")
    fields = {**PRESETS[known][0], **fields}
    if "tail_length" not in fields and "max_tokens" in fields:
        others = fields.get("sink_tokens", 0) + fields.get("warm_length", 0)
        room = max(fields["max_tokens"] - others, 0)
        fields["tail_length"] = min(KvCacheConfig.tail_length, room)
    return KvCacheConfig(**fields)


def exact_ends(
    config: KvCacheConfig, num_layers: int, first: int = 1, last: int = 1
) -> list[KvCacheConfig]:
    """One config per layer: `config`, but the first and last layers unquantized (they are the most
    sensitive; vLLM, SGLang).

    Raises:
      ValueError: more exact layers than layers.
    """
    if first < 0 or last < 0 or first + last > num_layers:
        raise ValueError(
            f"first={first}, last={last}: must be at least 0 and together at most "
            f"num_layers={num_layers}"
        )
    kept = {*range(first), *range(num_layers - last, num_layers)}
    return [exact(config) if i in kept else config for i in range(num_layers)]


def exact(config: KvCacheConfig) -> KvCacheConfig:
    """The same cache, but unquantized."""
    room = config.max_tokens - config.sink_tokens
    return KvCacheConfig(
        tail_length=room,
        tail_precision=config.sink_precision,
        max_tokens=config.max_tokens,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        value_dim=config.value_dim,
        values_from_keys=config.values_from_keys,
        sink_tokens=config.sink_tokens,
        rewind_length=config.rewind_length,
        window=config.window,
        rotary=config.rotary,
    )
