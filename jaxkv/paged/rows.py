"""What a row of a pool has besides its pages: positions, tail, warm tier, sinks, basis, status."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkv import ring
from jaxkv.checks import check_rows, is_concrete
from jaxkv.state import CacheState
from jaxkv.tiers import allocation
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.segment import Tier
from jaxkv.tiers.tokens import STORED, Tokens
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a pool at one moment: all that is its own, and which pages it refers to. Enough
    to make a row that goes on from there, as long as someone keeps the pages."""

    own: Any  # arrays without the axis of rows, see `_own`
    table: jax.Array  # [P] int32
    first: jax.Array  # [P] int32


def pool_of(state: CacheState) -> Pages:
    if state.pages is None:
        raise ValueError("the state has no pages: make a pool with jaxkv.paged.init")
    return state.pages


def positions(state: CacheState) -> tuple[jax.Array, jax.Array]:
    """`end` [B] and `kept` [B, n], which between two steps are those of any layer."""
    return (state.end, state.kept) if state.end.ndim == 1 else (state.end[0], state.kept[0])


def last_positions(state: CacheState) -> tuple[jax.Array, jax.Array]:
    """The positions [low, high) [B] that the last tier holds."""
    end, kept = positions(state)
    lows = ring.starts(state.config, end, kept)
    return lows[-1], ring.uppers(state.config, end, lows)[-1]


def row_numbers(state: CacheState, rows: ArrayLike) -> jax.Array:
    """Rows [n] int32 from an int or ints, each at most once; inside jit, one that does not exist or
    repeats lies beyond all rows."""
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.ndim > 1 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"rows has shape {given.shape}, dtype {given.dtype}: must be ints")
    check_rows(given, state.batch_size)
    index = jnp.atleast_1d(jnp.asarray(given, jnp.int32))
    return jnp.where((index < 0) | (index >= state.batch_size), allocation.NOWHERE, index)


def check_once(rows: ArrayLike) -> None:
    if is_concrete(rows) and len(np.unique(np.asarray(rows))) < np.size(np.asarray(rows)):
        raise ValueError(f"rows={np.asarray(rows).tolist()}: each row at most once")


def moved(state: CacheState, source: jax.Array, target: jax.Array) -> CacheState:
    """The state with what rows `target` [n] have of their own replaced by that of `source` [n]."""
    lead = (slice(None),) * (state.end.ndim - 1)
    own = jax.tree.map(
        lambda x: x.at[(*lead, target)].set(x[(*lead, source)], mode="drop"), _own(state)
    )
    return _with_own(state, own)


def snapshot(state: CacheState, row: ArrayLike) -> Row:
    """One row (an int, traced or not) as it is now. Its pages are not copied: `retain` them for as
    long as the snapshot may be used."""
    axis, pages = state.end.ndim - 1, pool_of(state)
    at = jnp.asarray(row, jnp.int32)
    own = jax.tree.map(lambda x: jnp.take(x, at, axis=axis), _own(state))
    in_use = pages.first[at] < last_positions(state)[1][at]
    table, first = (jnp.where(in_use, x[at], -1) for x in (pages.table, pages.first))
    return Row(own, table, first)


def adopt(state: CacheState, row: ArrayLike, held: Row) -> CacheState:
    """The state whose row `row` goes on from a snapshot; it refers to the same pages. What the row
    held is gone."""
    target = row_numbers(state, row)
    lead = (slice(None),) * (state.end.ndim - 1)
    own = jax.tree.map(
        lambda x, new: x.at[(*lead, target)].set(jnp.expand_dims(new, len(lead)), mode="drop"),
        _own(state),
        held.own,
    )
    pages = allocation.put(pool_of(state), target, held.table[None], held.first[None])
    return dataclasses.replace(_with_own(state, own), pages=pages)


def by_page(state: CacheState) -> Any:
    """All arrays that have an axis of pages, which is where `_own` has that of rows."""

    def stored(held: Tokens) -> dict[str, jax.Array]:
        return {name: x for name in STORED if (x := getattr(held, name)) is not None}

    return tuple(map(stored, state.tiers[-1].sides)), state.summaries


def with_pages(state: CacheState, arrays: Any) -> CacheState:
    """The state with the arrays of `by_page` replaced."""
    sides, summaries = arrays
    pairs = zip(state.tiers[-1].sides, sides, strict=True)
    last = Tier(*(dataclasses.replace(held, **new) for held, new in pairs))
    return dataclasses.replace(state, tiers=(*state.tiers[:-1], last), summaries=summaries)


def _own(state: CacheState) -> dict[str, Any]:
    """All arrays that have an axis of rows."""
    last = state.tiers[-1]
    return {
        "sinks": state.sinks,
        "tiers": state.tiers[:-1],
        "basis": [_basis(half) for half in last.sides],
        "end": state.end,
        "lost": state.lost,
        "refused": state.refused,
        "changed": state.changed,
    }


def _basis(held: Tokens) -> dict[str, Any]:
    return {name: x for name, x in vars(held).items() if name not in STORED and x is not None}


def _with_own(state: CacheState, own: dict[str, Any]) -> CacheState:
    last, basis = state.tiers[-1], own["basis"]
    halves = (dataclasses.replace(half, **new) for half, new in zip(last.sides, basis, strict=True))
    return dataclasses.replace(
        state,
        sinks=own["sinks"],
        tiers=(*own["tiers"], Tier(*halves)),
        end=own["end"],
        lost=own["lost"],
        refused=own["refused"],
        changed=own["changed"],
    )
