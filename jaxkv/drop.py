"""What drops tokens without moving any: evict, rewind, clear. They change positions only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkv import ring
from jaxkv.checks import as_counts, check_rows, is_concrete
from jaxkv.config import KvCacheConfig
from jaxkv.state import CacheState
from jaxkv.status import Status, flagged
from jaxkv.tiers import allocation


def evict(state: CacheState, count: ArrayLike) -> CacheState:
    """Drops the `count` (int or [B]) oldest tokens of every row, in all layers. Sinks stay, and so
    do layers of a stack that hold nothing at all.

    Raises:
      ValueError: more than is held, or less than 0. Inside jit such a row stays as it was and gets
        `Status.EVICT_TOO_MANY` or `Status.OUT_OF_RANGE`.
    """
    given = _of_layers(state, as_counts("count", count, state.batch_size, None))
    begin, upper = state.begin, ring.chain_end(state.config, state.end)
    refused = _refused("count", given, upper - begin, state)
    begin = jnp.where(refused, begin, begin + given)
    lost = begin - state.config.sink_tokens
    lost = state.lost.at[..., -1].set(jnp.where(refused | (given == 0), state.lost[..., -1], lost))
    status = _flag_count(state, given, refused, Status.EVICT_TOO_MANY)
    return _trimmed(dataclasses.replace(state, lost=lost, refused=status))


def rewind(state: CacheState, count: ArrayLike) -> CacheState:
    """Drops the `count` (int or [B]) newest tokens of every row, in all layers that hold any
    (speculative decoding). Stored codes stay as they are.

    Up to `config.rewind_length` below the highest position reached, the result is as if the tokens
    had never been appended: the tail is full again and tokens that they evicted are back. Beyond,
    what is held stays held: the tail is shorter by what its ring has lost.

    Raises:
      ValueError: more than is held, or less than 0. Inside jit such a row stays as it was and gets
        `Status.REWIND_TOO_MANY` or `Status.OUT_OF_RANGE`. A rewind that would leave a part of a
        group of `axis="channel"` codes without its float tokens is refused alike, with
        `Status.REWIND_CUTS_GROUP`; and one after which the store's newest token would be one that
        `paged.compress` has dropped, with `Status.REWIND_INTO_GAP`.
    """
    config, given = state.config, as_counts("count", count, state.batch_size, None)
    given = _of_layers(state, given)
    begin, upper = state.begin, ring.chain_end(config, state.end)
    most = jnp.where(begin > config.sink_tokens, upper - begin, state.end)
    out_of_range = _refused("count", given, most, state)
    end = state.end - given
    kept = _reachable(config, end, state.kept)
    cuts = _cuts_group(config, end, kept) & (given > 0)
    gap = _into_gap(state, end, kept) & (given > 0)
    refused = out_of_range | cuts | gap
    if is_concrete(refused) and bool(np.any((cuts | gap) & ~out_of_range)):
        what = "cut a frozen group of channel codes" if np.any(cuts) else "end in compressed tokens"
        raise ValueError(
            f"count={np.asarray(given).tolist()}: the rewind would {what}; set rewind_length "
            f"(now {config.rewind_length}) to the deepest rewind you need"
        )
    status = _flag_count(state, given, out_of_range, Status.REWIND_TOO_MANY)
    status = flagged(status, cuts & ~out_of_range, Status.REWIND_CUTS_GROUP)
    status = flagged(status, gap & ~out_of_range, Status.REWIND_INTO_GAP)
    end = jnp.where(refused, state.end, end)
    lost = jnp.where(refused[..., None], state.lost, kept - config.sink_tokens)
    return _trimmed(dataclasses.replace(state, end=end, lost=lost, refused=status))


def _trimmed(state: CacheState) -> CacheState:
    """In a pool, rows give back the pages that hold none of their tokens any more."""
    if state.pages is None:
        return state
    end, kept = (x if state.num_layers is None else x[0] for x in (state.end, state.kept))
    high = ring.uppers(state.config, end, ring.starts(state.config, end, kept))[-1]
    return dataclasses.replace(state, pages=allocation.trim(state.pages, kept[:, -1], high))


def _of_layers(state: CacheState, count: jax.Array) -> jax.Array:
    """How many tokens each layer drops: none where it holds nothing and others do, as layers that
    look at another one's cache."""
    if state.num_layers is None:
        return count
    return jnp.where((state.end == 0) & (state.end > 0).any(0), 0, count)


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


def _flag_count(
    state: CacheState, count: jax.Array, refused: jax.Array, too_many: Status
) -> jax.Array:
    status = flagged(state.refused, refused & (count >= 0), too_many)
    return flagged(status, refused & (count < 0), Status.OUT_OF_RANGE)


def _into_gap(state: CacheState, end: jax.Array, kept: jax.Array) -> jax.Array:
    """Whether the newest token in the last tier of rows that end so was compressed away."""
    if state.pages is None:
        return jnp.zeros_like(end, bool)
    lows = ring.starts(state.config, end, kept)
    low, high = lows[-1], ring.uppers(state.config, end, lows)[-1]
    return (low < high) & ~state.pages.holds(high - 1)


def clear(state: CacheState, rows: ArrayLike | None = None) -> CacheState:
    """Forgets all tokens, sinks and status; positions start at 0 again. Arrays are kept, so this
    costs nothing.

    Args:
      rows: which rows, in all layers: an int, [n] ints or a mask [B] of bools; None: all. Inside
        jit a row that the state does not have is left out.

    Raises:
      ValueError: rows of the wrong shape or dtype or, where concrete, that do not exist.
    """
    return emptied(state, chosen(state, rows), Status.OK)


def chosen(state: CacheState, rows: ArrayLike | None) -> jax.Array:
    """Which rows are meant, [B] bool; `rows` as for `clear`."""
    if rows is None:
        return jnp.ones(state.batch_size, bool)
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.dtype == np.bool_ and given.shape == (state.batch_size,):
        return jnp.asarray(given)
    if given.ndim > 1 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"rows has shape {given.shape} and dtype {given.dtype}: must be an int, a vector of "
            f"row numbers, or a mask [{state.batch_size}] of bools"
        )
    check_rows(given, state.batch_size)
    index = jnp.asarray(given).reshape(1, -1)
    every = jnp.arange(state.batch_size, dtype=index.dtype).reshape(-1, 1)
    return (every == index).any(-1)


def emptied(state: CacheState, where: jax.Array, status: Status) -> CacheState:
    """The state with nothing left in rows `where` [B] but a status."""
    where = jnp.broadcast_to(where, state.end.shape)
    left = dataclasses.replace(
        state,
        end=jnp.where(where, 0, state.end),
        lost=jnp.where(where[..., None], 0, state.lost),
        refused=jnp.where(where, jnp.int32(status), state.refused),
        changed=jnp.where(where[..., None], 0, state.changed),
    )
    return _trimmed(left)
