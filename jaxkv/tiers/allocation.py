"""How rows of a pool come by pages and part with them. Each function acts on all rows at once, and
costs as much whatever the number of pages.

A page is free while none refers to it; the free ones form a stack, of which rows take from the top.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.tiers.pages import Pages

NOWHERE = np.iinfo(np.int32).max
"""An index that no array has: what is scattered there is dropped."""


def empty(num_pages: int, rows: int, most_tokens: int, size: int, offset: int) -> Pages:
    """A pool that is all free, for rows that hold up to `most_tokens` each: one page more than
    those fill, since they may start anywhere in a page."""
    table, first = (jnp.full((rows, -(-most_tokens // size) + 1), -1, jnp.int32) for _ in range(2))
    every = jnp.arange(num_pages, dtype=jnp.int32)
    return Pages(
        table, first, jnp.zeros_like(every), every[::-1], jnp.int32(num_pages), size, offset
    )


def take(
    pages: Pages, low: jax.Array, high: jax.Array
) -> tuple[Pages, jax.Array, jax.Array, jax.Array]:
    """Pages for all positions [low, high) [R] of each row, all its own.

    What it has of them it keeps; the page of `low`, where others refer to it too, is replaced by a
    page of its own, to which the caller copies it. New pages take the columns of the oldest, which
    they replace. Rows that need the fewest come first; those for which the free pages do not
    suffice stay as they were.

    Returns:
      The pages; which rows have what they asked for, [R] bool; and for each row the page to be
      copied and where to, [R] int32, -1 where nothing is.
    """
    width = pages.table.shape[1]
    count = jnp.where(low < high, (high - 1 - pages.offset) // pages.size - _first(pages, low), -1)
    # A decoding step crosses into one new page at most: looking at two columns instead of all 512
    # of 32 rows takes a third of the time.
    sizes = sorted({min(2, width), width})
    found: tuple[Pages, jax.Array, jax.Array, jax.Array] = lax.switch(
        (count.max() >= sizes[0]).astype(jnp.int32) * (len(sizes) - 1),
        [functools.partial(_take, columns=size) for size in sizes],
        pages,
        low,
        high,
    )
    return found


def _first(pages: Pages, low: jax.Array) -> jax.Array:
    return (low - pages.offset) // pages.size


def _take(
    pages: Pages, low: jax.Array, high: jax.Array, *, columns: int
) -> tuple[Pages, jax.Array, jax.Array, jax.Array]:
    """`take` where no row asks for more than so many pages."""
    number = _first(pages, low)[:, None] + jnp.arange(columns, dtype=jnp.int32)
    start, column = pages.offset + number * pages.size, number % pages.table.shape[1]
    held, first = (jnp.take_along_axis(x, column, 1) for x in (pages.table, pages.first))
    wanted = (start < high[:, None]) & (low < high)[:, None]
    new = wanted & ((held < 0) | (pages.refs[held] > 1))
    granted, rank = _ranked(new, pages.available)
    new, wanted = new & granted[:, None], wanted & granted[:, None]
    page = pages.free[jnp.where(new, pages.available - 1 - rank, 0)]

    rows = jnp.arange(len(number), dtype=jnp.int32)[:, None]
    taken = dataclasses.replace(
        pages,
        table=pages.table.at[rows, jnp.where(new, column, NOWHERE)].set(page, mode="drop"),
        first=pages.first.at[rows, jnp.where(wanted, column, NOWHERE)].set(start, mode="drop"),
        refs=pages.refs.at[jnp.where(new, page, NOWHERE)].set(1, mode="drop"),
        available=pages.available - new.sum(dtype=jnp.int32),
    )
    left, copied = new & (held >= 0), new & (held >= 0) & (first == start)
    source, target = (jnp.where(copied, x, -1).max(1) for x in (held, page))
    return _if_any(left, taken, jnp.where(left, held, -1)), granted, source, target


def _ranked(new: jax.Array, available: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows get all of the pages that they need (`new` [R, C]), those that need the fewest
    first, and the place of each of these pages among all that are taken."""
    need = new.sum(1, dtype=jnp.int32)
    order = jnp.argsort(need)
    ends = jnp.zeros_like(need).at[order].set(jnp.cumsum(need[order], dtype=jnp.int32))
    within = jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
    return ends <= available, (ends - need)[:, None] + within


