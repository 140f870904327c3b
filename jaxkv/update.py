"""The writers: append, prefill, migrate, evict, rewind, clear, take_rows. Each gives a new state;
nothing else changes one.

An append writes the new tokens to the first tier, then hands from tier to tier what is due there:
the positions between a boundary's old and new place, quantized where they arrive. Donate the state
(`jax.jit(step, donate_argnums=0)`) and all of it happens in place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkv import ring
from jaxkv.attend import finish, over_segments, raw_segment, scoring_of
from jaxkv.checks import (
    as_counts,
    check_layer,
    check_new_tokens,
    check_query,
    in_range,
    is_concrete,
)
from jaxkv.config import KvCacheConfig
from jaxkv.kernels import dispatch
from jaxkv.migration import Arrival, Passage, store, take_in
from jaxkv.state import CacheState, Status, segments
from jaxkv.tiers.tokens import Index


def append(
    state: CacheState,
    keys: jax.Array,
    values: jax.Array,
    lengths: ArrayLike | None = None,
    *,
    layer: Index = None,
    implementation: dispatch.Implementation = None,
) -> CacheState:
    """Appends tokens, migrates what leaves a tier and evicts what no longer fits.

    Appending T tokens gives the same bits as T appends of one.

    Args:
      keys, values: [B, T, K, H], any float dtype; rounded to the tail's precision.
      lengths: [B] ints in 0 .. T: how many of the T tokens are valid in each row (the first ones).
        None: all. Inside jit, a row whose length is none of these stays as it was and gets
        `Status.OUT_OF_RANGE`.
      layer: which layer, an int or a traced scalar; required where the state has layers.
      implementation: "xla" does without the GPU kernel that quantizes and stores; else it does what
        it can.

    Raises:
      ValueError: wrong shapes or dtypes, lengths out of range (where concrete), a missing or
        surplus layer.
    """
    config = state.config
    check_layer(layer, state.num_layers)
    keys, values = check_new_tokens(
        keys, values, state.batch_size, config.num_kv_heads, config.head_dim
    )
    given = as_counts("lengths", lengths, state.batch_size, keys.shape[1])
    count = in_range(given, keys.shape[1])
    end, kept = (state.end, state.kept) if layer is None else (state.end[layer], state.kept[layer])
    low, new_end = ring.starts(config, end, kept), end + count
    new_low = ring.starts(config, new_end, kept)

    new = Arrival(keys, values, end, jnp.maximum(end, config.sink_tokens), new_end)
    tiers = take_in(config, state.tiers, new, Passage(kept, low, new_low), layer, implementation)
    sinks = state.sinks
    if sinks is not None:
        new = dataclasses.replace(new, first=end, stop=jnp.minimum(new_end, config.sink_tokens))
        sinks = store(sinks, config.sink_spec, new, layer, implementation)
    status = (
        state.status
        if lengths is None
        else _flag(state, given != count, Status.OUT_OF_RANGE, layer)
    )
    moved = dataclasses.replace(state, sinks=sinks, tiers=tiers, status=status)
    return _at(
        moved, layer, new_end, ring.still_kept(config, kept, ring.uppers(config, new_end, new_low))
    )


def prefill(
    state: CacheState,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    layer: Index = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation = None,
    **options: Any,
) -> tuple[CacheState, Any]:
    """Attention of a prompt over its own raw keys and values and all that the cache held, then
    `append`.

    Args:
      query: [B, T, N, H]; keys, values: [B, T, K, H]; lengths: [B], valid tokens of each row.
      **options: as for `attend`.

    Returns:
      The new state, and what `attend` returns: causal, exact on the prompt, zeros for queries
      beyond `lengths`.
    """
    config = state.config
    check_layer(layer, state.num_layers)
    query = check_query(query, state.batch_size, config.num_kv_heads, config.head_dim)
    keys, values = check_new_tokens(
        keys, values, state.batch_size, config.num_kv_heads, config.head_dim, query.shape[1]
    )
    scoring = scoring_of(config, query, scale, options)
    given = as_counts("lengths", lengths, state.batch_size, query.shape[1])
    count = in_range(given, query.shape[1])
    end = state.end if layer is None else state.end[layer]
    index = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    position = jnp.where(index < count[:, None], end[:, None] + index, -1)
    held = over_segments(
        segments(state, layer), query, position, scoring, config.sink_tokens, layer, implementation
    )
    new = over_segments(
        [raw_segment(keys, values, count, end)],
        query,
        position,
        scoring,
        config.sink_tokens,
        None,
        implementation,
    )
    out = finish([held, new], scoring, query, return_lse)
    return append(
        state,
        keys,
        values,
        None if lengths is None else given,
        layer=layer,
        implementation=implementation,
    ), out


def _at(state: CacheState, layer: Index, end: jax.Array, kept: jax.Array) -> CacheState:
    """The state with the positions of one layer (or of a state without layers) replaced."""
    if layer is not None:
        end, kept = state.end.at[layer].set(end), state.kept.at[layer].set(kept)
    return dataclasses.replace(state, end=end, kept=kept)


def migrate(state: CacheState) -> CacheState:
    """Moves what is due to the next tier. Total, and a no-op after any other verb: boundaries
    follow from positions, and `append` moves the tokens that a boundary has passed, so nothing is
    ever left due."""
    return state


def evict(state: CacheState, count: ArrayLike) -> CacheState:
    """Drops the `count` (int or [B]) oldest tokens of every row, in all layers. Sinks stay.

    Raises:
      ValueError: more than is held, or less than 0. Inside jit such a row stays as it was and gets
        `Status.EVICT_TOO_MANY` or `Status.OUT_OF_RANGE`.
    """
    given = as_counts("count", count, state.batch_size, None)
    begin, upper = state.begin, ring.chain_end(state.config, state.end)
    refused = _refused("count", given, upper - begin, state)
    begin = jnp.where(refused, begin, begin + given)
    kept = state.kept.at[..., -1].set(jnp.where(refused | (given == 0), state.kept[..., -1], begin))
    return dataclasses.replace(
        state, kept=kept, status=_flag_count(state, given, refused, Status.EVICT_TOO_MANY)
    )


def rewind(state: CacheState, count: ArrayLike) -> CacheState:
    """Drops the `count` (int or [B]) newest tokens of every row, in all layers (speculative
    decoding). Stored codes stay as they are.

    Up to `config.rewind_length` below the highest position reached, the result is as if the tokens
    had never been appended: the tail is full again and tokens that they evicted are back. Beyond,
    what is held stays held: the tail is shorter by what its ring has lost.

    Raises:
      ValueError: more than is held, or less than 0. Inside jit such a row stays as it was and gets
        `Status.REWIND_TOO_MANY` or `Status.OUT_OF_RANGE`. A rewind that would leave a part of a
        group of `axis="channel"` codes without its float tokens is refused alike, with
        `Status.REWIND_CUTS_GROUP`.
    """
    config, given = state.config, as_counts("count", count, state.batch_size, None)
    begin, upper = state.begin, ring.chain_end(config, state.end)
    most = jnp.where(begin > config.sink_tokens, upper - begin, state.end)
    out_of_range = _refused("count", given, most, state)
    end = state.end - given
    kept = _reachable(config, end, state.kept)
    cuts = _cuts_group(config, end, kept) & (given > 0)
    refused = out_of_range | cuts
    if is_concrete(refused) and bool(np.any(cuts & ~out_of_range)):
        raise ValueError(
            f"count={np.asarray(given).tolist()}: the rewind would cut a frozen group of channel "
            "codes; set rewind_length "
            f"(now {config.rewind_length}) to the deepest rewind you need"
        )
    status = _flag_count(state, given, out_of_range, Status.REWIND_TOO_MANY)
    status |= _flag(state, cuts & ~out_of_range, Status.REWIND_CUTS_GROUP)
    return dataclasses.replace(
        state,
        end=jnp.where(refused, state.end, end),
        kept=jnp.where(refused[..., None], state.kept, kept),
        status=status,
    )


def _reachable(config: KvCacheConfig, end: jax.Array, kept: jax.Array) -> jax.Array:
    """`kept` for an earlier end: a ring that holds only later positions holds nothing."""
    upper, found = ring.chain_end(config, end), []
    for index in range(len(config.chain)):
        found.append(jnp.minimum(kept[..., index], upper))
        upper = ring.starts(
            config,
            end,
            jnp.stack([*found, *(kept[..., i] for i in range(index + 1, kept.shape[-1]))], -1),
        )[index]
    return jnp.stack(found, axis=-1)


def _cuts_group(config: KvCacheConfig, end: jax.Array, kept: jax.Array) -> jax.Array:
    """Whether a boundary before a tier of token groups lies inside a group whose first tokens no
    ring holds."""
    cut = jnp.zeros_like(end, bool)
    *lows, begin = ring.starts(config, end, kept)
    for index, low in enumerate(lows):
        if config.chain[index + 1].group > 1:
            first = ring.round_down(config, low)
            cut |= (low > first) & (kept[..., index] > first) & (low > begin)
    return cut


def _refused(name: str, count: jax.Array, most: jax.Array, state: CacheState) -> jax.Array:
    """Where `count` is none of 0 .. `most`; raises if that can be seen now."""
    refused = (count > most) | (count < 0)
    if is_concrete(refused) and bool(np.any(refused)):
        raise ValueError(
            f"{name}={np.asarray(count).tolist()}: rows hold {np.asarray(most).tolist()} such "
            "tokens; ask for fewer"
        )
    return refused


def _flag(state: CacheState, where: jax.Array, status: Status, layer: Index = None) -> jax.Array:
    bits = jnp.where(where, jnp.int32(status), jnp.int32(0))
    return (
        state.status | bits
        if layer is None
        else state.status.at[layer].set(state.status[layer] | bits)
    )


def _flag_count(
    state: CacheState, count: jax.Array, refused: jax.Array, too_many: Status
) -> jax.Array:
    return _flag(state, refused & (count >= 0), too_many) | _flag(
        state, refused & (count < 0), Status.OUT_OF_RANGE
    )


def clear(state: CacheState) -> CacheState:
    """Forgets all tokens, sinks and status; positions start at 0 again. Arrays are kept, so this
    costs nothing."""
    kept = jnp.full_like(state.kept, state.config.sink_tokens)
    return dataclasses.replace(
        state, end=jnp.zeros_like(state.end), kept=kept, status=jnp.zeros_like(state.status)
    )


def take_rows(state: CacheState, rows: ArrayLike) -> CacheState:
    """The state whose row i is row `rows[i]` of this one: fork, beam reorder, batch filter.

    Args:
      rows: [B'] ints; repeats are allowed.

    Raises:
      ValueError: not a vector of ints, or (where concrete) a row that does not exist.
    """
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.ndim != 1 or given.shape[0] == 0 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"rows has shape {given.shape} and dtype {given.dtype}: must be a vector of row numbers"
        )
    if (
        is_concrete(given)
        and ((np.asarray(given) < 0) | (np.asarray(given) >= state.batch_size)).any()
    ):
        raise ValueError(
            f"rows={np.asarray(given).tolist()}: the state has rows 0 .. {state.batch_size - 1}"
        )
    axis = state.end.ndim - 1
    return jax.tree.map(lambda leaf: jnp.take(leaf, jnp.asarray(given), axis=axis), state)
