"""Rows that wait in the host's memory: taken out of a state as they are stored, and put back, bit
for bit.

Not for use inside `jit`: what a row holds is looked at, and the state is donated. Copies run beside
the device's next steps; nothing here waits for one, but for the few bytes of a row's table (and on
CPUs, where the copy is the host's own work).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.batch import replace_rows, take_rows
from jaxkv.drop import clear
from jaxkv.paged.pool import release
from jaxkv.paged.rows import Row, adopt, by_page, pool_of, snapshot, with_pages
from jaxkv.state import CacheState


@dataclasses.dataclass(frozen=True)
class Parked:
    """A row on the host: what is its own, and what its pages hold, in the order of its table."""

    row: Any  # a `Row`; of a state without pages, a state of one row
    stored: Any = None  # arrays [n, ...], n the next power of two
    num_pages: int = 0

    @property
    def nbytes(self) -> int:
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves((self.row, self.stored)))


def offload(state: CacheState, row: int) -> tuple[CacheState, Parked]:
    """Moves a row to the host's memory; its place in the state is empty, its pages are free (but
    for those that others share). The state is donated.

    Where a device has `pinned_host` memory, that is where the row goes. A page that the row shares
    is copied, and is its own once the row is back.
    """
    if state.pages is None:
        taken = _to_host(_take(state, np.array([row], np.int32)))
        return _clear(state, np.int32(row)), Parked(taken)
    table = np.asarray(state.pages.table[row])
    ids = table[table >= 0]
    size = 1 << max(len(ids) - 1, 0).bit_length()
    padded = np.full(size, pool_of(state).num_pages, np.int32)
    padded[: len(ids)] = ids
    held = _to_host(_snapshot(state, np.int32(row)))
    if next(iter(state.end.devices())).platform == "cpu":
        stored = _copied(state, padded)
    else:
        stored = _to_host(_read(state, padded))
    return _release(state, np.int32(row)), Parked(held, stored, len(ids))


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
    """
    parked = prefetch(parked)
    if state.pages is None:
        return _replace(state, np.int32(row), parked.row), True
    state = _release(state, np.int32(row))
    if int(pool_of(state).available) < parked.num_pages:
        return state, False
    return _write(state, np.int32(row), parked.row, parked.stored), True


_take = jax.jit(take_rows)
_snapshot = jax.jit(snapshot)
_clear = jax.jit(clear, donate_argnums=0)
_replace = jax.jit(replace_rows, donate_argnums=0)
_release = jax.jit(release, donate_argnums=0)


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


@jax.jit
def _read(state: CacheState, ids: jax.Array) -> Any:
    """What the pages `ids` [n] hold, [n, ...] each."""
    axis = state.end.ndim - 1
    return jax.tree.map(lambda x: jnp.moveaxis(jnp.take(x, ids, axis), axis, 0), by_page(state))


def _copied(state: CacheState, ids: np.ndarray) -> Any:
    """`_read` where the device's memory is the host's: XLA:CPU gathers element by element, at
    1 GB/s where a copy of pages moves 4."""
    axis = state.end.ndim - 1

    def pages(x: jax.Array) -> np.ndarray:
        held = np.moveaxis(np.asarray(x), axis, 0)
        size = len(ids) * held[0].nbytes
        raw = np.empty(size + 64, np.uint8)
        start = -raw.ctypes.data % 64  # what XLA takes over without a copy of its own
        found = raw[start : start + size].view(held.dtype).reshape(len(ids), *held.shape[1:])
        for to, page in zip(found, ids, strict=True):
            to[:] = held[page]
        return found

    return jax.tree.map(pages, by_page(state))


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
