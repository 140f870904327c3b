"""What could not be done inside a compiled function, where nothing can be raised: bits per row."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp


class Status(enum.IntFlag):
    """What went wrong inside a compiled function, per row, until `clear`.

    A refused request left the row as it was. Numbers that no tier could hold were appended changed:
    NaN as 0, the rest within +-`KvCacheConfig.largest`.
    """

    OK = 0
    EVICT_TOO_MANY = 1
    REWIND_TOO_MANY = 2
    REWIND_CUTS_GROUP = 4
    OUT_OF_RANGE = 8  # a negative count, or a length beyond the tokens given
    SATURATED = 16  # finite, but larger than `KvCacheConfig.largest`
    NOT_FINITE = 32  # NaN or infinite
    OUT_OF_POSITIONS = 64  # a position beyond `ring.MOST`, as int32 counts them
    OUT_OF_PAGES = 128  # the pool's free pages do not suffice, or none were reserved
    FULL = 256  # an append would have evicted, and the config says overflow="refuse"
    REWIND_INTO_GAP = 512  # the newest token that a rewind would leave was compressed away


def flagged(status: jax.Array, where: jax.Array, bit: Any, layer: Any = None) -> jax.Array:
    """`status` [B] or [L, B] with a bit, or bits [B], set in rows `where`, of one layer if one is
    given."""
    bits = jnp.where(where, jnp.asarray(bit, jnp.int32), jnp.int32(0))
    return status | bits if layer is None else status.at[layer].set(status[layer] | bits)


def joined(bits: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The bits that appended tokens may set, or-ed over `axes`: one by one, since MLX reduces no
    integers by `or`."""
    found = jnp.zeros((), jnp.int32)
    for bit in (Status.SATURATED, Status.NOT_FINITE):
        found = found | jnp.where((bits & int(bit) != 0).any(axes), jnp.int32(bit), jnp.int32(0))
    return found
