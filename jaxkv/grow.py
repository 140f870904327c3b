"""A cache that has become too small: the same tokens in one that holds more."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import ring
from jaxkv.chain import TierSpec
from jaxkv.config import KvCacheConfig
from jaxkv.formats import Format, channel_group
from jaxkv.state import CacheState, check_rows_apart
from jaxkv.tiers import tokens
from jaxkv.tiers.segment import Tier
from jaxkv.tiers.tokens import SCALES, Tokens

SIZES = ("max_tokens", "tail_length", "warm_length", "rewind_length")
"""The fields in which a grown cache may differ, none smaller than it was."""


def grow(state: CacheState, config: KvCacheConfig) -> CacheState:
    """The same tokens, at their positions and bit for bit, in a cache of a larger configuration.

    A token's slot depends on the size of its ring, so all arrays are written anew: this takes the
    memory of both, and the next step is compiled for the new shapes.

    Args:
      config: as `state.config`, but for a larger `max_tokens` (or tail, warm tier, rewind_length).

    Raises:
      ValueError: a config that differs in more, is smaller, or has other tiers; a pool.
    """
    check_rows_apart(state, "grow")
    _check(state.config, config)
    lows = ring.starts(state.config, state.end, state.kept)
    tops = ring.uppers(state.config, state.end, lows)
    tiers = []
    for i, (tier, old, new) in enumerate(
        zip(state.tiers, state.config.chain, config.chain, strict=True)
    ):
        slot = jnp.arange(new.capacity, dtype=jnp.int32)
        position = ring.position_of(slot, tops[i][..., None], new.offset, new.capacity)
        is_there = (position >= state.kept[..., i, None]) & (position >= new.offset)
        sides = zip(tier.sides, old.formats, new.formats, strict=True)
        tiers.append(Tier(*(_relaid(*side, position, is_there, old) for side in sides)))
    # What the smaller cache had evicted stays evicted, where its ring still has it, too.
    lost = state.lost.at[..., -1].set(lows[-1] - config.sink_tokens)
    return dataclasses.replace(state, tiers=tuple(tiers), lost=lost, config=config)


def _relaid(
    held: Tokens, fmt: Format, new: Format, position: jax.Array, there: jax.Array, old: TierSpec
) -> Tokens:
    """The arrays of one side with the tokens of `position` [..., B, S'] in their new slots; zeros
    where they are not `there`."""
    assert fmt == new
    slots = jnp.where(there, ring.slot_of(position, old.offset, old.capacity), 0)
    group = channel_group(fmt)
    of_scale = slots[..., ::group] // group, there[..., ::group], tokens.scale_axis(fmt)
    wanted = {"data": (slots, there, -2), **dict.fromkeys(SCALES, of_scale)}
    arrays = {name: getattr(held, name) for name in wanted}
    found: dict[str, Any] = {
        name: None if a is None else _moved(a, *wanted[name]) for name, a in arrays.items()
    }
    return dataclasses.replace(held, **found)


def _moved(array: jax.Array, slots: jax.Array, there: jax.Array, axis: int) -> jax.Array:
    """An array with its slots `slots` [..., B, S'] along the axis of slots, -2 or -1."""
    axes = (-3, -1) if axis == -2 else (-3, -2)
    at, is_there = (jnp.expand_dims(x, axes) for x in (slots, there))
    return jnp.where(is_there, jnp.take_along_axis(array, at, axis=axis), 0).astype(array.dtype)


def _check(old: KvCacheConfig, new: KvCacheConfig) -> None:
    sizes = {name: getattr(old, name) for name in SIZES}
    same = dataclasses.replace(new, **sizes) == old
    if not same or any(getattr(new, name) < size for name, size in sizes.items()):
        raise ValueError(
            f"grow got {new}: must be the state's own config, {old}, with no other change than "
            f"larger {', '.join(SIZES)}"
        )
    if [spec.name for spec in new.chain] != [spec.name for spec in old.chain]:
        raise ValueError(
            f"grow from {old.max_tokens} to {new.max_tokens} tokens adds a tier: raise tail_length "
            f"(now {new.tail_length}) with max_tokens, or make a new cache"
        )
