"""Position arithmetic: which tier holds a position, in which slot, and which position a slot holds.

A row of the batch knows two things (int32): `end`, its next position, and `kept` [n], the first
position whose data is still in the ring of each of its n tiers. Everything else follows. Positions
below `sink_tokens` are sinks; the chain holds the rest.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import KvCacheConfig

MOST = jnp.iinfo(jnp.int32).max - 1
"""The largest end of a row: positions beyond are none (and `scoring.EVERY` is this one)."""


def chain_end(config: KvCacheConfig, end: jax.Array) -> jax.Array:
    """The end of the chain: `end`, but never inside the sinks."""
    return jnp.maximum(end, config.sink_tokens)


def starts(config: KvCacheConfig, end: jax.Array, kept: jax.Array) -> list[jax.Array]:
    """The first position of each tier, newest tier first; the last of them is the first position
    held at all.

    Args:
      end: [...] next position.
      kept: [..., n] first position still present in each ring.

    Returns:
      n arrays [...]: tier i holds [starts[i], starts[i - 1]), where starts[-1] is `chain_end`.
    """
    upper = chain_end(config, end)
    begin = jnp.minimum(upper, jnp.maximum(upper - config.room, kept[..., -1]))
    found = []
    for index, tier in enumerate(config.chain[:-1]):
        due = round_down(config, upper - tier.length)
        upper = jnp.minimum(upper, jnp.maximum(jnp.maximum(due, kept[..., index]), begin))
        found.append(upper)
    return [*found, begin]


def uppers(config: KvCacheConfig, end: jax.Array, lows: list[jax.Array]) -> list[jax.Array]:
    """The end of each tier, given the `starts`: the one before it."""
    return [chain_end(config, end), *lows[:-1]]


def round_down(config: KvCacheConfig, position: jax.Array) -> jax.Array:
    """The last boundary (multiple of `config.step`, counted from the end of the sinks) not after
    `position`."""
    if config.step == 1:
        return position
    return position - (position - config.sink_tokens) % config.step


def still_kept(config: KvCacheConfig, kept: jax.Array, tops: list[jax.Array]) -> jax.Array:
    """`kept` after tier i has been written up to position `tops[i]`: a ring overwrites what lies a
    capacity behind."""
    oldest = [top - tier.capacity for top, tier in zip(tops, config.chain, strict=True)]
    return jnp.maximum(kept, jnp.stack(oldest, axis=-1))


def slot_of(position: jax.Array, offset: int, capacity: int) -> jax.Array:
    """The slot of a position in a ring whose first position is `offset`."""
    return (position - offset) % capacity


def position_of(slot: jax.Array, top: jax.Array, offset: int, capacity: int) -> jax.Array:
    """The newest position below `top` that lives in `slot`. It may lie below what is held: compare
    it with the tier's start."""
    filled = (
        top - offset
    ) % capacity  # slots of the ring's present round; a division per row, none per slot
    return top - filled + slot - jnp.where(slot < filled, 0, capacity)


def is_sound(config: KvCacheConfig, end: Any, lost: Any) -> Any:
    """Whether the numbers `end` [...] and `lost` [..., n] are such as the verbs leave, [...]
    bool."""
    most = np.maximum(end - np.minimum(end, config.sink_tokens), 0)
    return (end >= 0) & ((lost >= 0) & (lost <= most[..., None])).all(-1)
