"""The blocks of a tier that attention visits one after the other: slots of the rows' rings, or
pages of each row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxkv import platform, ring
from jaxkv.kernels.blocks import Blocks
from jaxkv.tiers.pages import Pages
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
    """The blocks, of about `size` slots, that hold positions of a segment up to `newest` [B]."""
    newest = newest if part.base is None else newest - part.base
    high = jnp.maximum(jnp.minimum(part.high, newest + 1), part.low)
    return RingWalk(part, high, size) if part.pages is None else PageWalk.of(part, high, size)


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
    """The pages of each row that hold any of the positions wanted, in the order of the table's
    columns from the oldest on, some at a time, whatever positions they start at."""

    columns: jax.Array  # [B, P]: where they stand in the table, then the others
    page: jax.Array  # [B, P]: those pages, then any
    first: jax.Array  # [B, P]: the position at which each starts
    count: jax.Array  # [B]: how many they are
    bounds: tuple[jax.Array, jax.Array]  # [B] each: the positions held
    page_size: int
    each: int  # pages of a block

    @classmethod
    def of(cls, part: Segment, high: jax.Array, size: int) -> PageWalk:
        pages = part.pages
        assert pages is not None
        columns, count = ordered(pages, part.low, high)
        page, first = (jnp.take_along_axis(x, columns, 1) for x in (pages.table, pages.first))
        each = max(1, min(size // pages.size, columns.shape[1]))
        bounds = part.low, part.high
        return cls(columns, jnp.maximum(page, 0), first, count, bounds, pages.size, each)

    @property
    def size(self) -> int:
        return self.page_size * self.each

    def turns(self) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), (self.count.max() + (self.each - 1)) // self.each

    def look(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = index * self.each + jnp.arange(self.each, dtype=jnp.int32)
        first = self._at(self.first, index)[..., None]
        position = first + jnp.arange(self.page_size, dtype=jnp.int32)  # [B, each, page]
        low, high = (x[:, None, None] for x in self.bounds)
        there = (number < self.count[:, None])[..., None]
        held = there & (position >= low) & (position < high)
        return tuple(x.reshape(len(x), -1) for x in (position, held))  # type: ignore[return-value]

    def cut(
        self, side: Blocks, index: jax.Array, layer: Index, row: Index, head: Index = None
    ) -> Tokens:
        pages = self._at(self.page, index)

        def of_rows(pages: jax.Array) -> Tokens:
            """A page [B] of each row."""
            one = functools.partial(side.at, jnp.int32(0), self.page_size, layer, head=head)
            if len(pages) == 1:
                return one(row=pages[0])
            return jax.tree.map(lambda x: x.squeeze(1), jax.vmap(lambda page: one(row=page))(pages))

        if self.each == 1:
            return of_rows(pages[:, 0])
        if platform.name() == "cpu":  # few, and XLA gathers element by element: five times the time
            return side.joined([of_rows(pages[:, i]) for i in range(self.each)])
        return side.joined(jax.vmap(of_rows, 1, 1)(pages))

    def columns_of(self, index: jax.Array) -> jax.Array:
        """The columns [B, each] of a block's pages."""
        return self._at(self.columns, index)

    def _at(self, table: jax.Array, index: jax.Array) -> jax.Array:
        """[B, each]: what a table [B, P] says of the pages of a block; of those beyond its last, of
        others again."""
        column = index * self.each + jnp.arange(self.each, dtype=jnp.int32)
        return table[:, jnp.minimum(column, table.shape[1] - 1)]


def ordered(pages: Pages, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The columns [B, P] of the pages that hold any of the positions [low, high) [B], from the
    oldest on, and how many they are, [B]; the others, in any order, follow."""
    needed, width = pages.needed(low, high), pages.table.shape[1]
    count = needed.sum(1, dtype=jnp.int32)
    # The table is a ring: the page of `low`, or the first there is behind it, comes first.
    start = ((low - pages.offset) // pages.size) % width
    column = (start[:, None] + jnp.arange(width, dtype=jnp.int32)) % width
    found = jnp.take_along_axis(needed, column, 1)
    before = jnp.cumsum(found, axis=1, dtype=jnp.int32)
    behind = count[:, None] + jnp.cumsum(~found, axis=1, dtype=jnp.int32)
    rank = jnp.where(found, before, behind) - 1
    rows = jnp.arange(len(column), dtype=jnp.int32)[:, None]
    return jnp.zeros_like(column).at[rows, rank].set(column), count
