"""A pool of pages: many sequences in one state, each with as many pages as its tokens fill.

The state is a `CacheState` whose last tier lies in pages instead of rings, so every verb that is
not about whole batches is the cache's own. What is here is about pages: taking, sharing and
returning them. All of it is pure, works on all rows at once and compiles once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxkv import ring
from jaxkv import state as states
from jaxkv.checks import as_counts, as_int, is_concrete
from jaxkv.config import KvCacheConfig
from jaxkv.devices import settled
from jaxkv.drop import evict
from jaxkv.migration import due
from jaxkv.paged.rows import (
    by_page,
    last_positions,
    moved,
    pool_of,
    positions,
    row_numbers,
    with_pages,
)
from jaxkv.state import CacheState
from jaxkv.status import Status, flagged
from jaxkv.tiers import allocation
from jaxkv.tiers.summaries import allocate

PAGE_SIZE = 128
"""Tokens of a page unless told otherwise: see README for what smaller ones cost and save."""


def init(
    config: KvCacheConfig,
    num_pages: int,
    rows: int,
    page_size: int | None = None,
    num_layers: int | None = None,
    *,
    summaries: bool = False,
    key_mean: jax.Array | None = None,
    value_mean: jax.Array | None = None,
    device: Any = None,
) -> CacheState:
    """An empty pool for `rows` sequences of up to `config.max_tokens` tokens each.

    Args:
      num_pages: pages that all rows share, each of `page_size` tokens of the last tier, in all
        layers. The tail, a warm tier and sinks are each row's own.
      page_size: a multiple of the tokens that enter the last tier together (channel groups and, in
        batched migration, `migration_batch`). None: about 128.
      num_layers: as for `jaxkv.init`; one table of pages serves all layers.
      summaries: each page keeps what `attend(..., top_pages=n)` and `scores` ask for, 4 bytes for
        each channel of its keys: 2.8 % more memory in 4 bits.
      key_mean, value_mean, device: as for `jaxkv.init`.

    Raises:
      ValueError: sizes that are no positive ints, or a page that cuts what enters together.
    """
    num_pages, rows = as_int("num_pages", num_pages, 1), as_int("rows", rows, 1)
    num_layers = None if num_layers is None else as_int("num_layers", num_layers, 1)
    last = config.chain[-1]
    unit = max(config.step, last.group)
    if page_size is None:
        page_size = -(-PAGE_SIZE // unit) * unit
    if as_int("page_size", page_size, 1) % unit:
        raise ValueError(
            f"page_size={page_size}: must be a multiple of {unit}, the tokens that enter the last "
            "tier together"
        )
    pages = allocation.empty(num_pages, rows, last.capacity, page_size, last.offset)
    empty = states.allocated(config, rows, num_layers, pages)
    if summaries:
        lead = () if num_layers is None else (num_layers,)
        held = allocate(num_pages + 1, lead, config.num_kv_heads, config.head_dim)
        empty = dataclasses.replace(empty, summaries=held)
    return settled(states.with_means(empty, key_mean, value_mean), device)


def reserve(state: CacheState, lengths: ArrayLike) -> tuple[CacheState, jax.Array]:
    """Takes the pages that the next `lengths` (int or [B]) tokens of each row will fill; once a
    step, before the appends of all layers.

    Most steps of a decoding row need none: its tokens enter the tail, and one page holds many of
    those that leave it. A page that the row shares is copied before it writes there. What the new
    tokens will push out of the row is gone with its pages.

    Returns:
      The state, and [B] bool: the rows that have what they need. The others are as they were, with
      `Status.OUT_OF_PAGES`; give them no tokens.
    """
    pages, config = pool_of(state), state.config
    count = as_counts("lengths", lengths, state.batch_size, None)
    end, kept = positions(state)
    low, high = due(config, end, kept, count.clip(0, ring.MOST - end))
    taken, granted, source, target = allocation.take(pages, low, high)
    arrays = lax.switch(
        (source >= 0).any().astype(jnp.int32),
        [lambda same: same, lambda same: _with_copies(state, same, source, target)],
        by_page(state),
    )
    refused = flagged(state.refused, ~granted, Status.OUT_OF_PAGES)
    refused = flagged(refused, count < 0, Status.OUT_OF_RANGE)
    return dataclasses.replace(with_pages(state, arrays), pages=taken, refused=refused), granted


def _with_copies(state: CacheState, arrays: Any, source: jax.Array, target: jax.Array) -> Any:
    """Arrays by page with pages `source` [B] copied to `target`; -1 is the page that is
    nobody's."""
    nobody = pool_of(state).num_pages
    at, to = (
        (*(slice(None),) * (state.end.ndim - 1), jnp.where(x >= 0, x, nobody))
        for x in (source, target)
    )
    return jax.tree.map(lambda x: x.at[to].set(x[at]), arrays)


