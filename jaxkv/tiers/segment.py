"""A tier's keys and values, and which of a layer's positions lie in them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.chain import TierSpec
from jaxkv.formats import plain
from jaxkv.tiers import tokens
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.place import Index
from jaxkv.tiers.tokens import Tokens, only
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class Tier:
    """Keys and values of one tier."""

    keys: Tokens
    values: Tokens | None = None  # None: a part of the keys

    @property
    def sides(self) -> tuple[Tokens, ...]:
        """What is stored, as `TierSpec.formats`."""
        return (self.keys,) if self.values is None else (self.keys, self.values)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One tier (or the sinks) of one layer with the positions [low, high) that it holds, [B] int32
    each (or [L, B])."""

    tier: Tier
    spec: TierSpec
    low: jax.Array
    high: jax.Array
    base: jax.Array | None = None  # [B]: added to a position here to make it the row's own
    pages: Pages | None = None  # where the tier's slots are those of a pool
    # [B, T] each: what each query finds here, where that is not the same for all of them
    span: tuple[jax.Array, jax.Array] | None = None
    layer: Index = None  # of the tier's arrays

    def seen(self, span: tuple[jax.Array, jax.Array]) -> Segment:
        """The segment of queries that find [low, high) here, [B, T] each; of an empty range, as
        queries without a position have it, nothing."""
        low, high = span
        least = jnp.where(low < high, low, self.high[:, None]).min(1)
        return dataclasses.replace(self, low=jnp.minimum(self.low, least), span=span)

    def absolute(self, position: jax.Array) -> jax.Array:
        """Positions [B, S], as counted here, as the row counts them."""
        return position if self.base is None else position + self.base[:, None]

    def row(self, row: Index) -> Segment:
        """The positions [1] of one row; the tier still has all rows."""
        base = None if self.base is None else only(self.base, row)
        span = self.span and (only(self.span[0], row), only(self.span[1], row))
        low, high = only(self.low, row), only(self.high, row)
        pages = self.pages and self.pages.row(row)
        return dataclasses.replace(self, low=low, high=high, base=base, span=span, pages=pages)

    def count(self) -> jax.Array:
        """How many tokens are held here, [B] (or [L, B])."""
        if self.pages is None:
            return self.high - self.low
        return self.pages.count(self.low, self.high)

    def holds(self, position: jax.Array) -> jax.Array:
        """Whether positions [B, P], as counted here, are held."""
        inside = (position >= self.low[:, None]) & (position < self.high[:, None])
        return inside if self.pages is None else inside & self.pages.holds(position.T).T

    def within(self, reach: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The positions [first, stop) [B] held of those from reach[0] to reach[1], as counted
        here."""
        oldest, newest = reach if self.base is None else (x - self.base for x in reach)
        first = jnp.maximum(self.low, oldest)
        return first, jnp.maximum(jnp.minimum(self.high, newest + 1), first)

    def codes_only(self) -> Segment:
        """The same codes without their basis, for kernels: they multiply codes, and know nothing of
        means and rotations."""
        sides = map(tokens.without_basis, self.tier.sides)
        value = None if self.spec.value is None else plain(self.spec.value)
        spec = dataclasses.replace(self.spec, key=plain(self.spec.key), value=value, rotary=None)
        return dataclasses.replace(self, tier=Tier(*sides), spec=spec)
