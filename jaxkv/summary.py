"""What a cache is, in words: a format, and a state in a line for each tier."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxkv.config import KvCacheConfig
from jaxkv.formats import Format, Precision


def describe(fmt: Format) -> str:
    """A format in words."""
    if isinstance(fmt, Precision):
        return fmt.value
    unit = f"{fmt.group_size} tokens of a channel" if fmt.axis == "channel" else f"{fmt.group_size}"
    flags = [
        name
        for name in (
            "two_level",
            "symmetric",
            "rotate",
            "align",
            "balance",
            "turned_mean",
            "center",
        )
        if getattr(fmt, name)
    ]
    return ", ".join(
        [f"{fmt.bits} bits, groups of {unit}", *(flag.replace("_", " ") for flag in flags)]
    )


def summary(name: str, config: KvCacheConfig, end: Any) -> str:
    """A state in a line, and one for each tier. `end` [B] or [L, B] may be anything that stands for
    the next positions: an array, a traced, abstract or deleted one, a partition spec."""
    sizes = [f"{config.num_kv_heads} kv heads of {config.head_dim}"]
    for size, unit in zip(reversed(getattr(end, "shape", ())), ("rows", "layers"), strict=False):
        sizes.insert(0, f"{size} {unit}")
    tiers = [config.sink_spec] * bool(config.sink_tokens) + list(config.chain)
    lines = [
        f"  {tier.name:5} {tier.length:9,} tokens  {' | '.join(map(describe, tier.formats))}"
        for tier in tiers
    ]
    return "\n".join([f"{name}: {', '.join(sizes)}; {_positions(end)}", *lines])


def _positions(end: Any) -> str:
    if isinstance(end, jax.core.Tracer) or not isinstance(end, (jax.Array, np.ndarray)):
        return "traced" if isinstance(end, jax.core.Tracer) else "abstract"
    if isinstance(end, jax.Array) and end.is_deleted():
        return "deleted (donated to a later call)"
    if isinstance(end, jax.Array) and not end.is_fully_addressable:
        return "on several hosts"
    low, high = int(np.min(end)), int(np.max(end))
    return f"next position {low:,}" + (f" .. {high:,}" if low < high else "")
