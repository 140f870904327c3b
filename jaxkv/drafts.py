"""Draft trees: of the tokens appended last, those of the accepted path stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxkv import ring
from jaxkv.checks import as_counts, is_concrete
from jaxkv.drop import rewind
from jaxkv.formats import Format, Precision
from jaxkv.state import CacheState
from jaxkv.status import Status, flagged
from jaxkv.tiers import tokens
from jaxkv.tiers.place import Index
from jaxkv.update import append


def keep(state: CacheState, indices: ArrayLike, of: ArrayLike) -> CacheState:
    """Of the newest `of` tokens of every row, in all layers, keeps those at `indices`; bit for bit
    as if only they had been appended.

    A tree of drafts is appended in one piece, attended with a mask, and the path that the model
    accepts is kept here. Its tokens move up: where the rotary embedding is by position, give each
    token of the tree the position of its depth.

    Args:
      indices: [B, n] ints, in order, 0 the oldest of the `of` tokens; -1: none.
      of: int or [B], at most `config.rewind_length`.

    Raises:
      ValueError: a first tier that is quantized, of which tokens cannot be taken back as they were
        given; more tokens than `rewind_length` or than are held; indices that are out of range or
        order. Inside jit such a row stays as it was and gets `Status.REWIND_TOO_MANY` or
        `Status.OUT_OF_RANGE`.
    """
    config, first = state.config, state.config.chain[0]
    if not all(isinstance(fmt, Precision) for fmt in first.formats):
        raise ValueError(
            f"keep needs newest tokens in a float precision, and the {first.name} tier is "
            "quantized: set tail_length to at least the length of your drafts"
        )
    chosen, of = _checked(state, indices, as_counts("of", of, state.batch_size, None))
    wrong, deep = _out_of_order(chosen, of), of > config.rewind_length
    if is_concrete(wrong, deep) and bool(np.any(wrong | deep)):
        raise ValueError(
            f"of={np.asarray(of).tolist()}, indices={np.asarray(chosen).tolist()}: must be at most "
            f"rewind_length={config.rewind_length}, and in order within 0 .. of - 1 (-1: none)"
        )
    refused = wrong | deep
    count = jnp.where(refused, 0, of)
    rewound = rewind(state, count)
    done = ~refused & (rewound.end == state.end - count) & (count > 0)  # [B] or [L, B]
    flags = flagged(rewound.refused, wrong, Status.OUT_OF_RANGE)
    rewound = dataclasses.replace(
        rewound, refused=flagged(flags, deep & ~wrong, Status.REWIND_TOO_MANY)
    )
    valid = (chosen >= 0) & done[..., None]
    position = (state.end - count)[..., None] + jnp.maximum(chosen, 0)

    def of_layer(held: CacheState, layer: Index, at: jax.Array, valid: jax.Array) -> CacheState:
        sides = [_newest(held, side, at, layer) for side in range(len(first.formats))]
        values = sides[1] if len(sides) > 1 else None
        return append(held, sides[0], values, valid=valid, layer=layer)

    if state.num_layers is None:
        return of_layer(rewound, None, position, valid)
    found: CacheState = lax.fori_loop(
        0,
        state.num_layers,
        lambda i, held: of_layer(held, i, position[i], valid[i]),
        rewound,
    )
    return found


def _checked(state: CacheState, indices: ArrayLike, of: jax.Array) -> tuple[jax.Array, jax.Array]:
    given: Any = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    is_table = given.ndim == 2 and given.shape[0] == state.batch_size and given.shape[1] > 0
    if not is_table or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"indices has shape {given.shape} and dtype {given.dtype}: must be ints [B, n] with "
            f"B={state.batch_size} and n >= 1, -1 for none"
        )
    return jnp.asarray(given, jnp.int32), of


def _out_of_order(chosen: jax.Array, of: jax.Array) -> jax.Array:
    """Rows [B] whose indices do not grow, or reach beyond `of`."""
    before = lax.cummax(jnp.pad(chosen, ((0, 0), (1, 0)), constant_values=-1)[:, :-1], axis=1)
    falls = (chosen >= 0) & (chosen <= before)
    return (falls | (chosen >= of[:, None]) | (chosen < -1)).any(1)


def _newest(state: CacheState, side: int, position: jax.Array, layer: Index) -> jax.Array:
    """Keys or values [B, n, K, H] of positions [B, n] that the first tier, or the sinks, hold."""
    first = state.config.chain[0]

    def read(held: Any, fmt: Format, capacity: int, offset: int) -> jax.Array:
        return tokens.read(held, fmt, ring.slot_of(position, offset, capacity), layer)

    found = read(state.tiers[0].sides[side], first.formats[side], first.capacity, first.offset)
    if state.sinks is None:
        return found
    sinks = state.config.sink_spec
    early = read(state.sinks.sides[side], sinks.key, sinks.capacity, 0)
    return jnp.where((position < state.config.sink_tokens)[..., None, None], early, found)
