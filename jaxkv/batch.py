"""Rows of one batch and another: taking some, joining batches, and putting a row into a running one
(continuous batching)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxkv.checks import check_rows, is_concrete
from jaxkv.drop import emptied
from jaxkv.state import CacheState, check_rows_apart
from jaxkv.status import Status


def concatenate(states: Sequence[CacheState]) -> CacheState:
    """The state of all rows of `states`, in order.

    Raises:
      ValueError: no states, or states that differ in config or number of layers.
    """
    if not states:
        raise ValueError("concatenate got no states: pass at least one")
    for index, state in enumerate(states):
        _check_alike(f"states[{index}]", state, "states[0]", states[0])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=_row_axis(states[0])), *states)


def replace_rows(state: CacheState, rows: ArrayLike, new: CacheState) -> CacheState:
    """`state` with row rows[i] replaced by row i of `new`: a request that ended makes way for a
    fresh or a loaded one.

    One program serves all rows: `rows` may be traced. Donate `state`, and only the rows' own bytes
    are written.

    Args:
      rows: an int, where `new` has one row, or [B'] ints, each at most once.
      new: a state of B' rows, with the same config and layers.

    Raises:
      ValueError: rows of the wrong number or dtype; states that differ; where concrete, rows that
        repeat or that `state` does not have. Inside jit a row that `state` does not have is left
        out.
    """
    _check_alike("new", new, "state", state)
    given = jnp.atleast_1d(rows) if isinstance(rows, jax.Array) else np.atleast_1d(rows)
    if given.shape != (new.batch_size,) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"rows has shape {given.shape}, dtype {given.dtype}: must be ints, one for each of "
            f"the {new.batch_size} new rows"
        )
    check_rows(given, state.batch_size)
    if is_concrete(given) and len(np.unique(np.asarray(given))) < len(given):
        raise ValueError(
            f"rows={np.asarray(given).tolist()}: each row can be replaced once; leave out repeats"
        )
    known = jnp.asarray((given >= 0) & (given < state.batch_size))
    target, axis = jnp.where(known, given, 0).astype(jnp.int32), _row_axis(state)

    def put(index: jax.Array, state: CacheState) -> CacheState:
        def into(old: jax.Array, rows: jax.Array) -> jax.Array:
            row = lax.dynamic_slice_in_dim(rows, index, 1, axis)
            kept = lax.dynamic_slice_in_dim(old, target[index], 1, axis)
            row = jnp.where(known[index], row, kept)
            return lax.dynamic_update_slice_in_dim(old, row, target[index], axis)

        return jax.tree.map(into, state, new)

    found: CacheState = lax.fori_loop(0, new.batch_size, put, state)
    return found


def take_rows(state: CacheState, rows: ArrayLike) -> CacheState:
    """The state whose row i is row `rows[i]` of this one: fork, beam reorder, batch filter.

    Args:
      rows: [B'] ints; repeats are allowed. Inside jit, a row that does not exist gives an empty
        one, with `Status.OUT_OF_RANGE`.

    Raises:
      ValueError: not a vector of ints, or (where concrete) a row that does not exist.
    """
    check_rows_apart(state, "take_rows")
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.ndim != 1 or given.shape[0] == 0 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"rows has shape {given.shape} and dtype {given.dtype}: must be a vector of row numbers"
        )
    check_rows(given, state.batch_size)
    index, axis = jnp.asarray(given), _row_axis(state)
    taken = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=axis, mode="clip"), state)
    missing = (index < 0) | (index >= state.batch_size)
    return emptied(taken, missing, Status.OUT_OF_RANGE)


def _row_axis(state: CacheState) -> int:
    return state.end.ndim - 1


def _check_alike(name: str, state: CacheState, other_name: str, other: CacheState) -> None:
    check_rows_apart(state, name)
    if state.config != other.config:
        raise ValueError(
            f"{name} and {other_name} have different configs, {state.config} and {other.config}: "
            "make both with the same"
        )
    if state.num_layers != other.num_layers:
        raise ValueError(
            f"{name} has num_layers={state.num_layers}, {other_name} {other.num_layers}: make "
            "both with the same"
        )
