"""The blocks of a tier that attention visits one after the other: slots of the rows' rings, or
pages of each row."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxkv import ring
from jaxkv.kernels.blocks import Blocks
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import Tokens


class Walk(Protocol):
    """Blocks of `size` slots. Positions are counted as in the segment."""

    @property
    def size(self) -> int: ...

    def turns(self) -> tuple[jax.Array, jax.Array]:
        """The numbers [first, stop) of the blocks that any row needs."""

    def look(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The positions in block `index` of each row, and whether they are held and are in no other
        block: [B, size] each."""

    def cut(
        self, side: Blocks, index: jax.Array, layer: Index, row: Index, head: Index = None
    ) -> Tokens:
        """That block of keys or values, see `Blocks.at`."""


def walk(part: Segment, newest: jax.Array, size: int) -> Walk:
    """The blocks that hold positions of a segment up to `newest` [B]; `size` is a ring's."""
    newest = newest if part.base is None else newest - part.base
    high = jnp.maximum(jnp.minimum(part.high, newest + 1), part.low)
    return RingWalk(part, high, size) if part.pages is None else PageWalk.of(part, high)


@dataclasses.dataclass(frozen=True)
class RingWalk:
    part: Segment
    high: jax.Array  # [B]: where the queries' sight ends
    size: int

    def turns(self) -> tuple[jax.Array, jax.Array]:
        offset, capacity = self.part.spec.offset, self.part.spec.capacity
        low, high = self.part.low - offset, self.high - offset
        # Slots are contiguous unless the range passes the ring's seam; an empty range asks for
        # nothing.
        seam = low // capacity != (high - 1) // capacity
        empty = low >= high
        first = jnp.where(empty, capacity, jnp.where(seam, 0, low % capacity))
        stop = jnp.where(empty, 0, jnp.where(seam, capacity, (high - 1) % capacity + 1))
        return first.min() // self.size, (stop.max() + self.size - 1) // self.size

    def look(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        part, spec = self.part, self.part.spec
        slot = self._start(index) + jnp.arange(self.size, dtype=jnp.int32)[None]
        position = ring.position_of(slot, part.high[:, None], spec.offset, spec.capacity)
        return position, (position >= part.low[:, None]) & (slot >= index * self.size)

    def cut(
        self, side: Blocks, index: jax.Array, layer: Index, row: Index, head: Index = None
    ) -> Tokens:
        return side.at(self._start(index), self.size, layer, row, head)

    def _start(self, index: jax.Array) -> jax.Array:
        # The last block of a ring that is no multiple of the block starts early; slots that were
        # seen before are masked.
        return jnp.minimum(index * self.size, self.part.spec.capacity - self.size)


@dataclasses.dataclass(frozen=True)
class PageWalk:
    """Page after page of each row, from its oldest on: those in its table's columns up to the
    newest, whatever positions they start at."""

    page: jax.Array  # [B, P]
    first: jax.Array  # [B, P]
    begin: jax.Array  # [B]: the column of the first page to be visited, modulo P
    count: jax.Array  # [B]
    bounds: tuple[jax.Array, jax.Array]  # [B] each: the positions held
    size: int

    @classmethod
    def of(cls, part: Segment, high: jax.Array) -> PageWalk:
        pages = part.pages
        assert pages is not None
        first, size = pages.first, pages.size
        low, stop = part.low[:, None], high[:, None]
        needed = (first >= 0) & (first + size > low) & (first < stop) & (low < stop)
        beyond = (first >= stop) & (first < part.high[:, None])
        count = needed.sum(1, dtype=jnp.int32)
        top = (part.high - pages.offset + size - 1) // size
        begin = top - beyond.sum(1, dtype=jnp.int32) - count
        page = jnp.maximum(pages.table, 0)
        return cls(page, first, begin, count, (part.low, part.high), size)

    def turns(self) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), self.count.max()

    def look(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = self._at(self.first, index)
        position = first[:, None] + jnp.arange(self.size, dtype=jnp.int32)
        low, high = (x[:, None] for x in self.bounds)
        there = (first >= 0) & (index < self.count)
        return position, there[:, None] & (position >= low) & (position < high)

    def cut(
        self, side: Blocks, index: jax.Array, layer: Index, row: Index, head: Index = None
    ) -> Tokens:
        pages, start = self._at(self.page, index), jnp.int32(0)
        if len(pages) == 1:
            return side.at(start, self.size, layer, pages[0], head)
        each = jax.vmap(lambda page: side.at(start, self.size, layer, page, head))(pages)
        found: Tokens = jax.tree.map(lambda x: x.squeeze(1), each)
        return found

    def _at(self, table: jax.Array, index: jax.Array) -> jax.Array:
        column = (self.begin + index) % table.shape[1]
        return jnp.take_along_axis(table, column[:, None], 1)[:, 0]
