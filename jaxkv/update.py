"""The writers: append, migrate. Each gives a new state.

An append writes the new tokens to the first tier, then hands from tier to tier what is due there:
the positions between a boundary's old and new place, quantized where they arrive. Donate the state
(`jax.jit(step, donate_argnums=0)`) and all of it happens in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxkv import ring
from jaxkv.checks import (
    as_counts,
    as_layer,
    check_either,
    check_new_tokens,
    in_range,
    is_concrete,
)
from jaxkv.config import KvCacheConfig, Overflow
from jaxkv.kernels import dispatch
from jaxkv.kernels.traced import once
from jaxkv.migration import Arrival, Passage, due, store, take_in
from jaxkv.padding import Padding
from jaxkv.state import CacheState
from jaxkv.status import Status, flagged
from jaxkv.tiers import entry
from jaxkv.tiers.place import Index
from jaxkv.tiers.summaries import completed
from jaxkv.tiers.tokens import Sliced


@once
def append(
    state: CacheState,
    keys: jax.Array,
    values: jax.Array | None,
    lengths: ArrayLike | None = None,
    *,
    valid: ArrayLike | None = None,
    layer: Index = None,
    implementation: dispatch.Implementation = None,
) -> CacheState:
    """Appends tokens, migrates what leaves a tier and evicts what no longer fits.

    Donated (`jax.jit(step, donate_argnums=0)`) the state is changed in place, and it and all states
    that share arrays with it are gone: keep what you may come back to with `jaxkv.copy`.

    Appending T tokens gives the same bits as T appends of one.

    Args:
      keys, values: [B, T, K, H] and [B, T, K, V], any float dtype (values None where they are a
        part of the keys); rounded to the tail's precision. What no tier
        could hold enters changed, and its row gets `Status.SATURATED` or `Status.NOT_FINITE`:
        numbers beyond +-`config.largest` (65,504 where a tier is in fp16) as that, NaN as 0.
      lengths: [B] ints in 0 .. T: how many of the T tokens are valid in each row (the first ones).
        None: all. Inside jit, a row whose length is none of these stays as it was and gets
        `Status.OUT_OF_RANGE`; under `overflow="refuse"`, one without room for all, `Status.FULL`.
      valid: [B, T] bool instead of lengths, where padding may stand anywhere: only the tokens that
        are True enter, in their order.
      layer: which layer, an int or a traced scalar; required where the state has layers. A traced
        layer that the state does not have gets no tokens, and `Status.OUT_OF_RANGE` is set in the
        layer nearest to it.
      implementation: "xla" does without the GPU kernel that quantizes and stores; else it does what
        it can.

    Raises:
      ValueError: wrong shapes or dtypes, lengths out of range (where concrete), a missing or
        surplus layer, positions beyond int32 (inside jit such a row stays as it was and gets
        `Status.OUT_OF_POSITIONS`).
    """
    config = state.config
    layer, exists = as_layer(layer, state.num_layers)
    sides = check_new_tokens(keys, values, state.batch_size, config.num_kv_heads, config.side_dims)
    size = sides[0].shape[1]
    if valid is not None:
        check_either(lengths, valid)
        padding = Padding.of(valid, state.batch_size, size)
        sides, lengths = tuple(map(padding.together, sides)), padding.lengths
    given = as_counts("lengths", lengths, state.batch_size, size)
    count = in_range(given, size, exists)
    end, kept = (state.end, state.kept) if layer is None else (state.end[layer], state.kept[layer])
    past = beyond(end, count)
    refused = flagged(state.refused, past, Status.OUT_OF_POSITIONS, layer)
    if lengths is not None or exists is not True:
        refused = flagged(refused, (given != count) & ~past, Status.OUT_OF_RANGE, layer)
    count = jnp.where(past, 0, count)
    full = overflows(config, end, kept, count)
    if full is not None:
        refused, count = flagged(refused, full, Status.FULL, layer), jnp.where(full, 0, count)
    if state.pages is not None:
        ready = state.pages.ready(*due(config, end, kept, count), size)
        refused = flagged(refused, ~ready, Status.OUT_OF_PAGES, layer)
        count = jnp.where(ready, count, 0)
    state = dataclasses.replace(state, refused=refused)
    most = dispatch.tokens_at_once(sides[0].shape, config.step)
    if size > most and state.pages is None:
        return _append_blocks(state, sides, count, most, layer, implementation)
    return _append(state, sides, count, layer, implementation)


def _append_blocks(
    state: CacheState,
    sides: tuple[jax.Array, ...],
    count: jax.Array,
    size: int,
    layer: Index,
    implementation: dispatch.Implementation,
) -> CacheState:
    """`_append`, `size` tokens at a time."""
    pad = [(0, 0), (0, -sides[0].shape[1] % size), (0, 0), (0, 0)]
    new = [Sliced.of(jnp.pad(side, pad)) for side in sides]

    def append_block(index: jax.Array, state: CacheState) -> CacheState:
        start = index * size
        some = (x.at((0, start, 0, 0), (x.bits.shape[0], size, *x.bits.shape[2:])) for x in new)
        number = (count - start).clip(0, size)
        return _append(state, tuple(some), number, layer, implementation)

    # Not beyond the longest row: every block, even an empty one, takes its time.
    blocks = (count.max() + (size - 1)) // size
    return lax.fori_loop(jnp.zeros_like(blocks), blocks, append_block, state)


def _append(
    state: CacheState,
    sides: tuple[jax.Array, ...],
    count: jax.Array,
    layer: Index,
    implementation: dispatch.Implementation,
) -> CacheState:
    """`append` of the first `count` [B] of a few tokens."""
    config = state.config
    end, kept = (state.end, state.kept) if layer is None else (state.end[layer], state.kept[layer])
    changed = _changed(state, sides, count, layer)
    sides = tuple(entry.finite(x, config.largest) for x in sides)
    low, new_end = ring.starts(config, end, kept), end + count
    new_low = ring.starts(config, new_end, kept)

    new = Arrival(sides, end, jnp.maximum(end, config.sink_tokens), new_end)
    passage = Passage(kept, low, new_low)
    tiers = take_in(config, state.tiers, new, passage, layer, implementation, state.pages)
    sinks = state.sinks
    if sinks is not None:
        new = dataclasses.replace(new, first=end, stop=jnp.minimum(new_end, config.sink_tokens))
        sinks = store(sinks, config.sink_spec, new, layer, implementation)
    summaries = state.summaries
    if summaries is not None and state.pages is not None:
        keys, last, written = tiers[-1].keys, config.chain[-1], due(config, end, kept, count)
        summaries = completed(summaries, keys, last, state.pages, written, new_low[-1], layer)
    moved = dataclasses.replace(
        state, sinks=sinks, tiers=tiers, changed=changed, summaries=summaries
    )
    return _at(
        moved, layer, new_end, ring.still_kept(config, kept, ring.uppers(config, new_end, new_low))
    )


def beyond(end: jax.Array, count: jax.Array) -> jax.Array:
    """Rows [B] whose positions would leave int32; raises if that can be seen now."""
    past = count > ring.MOST - end
    if is_concrete(past) and bool(np.any(past)):
        raise ValueError(
            f"rows end at {np.asarray(end).tolist()}: {int(np.max(count))} more tokens would pass "
            f"the last position, {ring.MOST - 1}; clear the row, or start a new one"
        )
    return past


def overflows(
    config: KvCacheConfig, end: jax.Array, kept: jax.Array, count: jax.Array
) -> jax.Array | None:
    """Rows [B] that refuse `count` [B] tokens since they would have to evict for them, None where
    none does; raises if some do and that can be seen now."""
    if config.overflow is Overflow.EVICT:
        return None
    begin, after = (ring.starts(config, to, kept)[-1] for to in (end, end + count))
    full = after > begin
    if is_concrete(full) and bool(np.any(full)):
        raise ValueError(
            f"rows {np.flatnonzero(full).tolist()} hold {np.asarray(end - begin)[full].tolist()} "
            f"tokens of {config.room} besides sinks, and overflow='refuse': evict or clear first"
        )
    return full


def fitting(state: CacheState, lengths: ArrayLike | None, size: int, layer: Index) -> Any:
    """`lengths` of `size` new tokens, 0 in rows that refuse theirs since they are full."""
    if state.config.overflow is Overflow.EVICT:
        return lengths
    layer, exists = as_layer(layer, state.num_layers)
    count = in_range(as_counts("lengths", lengths, state.batch_size, size), size, exists)
    end, kept = (state.end, state.kept) if layer is None else (state.end[layer], state.kept[layer])
    full = overflows(state.config, end, kept, count)
    return count if full is None else jnp.where(full, 0, count)


def _changed(
    state: CacheState, sides: tuple[jax.Array, ...], count: jax.Array, layer: Index
) -> jax.Array:
    """`state.changed` with the bits of the first `count` [B] of new tokens."""
    found = [entry.changes(side, state.config.largest, count) for side in sides]
    bits = functools.reduce(jnp.bitwise_or, found)
    old = state.changed
    return old | bits if layer is None else old.at[layer].set(old[layer] | bits)


def _at(state: CacheState, layer: Index, end: jax.Array, kept: jax.Array) -> CacheState:
    """The state with the positions of one layer (or of a state without layers) replaced."""
    lost = kept - state.config.sink_tokens
    if layer is not None:
        end, lost = state.end.at[layer].set(end), state.lost.at[layer].set(lost)
    return dataclasses.replace(state, end=end, lost=lost)


def migrate(state: CacheState) -> CacheState:
    """Moves what is due to the next tier. Total, and a no-op after any other verb: boundaries
    follow from positions, and `append` moves the tokens that a boundary has passed, so nothing is
    ever left due."""
    return state
