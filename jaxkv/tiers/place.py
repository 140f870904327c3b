"""Where new tokens go in a tier's arrays, and how they are put there.

Both ways write inside the arrays only, and what is not to be written keeps its old value by being
written back: not every backend drops a write out of bounds (MLX's scatter damages memory). In a
pool of pages it goes to a last page that is nobody's: its own place may be another row's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.chain import LANES
from jaxkv.tiers.pages import Pages
from jaxkv.trees import node

Index = Any  # a layer: int, traced int32 scalar, or None where the state has no layer axis

At = tuple[jax.Array, jax.Array]
"""Indices [B, 1 or T] along the axis of rows, or pages, and [B, T] along that of slots."""

BETWEEN = {-2: 1, -1: 2}
"""Axes between a row's and its slots', by the axis of the slots: heads, or heads and groups."""


@node
@dataclasses.dataclass(frozen=True)
class Run:
    """The slots of T consecutive tokens, once around a ring at most: token t in slot `(start + t) %
    capacity`, written where `first <= t < stop`."""

    start: jax.Array  # [B] int32, inside the ring
    first: jax.Array  # [B]
    stop: jax.Array  # [B]
    size: int = dataclasses.field(metadata={"static": True})  # T, at most the capacity
    capacity: int = dataclasses.field(metadata={"static": True})
    pages: Pages | None = None  # where the slots are those of a pool

    @property
    def index(self) -> jax.Array:
        return jnp.arange(self.size, dtype=jnp.int32)[None]

    @property
    def slots(self) -> jax.Array:
        """[B, T], no slot twice."""
        slots = self.start[:, None] + self.index
        return jnp.where(slots < self.capacity, slots, slots - self.capacity)

    @property
    def written(self) -> jax.Array:
        """[B, T] bool."""
        return (self.index >= self.first[:, None]) & (self.index < self.stop[:, None])

    @property
    def at(self) -> At:
        rows, slots = located(self.slots, self.pages)
        if self.pages is None:
            return rows, slots
        return jnp.where(self.written, rows, self.pages.num_pages), slots

    @property
    def window(self) -> int:
        """Slots of a window: of tiles, and of one page."""
        if self.pages is None:
            return min(LANES, self.capacity)
        return math.gcd(LANES, self.pages.size) if self.pages.size > LANES else self.pages.size

    def home(self, row: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a slot of one row lies."""
        if self.pages is None:
            return row, slot
        page, at = self.pages.row(row).locate(slot[None, None])
        return page[0, 0], at[0, 0]

    def of_groups(self, group: int) -> Run:
        """The same of groups of tokens, which must be whole."""
        if group == 1:
            return self
        start, first, stop = (x // group for x in (self.start, self.first, self.stop))
        pages = self.pages and self.pages.of_groups(group)
        size, capacity = self.size // group, self.capacity // group
        return Run(start, first, stop, size, capacity, pages)


def located(slots: jax.Array, pages: Pages | None) -> At:
    """Where slots [B, T] lie: in rows of their own, or in pages."""
    if pages is None:
        return jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None], slots
    return pages.locate(slots)


class Put(Protocol):
    """Tokens `new` [B, T, K, ...] put into `old`, whose axis `axis` < 0 is the slots: [..., B, K,
    S, W] or [..., B, K, G, S]."""

    def __call__(
        self, old: jax.Array, new: jax.Array, run: Run, layer: Index, axis: int
    ) -> jax.Array: ...


def scatter(old: jax.Array, new: jax.Array, run: Run, layer: Index, axis: int) -> jax.Array:
    """For linear memories.

    The rows' own slots make this a scatter, which XLA does in place where a dynamic_update_slice
    that is read later costs two copies of the whole buffer (openxla/xla#20440).
    """
    place = index_of(run.at, layer, axis)
    at: Any = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
    written = run.written.reshape(*run.written.shape, *[1] * (new.ndim - 2))
    new = jnp.where(written, new, old.at[place].get(**at))
    if run.slots.size == 1:
        # XLA takes a scatter of one update for a dynamic_update_slice: the same update twice
        new, place = jnp.tile(new, (1, 2, 1, 1)), (*place[:-1], jnp.tile(place[-1], (1, 2)))
    return old.at[place].set(new, **at)


def windows(old: jax.Array, new: jax.Array, run: Run, layer: Index, axis: int) -> jax.Array:
    """For memories in tiles: a window of slots is read, changed and written back, one after the
    other.

    A scatter makes XLA:TPU turn the whole array into another layout and back. The windows of a run
    are those of a ring; what belongs in one is cut from the tokens laid around such a ring, too.
    """
    size, capacity, length = run.window, run.capacity, run.size
    shape = list(old.shape)
    lead = len(shape) + axis - BETWEEN[axis]  # axes of layer and row
    shape[:lead] = [1] * lead
    shape[axis] = size
    period = min(capacity, length + size)
    fresh = jnp.moveaxis(new.astype(old.dtype), 1, axis)  # [B, K, T, W] or [B, K, G, T]
    if length > 1:
        pad = [(0, 0)] * fresh.ndim
        pad[axis] = (0, period - length)
        laid = [jnp.pad(fresh, pad), lax.slice_in_dim(fresh, 0, min(size, length), axis=axis)]
        pad[axis] = (0, size - min(size, length))
        fresh = jnp.pad(jnp.concatenate(laid, axis=axis), pad)
    each = -(-capacity // size)
    count = 1 if length == 1 else min((length - 2) // size + 3, each)

    def put(turn: jax.Array, old: jax.Array) -> jax.Array:
        row, window = turn // count, turn % count
        start = run.start[row]
        origin = (start // size + window) % each * size
        if old.shape[axis] % size:
            origin = jnp.minimum(origin, old.shape[axis] - size)
        begin = [jnp.int32(0)] * old.ndim
        if layer is not None:
            begin[0] = jnp.asarray(layer, jnp.int32)
        begin[lead - 1], begin[axis] = run.home(row, origin)
        slot = origin + lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis)
        index = jnp.where(slot < start, slot - start + capacity, slot - start)
        hit = (index >= run.first[row]) & (index < run.stop[row]) & (slot < capacity)
        own = lax.dynamic_slice_in_dim(fresh, row, 1)
        if length > 1:
            offset = (origin - start) % capacity
            offset = jnp.where(offset < length, offset, offset - capacity + period)
            own = lax.dynamic_slice_in_dim(own, jnp.maximum(offset, 0), size, axis)
        kept = lax.dynamic_slice(old, begin, shape)
        own = own.reshape(*[1] * (lead - 1), *own.shape)
        return lax.dynamic_update_slice(old, jnp.where(hit, own, kept), begin)

    return lax.fori_loop(0, new.shape[0] * count, put, old)


def index_of(at: At, layer: Index, axis: int) -> tuple[Any, ...]:
    """Index of an array whose axis `axis` is the slots that gives, or takes, [B, T, K, ...]."""
    rows, slots = at
    return *(() if layer is None else (layer,)), rows, *(slice(None),) * BETWEEN[axis], slots
