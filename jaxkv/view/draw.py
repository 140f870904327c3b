"""A state for people to look at: a bar for each tier, in a terminal."""

from __future__ import annotations

import numpy as np

from jaxkv.state import CacheState, segments
from jaxkv.stats import bytes_per_token
from jaxkv.status import Status
from jaxkv.summary import describe
from jaxkv.tiers.segment import Segment

WIDTH = 40
"""Characters of a full bar."""


def draw(state: CacheState, row: int = 0, layer: int = 0) -> str:
    """The tiers of one row (of one layer, where there are several) as bars, newest tier first.

    Returns:
      Lines of text: what the whole state is, a line for each tier (tokens held of its length, the
      format of keys and values, bytes), and what `status` says.

    Raises:
      ValueError: the state has no such row or layer, or is traced.
    """
    _check("row", row, state.batch_size)
    _check("layer", layer, state.num_layers or 1)
    parts = segments(state, None if state.num_layers is None else layer)
    lines = [_headline(state), *(_line(state, part, row) for part in _newest_first(parts))]
    status = int(np.bitwise_or.reduce(np.asarray(state.status).ravel()))
    return "\n".join(lines if not status else [*lines, f"status: {Status(status)!s}"])


def _check(name: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise ValueError(f"{name}={index}: the state has 0 .. {size - 1}")


def _newest_first(parts: list[Segment]) -> list[Segment]:
    chain = [part for part in parts if part.spec.name != "sinks"]
    return [*chain, *(part for part in parts if part.spec.name == "sinks")]


def _headline(state: CacheState) -> str:
    layers = "" if state.num_layers is None else f"{state.num_layers} layers, "
    ends = np.asarray(state.end)
    held = f"{ends.min():,}" if ends.min() == ends.max() else f"{ends.min():,} to {ends.max():,}"
    config = state.config
    heads = f"{config.num_kv_heads} kv heads of {config.head_dim}"
    return f"{layers}{state.batch_size} rows, {heads}; next position {held}"


def _line(state: CacheState, part: Segment, row: int) -> str:
    held = int(np.asarray(part.high - part.low)[row])
    full = round(WIDTH * held / part.spec.length)
    each = bytes_per_token(state.config, part.spec)
    bar = "#" * full + "." * (WIDTH - full)
    formats = " | ".join(dict.fromkeys(describe(fmt) for fmt in part.spec.formats))
    count = f"{held:,} of {part.spec.length:,}"
    return f"{part.spec.name:6}[{bar}] {count}  {formats}  {each:,.0f} B a token"
