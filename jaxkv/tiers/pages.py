"""Which pages of a pool hold a row's tokens, and where in the arrays they lie."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import ring
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class Pages:
    """Which pages of a pool each row has, and which are free: N pages, R rows of up to P pages.

    Page number o of a row holds the positions from `offset + o * size` on; it stands in column
    o % P of the row's table. A page in several tables, or held from outside besides, is never
    written. To a tier a row is a ring of P * size slots, column after column.
    """

    table: jax.Array  # [R, P] int32: pages, -1 where there is none
    first: jax.Array  # [R, P] int32: the position at which each starts, -1 where there is none
    refs: jax.Array  # [N] int32: how many tables and others refer to a page
    free: jax.Array  # [N] int32: its first `available` elements are the pages without references
    available: jax.Array  # [] int32
    size: int = dataclasses.field(metadata={"static": True})  # tokens of a page
    offset: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        return int(self.table.shape[-1]) * self.size

    @property
    def num_pages(self) -> int:
        return int(self.refs.shape[-1])

    def slot_of(self, position: jax.Array) -> jax.Array:
        return ring.slot_of(position, self.offset, self.capacity)

    def locate(self, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The page [R, T] and the slot in it of slots [R, T] of a row; page N where there is
        none."""
        column = jnp.minimum(slots // self.size, self.table.shape[1] - 1)
        page = jnp.take_along_axis(self.table, column, axis=1)
        outside = (slots >= self.capacity) | (page < 0)
        return jnp.where(outside, self.num_pages, page), slots % self.size

    def holds(self, position: jax.Array) -> jax.Array:
        """Whether the page of a position [..., R] is there, bool. Not so where it was never taken,
        or compressed away."""
        number = (position - self.offset) // self.size
        rows = jnp.arange(self.table.shape[0], dtype=jnp.int32)
        first = self.first[rows, number % self.table.shape[1]]
        return first == self.offset + number * self.size

    def count(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """How many of the positions [low, high) [..., R] lie in pages that are there."""
        start, stop = jnp.maximum(self.first, low[..., None]), high[..., None]
        inside = jnp.minimum(self.first + self.size, stop) - start
        return jnp.where(self.first >= 0, jnp.maximum(inside, 0), 0).sum(-1, dtype=jnp.int32)

    def needed(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Which columns [R, P] hold any of the positions [low, high) [R], bool."""
        first, start, stop = self.first, low[:, None], high[:, None]
        return (first >= 0) & (first + self.size > start) & (first < stop) & (start < stop)

    def only(self, chosen: jax.Array) -> Pages:
        """The rows as if they had the pages of columns `chosen` [R, P] alone."""
        return dataclasses.replace(self, first=jnp.where(chosen, self.first, -1))

    def of_groups(self, group: int) -> Pages:
        """The same with groups of tokens for slots."""
        return dataclasses.replace(self, size=self.size // group)

    def row(self, row: jax.Array | None) -> Pages:
        """The pages of one row, as if there were no other; None: all."""
        if row is None:
            return self
        table, first = (lax.dynamic_slice_in_dim(x, row, 1) for x in (self.table, self.first))
        return dataclasses.replace(self, table=table, first=first)

    def ready(self, low: jax.Array, high: jax.Array, most: int) -> jax.Array:
        """The rows [R] that may write all of their positions [low, high), of which there are at
        most `most`: each has a page that no one else refers to."""
        count = min(most // self.size + 2, self.table.shape[1])
        last = (high - 1 - self.offset) // self.size
        number = last[:, None] - jnp.arange(count, dtype=jnp.int32)
        start = self.offset + number * self.size
        column = number % self.table.shape[1]
        page, first = (jnp.take_along_axis(x, column, 1) for x in (self.table, self.first))
        own = (page >= 0) & (first == start) & (self.refs[page] == 1)
        needed = (start + self.size > low[:, None]) & (low < high)[:, None]
        return (own | ~needed).all(1)