def trim(pages: Pages, low: jax.Array, high: jax.Array) -> Pages:
    """Each row gives back its pages that hold none of its positions [low, high) [R]."""
    first = pages.first
    return keep(pages, (first + pages.size > low[:, None]) & (first < high[:, None]))


def keep(pages: Pages, kept: jax.Array) -> Pages:
    """Each row gives back its pages in all columns but `kept` [R, P]."""
    gone = (pages.first >= 0) & ~kept
    table, first = (jnp.where(gone, -1, x) for x in (pages.table, pages.first))
    rest = dataclasses.replace(pages, table=table, first=first)
    return _if_any(gone, rest, jnp.where(gone, pages.table, -1))


def share(pages: Pages, source: jax.Array, target: jax.Array, high: jax.Array) -> Pages:
    """Rows `target` [n] give back their pages and refer to those of rows `source` [n] that hold any
    position below `high` [R]; a target beyond the rows is left out. All sources are read before any
    target is written."""
    in_use = pages.first[source] < high[source][:, None]
    in_use &= (target < len(pages.table))[:, None]
    table = jnp.where(in_use, pages.table[source], -1)
    first = jnp.where(in_use, pages.first[source], -1)
    return put(pages, target, table, first)


def put(pages: Pages, rows: jax.Array, table: jax.Array, first: jax.Array) -> Pages:
    """Rows [n], each at most once, refer to the pages `table` [n, P] instead of those that they
    had; a row that does not exist refers to nothing."""
    old = pages.table.at[rows].get(mode="fill", fill_value=-1)
    pages = retain(pages, jnp.where((rows < len(pages.table))[:, None], table, -1))
    pages = dataclasses.replace(
        pages,
        table=pages.table.at[rows].set(table, mode="drop"),
        first=pages.first.at[rows].set(first, mode="drop"),
    )
    return drop(pages, old)


def retain(pages: Pages, ids: jax.Array) -> Pages:
    """One reference more to each of the pages `ids` (any shape, -1: none), which are in use."""
    return dataclasses.replace(
        pages, refs=pages.refs.at[jnp.where(ids >= 0, ids, NOWHERE)].add(1, mode="drop")
    )


def drop(pages: Pages, ids: jax.Array) -> Pages:
    """One reference less to each of the pages `ids` (any shape, -1: none); those with none left are
    free."""
    ids = ids.reshape(-1)
    there = ids >= 0
    refs = pages.refs.at[jnp.where(there, ids, NOWHERE)].add(-1, mode="drop")
    gone = there & (refs[ids] == 0)
    # A page that several let go of at once is free once: the last of them says so.
    index = jnp.arange(len(ids), dtype=jnp.int32)
    last = jnp.full_like(refs, -1).at[jnp.where(gone, ids, NOWHERE)].max(index, mode="drop")
    gone &= last[ids] == index
    rank = pages.available + jnp.cumsum(gone, dtype=jnp.int32) - 1
    return dataclasses.replace(
        pages,
        refs=refs,
        free=pages.free.at[jnp.where(gone, rank, NOWHERE)].set(ids, mode="drop"),
        available=pages.available + gone.sum(dtype=jnp.int32),
    )


def _if_any(where: jax.Array, pages: Pages, ids: jax.Array) -> Pages:
    """`drop` of `ids`, skipped where there are none: most steps give nothing back."""
    some = where.any().astype(jnp.int32)
    found: Pages = lax.switch(some, [lambda p, _: p, drop], pages, ids)
    return found