def fork(state: CacheState, source: ArrayLike, target: ArrayLike) -> CacheState:
    """Rows `target` become copies of rows `source` (ints or [n] each): pages are shared, the
    tail, sinks and basis copied. What a target held is gone. All sources are read first, so that
    `fork(state, parents, arange(rows))` reorders beams.

    Raises:
      ValueError: no ints, or of different number; where concrete, rows that do not exist or are
        named twice as targets.
    """
    pages = pool_of(state)
    source, target = (row_numbers(state, x) for x in (source, target))
    if source.shape != target.shape:
        raise ValueError(f"{source.shape[0]} sources for {target.shape[0]} targets: give as many")
    shared = allocation.share(pages, source, target, last_positions(state)[1])
    return dataclasses.replace(moved(state, source, target), pages=shared)


def release(state: CacheState, rows: ArrayLike) -> CacheState:
    """Rows (an int or [n] ints) hold nothing any more, and give back their pages: room for the next
    requests. As `clear(state, rows)`, at a cost that does not grow with all rows."""
    pages, rows = pool_of(state), row_numbers(state, rows)
    none = jnp.full((len(rows), pages.table.shape[1]), -1, jnp.int32)
    at = (*(slice(None),) * (state.end.ndim - 1), rows)
    fields = {
        name: getattr(state, name).at[at].set(0, mode="drop")
        for name in ("end", "lost", "refused", "changed")
    }
    return dataclasses.replace(state, **fields, pages=allocation.put(pages, rows, none, none))


def window(state: CacheState, length: ArrayLike) -> CacheState:
    """Gives back the pages before those that hold any of the newest `length` (int or [B]) positions
    of their row: `evict` of whole pages. Sinks stay."""
    pages = pool_of(state)
    count = as_counts("length", length, state.batch_size, None)
    end, kept = positions(state)
    begin = ring.starts(state.config, end, kept)[-1]
    first = jnp.minimum(end - jnp.maximum(count, 0), last_positions(state)[1]) - pages.offset
    whole = pages.offset + first // pages.size * pages.size
    return evict(state, jnp.maximum(whole - begin, 0))


def owned(state: CacheState, row: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The pages of a row, oldest first, and the position at which each starts: [P] int32 each, -1
    after the last. Only those that are full are safe to share: see `positions`."""
    pages = pool_of(state)
    page, first = (jnp.asarray(x)[jnp.asarray(row)] for x in (pages.table, pages.first))
    order = jnp.argsort(jnp.where(first < 0, allocation.NOWHERE, first))
    return page[order], first[order]


def retain(state: CacheState, pages: ArrayLike) -> CacheState:
    """One reference more to each of `pages` (ints, -1: none), for an index outside that may hand
    them to later rows. They must be in use: by a row, or by another reference."""
    held, ids = pool_of(state), _as_pages(pages, state)
    return dataclasses.replace(state, pages=allocation.retain(held, ids))


def drop(state: CacheState, pages: ArrayLike) -> CacheState:
    """Takes back what `retain` did, once for each page named; who has no reference left is free."""
    held, ids = pool_of(state), _as_pages(pages, state)
    return dataclasses.replace(state, pages=allocation.drop(held, ids))


def _as_pages(pages: ArrayLike, state: CacheState) -> jax.Array:
    given = pages if isinstance(pages, jax.Array) else np.asarray(pages)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"pages has dtype {given.dtype}: must be ints, as `owned` gives them")
    most = pool_of(state).num_pages
    if is_concrete(given) and ((np.asarray(given) < -1) | (np.asarray(given) >= most)).any():
        raise ValueError(f"pages={np.asarray(given).tolist()}: the pool has pages 0 .. {most - 1}")
    return jnp.asarray(given, jnp.int32)
