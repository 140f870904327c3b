"""Rows that wait in the host's memory: taken out of a state as they are stored, and put back, bit
for bit.

Not for use inside `jit`: what a row holds is looked at, and the state is donated. Copies run beside
the device's next steps; nothing here waits for one, but for the few bytes of a row's table (and on
CPUs, where the copy is the host's own work).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.batch import replace_rows
from jaxkv.checks import as_int, check_rows
from jaxkv.drop import clear
from jaxkv.paged.pool import release
from jaxkv.paged.rows import Row, adopt, by_page, pool_of, snapshot, with_pages
from jaxkv.state import CacheState


@dataclasses.dataclass(frozen=True)
class Parked:
    """A row on the host: what its pages hold, in the order of its table, and what is its own. A row
    without pages is all stored as one page."""

    stored: Any  # arrays [n, ...], n the next power of two
    row: Row | None = None
    num_pages: int = 0

    @property
    def nbytes(self) -> int:
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves((self.row, self.stored)))


def offload(state: CacheState, row: int) -> tuple[CacheState, Parked]:
    """Moves a row to the host's memory; its place in the state is empty, its pages are free (but
    for those that others share). The state is donated.

    Where a device has `pinned_host` memory, that is where the row goes. A page that the row shares
    is copied, and is its own once the row is back.

    Raises:
      ValueError: no row of the state.
    """
    row, axis = _existing(state, row), state.end.ndim - 1
    if state.pages is None:
        stored = _moved_out(state, np.array([row], np.int32), 1, axis)
        return _clear(state, np.int32(row)), Parked(stored)
    table = np.asarray(state.pages.table[row])
    ids = table[table >= 0]
    size = 1 << max(len(ids) - 1, 0).bit_length()  # few programs for all numbers of pages
    held = _to_host(_snapshot(state, np.int32(row)))
    stored = _moved_out(by_page(state), ids, size, axis)
    return _release(state, np.int32(row)), Parked(stored, held, len(ids))


def prefetch(parked: Parked) -> Parked:
    """Starts the copy back to the device, which a later `restore` then finds there."""
    row, stored = jax.tree.map(_to_device, (parked.row, parked.stored))
    return dataclasses.replace(parked, row=row, stored=stored)


def _to_device(x: Any) -> Any:
    """What is there already stays as it is: an array that was put anywhere compiles steps anew."""
    if isinstance(x, jax.Array):
        is_parked = x.sharding.memory_kind == "pinned_host"
        return jax.device_put(x, x.sharding.with_memory_kind("device")) if is_parked else x
    return jax.device_put(x)


def restore(state: CacheState, row: int, parked: Parked) -> tuple[CacheState, bool]:
    """Puts a parked row in place of row `row`, which should be empty, in other pages than before.
    The state is donated.

    Returns:
      The state, and whether there were pages enough; if not, the row holds nothing.

    Raises:
      ValueError: no row of the state.
    """
    row, parked = _existing(state, row), prefetch(parked)
    if state.pages is None:
        return _put_back(state, np.int32(row), parked.stored), True
    state = _release(state, np.int32(row))
    if int(pool_of(state).available) < parked.num_pages:
        return state, False
    assert parked.row is not None
    return _write(state, np.int32(row), parked.row, parked.stored), True


_snapshot = jax.jit(snapshot)
_clear = jax.jit(clear, donate_argnums=0)
_release = jax.jit(release, donate_argnums=0)


def _existing(state: CacheState, row: int) -> int:
    row = as_int("row", row, 0)
    check_rows(np.array([row]), state.batch_size)
    return row


def _moved_out(tree: Any, ids: np.ndarray, size: int, axis: int) -> Any:
    """Elements `ids` [n] along an axis of all arrays, as the first axis of arrays on the host that
    have room for `size` of them."""
    if next(iter(jax.tree.leaves(tree)[0].devices())).platform == "cpu":
        return jax.tree.map(lambda x: _copied(x, ids, size, axis), tree)
    return _to_host(_taken(tree, np.resize(ids, size) if len(ids) else np.zeros(size, int), axis))


@functools.partial(jax.jit, static_argnums=2)
def _taken(tree: Any, ids: jax.Array, axis: int) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(jnp.take(x, ids, axis, mode="clip"), axis, 0), tree)


def _copied(x: jax.Array, ids: np.ndarray, size: int, axis: int) -> np.ndarray:
    """`_moved_out` where the device's memory is the host's. XLA:CPU gathers element by element, at
    1 GB/s where a copy moves 4."""
    held = np.moveaxis(np.asarray(x), axis, 0)
    shape = size, *held.shape[1:]
    nbytes = math.prod(shape) * held.itemsize
    raw = np.zeros(nbytes + 64, np.uint8)  # what is not written takes no memory
    start = -raw.ctypes.data % 64  # aligned, so that XLA takes it over without a copy of its own
    found = raw[start : start + nbytes].view(held.dtype).reshape(shape)
    for to, index in enumerate(ids):
        found[to] = held[index]
    return found


def _to_host(tree: Any) -> Any:
    def move(x: jax.Array) -> Any:
        device = next(iter(x.devices()))
        if device.platform == "cpu":
            return x  # that is the host's memory
        kinds = {memory.kind for memory in device.addressable_memories()}
        if "pinned_host" in kinds:
            return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
        return np.asarray(x)

    return jax.tree.map(move, tree)


@functools.partial(jax.jit, donate_argnums=0)
def _put_back(state: CacheState, row: jax.Array, stored: Any) -> CacheState:
    axis = state.end.ndim - 1
    return replace_rows(state, row, jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), stored))


@functools.partial(jax.jit, donate_argnums=0)
def _write(state: CacheState, row: jax.Array, held: Row, stored: Any) -> CacheState:
    pages, axis = pool_of(state), state.end.ndim - 1
    there = held.first >= 0
    rank = jnp.cumsum(there, dtype=jnp.int32) - 1
    page = jnp.where(there, pages.free[pages.available - 1 - rank], -1)
    left = pages.available - there.sum(dtype=jnp.int32)
    # Taken from the stack without a reference: `adopt` gives them one.
    state = dataclasses.replace(state, pages=dataclasses.replace(pages, available=left))
    state = adopt(state, row, dataclasses.replace(held, table=page))
    size = jax.tree.leaves(stored)[0].shape[0]
    ids = jnp.full(size, pages.num_pages, jnp.int32)
    ids = ids.at[jnp.where(there, rank, size)].set(page, mode="drop")

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        def one(index: jax.Array, x: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(x, new[index], ids[index], axis)

        return lax.fori_loop(0, there.sum(dtype=jnp.int32), one, x)

    return with_pages(state, jax.tree.map(put, by_page(state), stored))
