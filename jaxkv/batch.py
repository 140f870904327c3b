"""Rows of one batch and another: taking some, joining batches, and putting a row into a running one
(continuous batching)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkv.checks import is_concrete
from jaxkv.state import CacheState


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
    if is_concrete(given):
        _check_rows(np.asarray(given), state.batch_size)
    target = jnp.where(given < 0, state.batch_size, given)
    lead = (slice(None),) * _row_axis(state)
    return jax.tree.map(lambda old, row: old.at[(*lead, target)].set(row, mode="drop"), state, new)


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
    return jax.tree.map(
        lambda leaf: jnp.take(leaf, jnp.asarray(given), axis=_row_axis(state)), state
    )


def _row_axis(state: CacheState) -> int:
    return state.end.ndim - 1


def _check_alike(name: str, state: CacheState, other_name: str, other: CacheState) -> None:
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


def _check_rows(rows: np.ndarray, batch_size: int) -> None:
    if (rows < 0).any() or (rows >= batch_size).any():
        raise ValueError(f"rows={rows.tolist()}: the state has rows 0 .. {batch_size - 1}")
    if len(np.unique(rows)) < len(rows):
        raise ValueError(f"rows={rows.tolist()}: each row can be replaced once; leave out repeats")
