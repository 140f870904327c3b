"""Queries, and what they may see: all that an implementation of attention asks about them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.codec.arithmetic import power_of_two, to_unit
from jaxkv.scoring import Scoring
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import only
from jaxkv.tiers.turned import TurnedMean


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries of T tokens to K kv heads, R = G * T rows for each.

    Attributes:
      folded: [B, K, R, H] float32, in multiples of `unit`. Finite, but for queries that may make
        their own outputs NaN.
      unit: [B, K, R, 1] float32: the power of two by which a query was divided, times the scale.
      position: [B, T] int32; a query at -1 sees nothing.
      scoring, sink_tokens: what they see, and what is done to their scores.
      is_bfloat16: whether `folded` came as bfloat16, and a bfloat16 holds them still where no basis
        has turned them.
      mean_score: [B, K, R, 1] or None: what the mean of a tier's keys adds to every score.
      turned: the mean before the rotary embedding, which adds to a score what its position says, or
        None; `operand` is the queries as it takes them, `steps` its table for a block of slots.
    """

    folded: jax.Array
    unit: jax.Array
    position: jax.Array
    scoring: Scoring
    sink_tokens: int
    is_bfloat16: bool = False
    mean_score: jax.Array | None = None
    turned: TurnedMean | None = None
    operand: jax.Array | None = None
    steps: jax.Array | None = None

    @classmethod
    def of(
        cls, query: jax.Array, position: jax.Array, scoring: Scoring, sink_tokens: int, heads: int
    ) -> Queries:
        """Of queries [B, T, N, H] to `heads` kv heads.

        What sees nothing may hold anything. Rows of size 1 keep every product within float32; what
        they lack multiplies the scores.
        """
        seeing = jnp.where(position[..., None, None] >= 0, query.astype(jnp.float32), 0.0)
        rows, exponent = to_unit(seeing)
        scale, scale_exponent = to_unit(scoring.scale_of_heads)
        unit = power_of_two(jnp.clip(exponent + scale_exponent, -126, 126)) * jnp.abs(scale)
        folded, unit = fold(rows * jnp.where(scale < 0, -1, 1), heads), fold(unit, heads)
        return cls(folded, unit, position, scoring, sink_tokens, query.dtype == jnp.bfloat16)

    def row(self, row: jax.Array) -> Queries:
        """Those of one row of the batch."""
        arrays: dict[str, Any] = {
            name: only(array, row)
            for name in ("folded", "unit", "position", "mean_score", "operand")
            if (array := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **arrays, scoring=self.scoring.row(row))

    def by_blocks(self, size: int) -> Queries:
        """To be asked about so many keys at a time; made outside of the loop over them."""
        steps = None if self.turned is None else self.turned.steps(size)
        return dataclasses.replace(self, steps=steps)

    @property
    def reach(self) -> tuple[jax.Array, jax.Array]:
        """Positions [B] that no query looks before, or beyond."""
        return self.scoring.reach(self.position, self.sink_tokens)

    @property
    def changes_scores(self) -> bool:
        """Whether `adjust` does anything."""
        return self.scoring.changes_scores or self.turned is not None

    def see(self, part: Segment, key: jax.Array) -> jax.Array:
        """Which queries may look at positions [B, S] of a segment, as counted there: bool
        [B, T, S]."""
        seen = self.scoring.visible(self.position, part.absolute(key), self.sink_tokens)
        if part.span is None:
            return seen
        low, high = (bound[..., None] for bound in part.span)
        return seen & (key[:, None] >= low) & (key[:, None] < high)

    def adjust(self, scores: jax.Array, key: jax.Array) -> jax.Array:
        """Scores [B, K, G, T, S] of keys at positions [B, S] with all that is added to them; -inf
        where masked."""
        if self.turned is not None:
            assert self.operand is not None and self.steps is not None
            rows = scores.reshape(*scores.shape[:2], -1, scores.shape[-1])
            rows = self.turned.add(rows, self.operand, key, self.steps)
            scores = rows.reshape(scores.shape)
        if self.mean_score is not None and self.is_capped:
            scores = scores + self.mean_score.reshape(*scores.shape[:4], 1)
        return self.scoring.adjust(scores, self.position, key)

    @property
    def is_capped(self) -> bool:
        """Whether scores have to be whole before the softmax; what is added to all scores of a
        query may else come after."""
        return self.scoring.soft_cap is not None


def fold(query: jax.Array, heads: int) -> jax.Array:
    """[B, T, N, H] as [B, K, G * T, H]: the queries that share a kv head together."""
    b, t, n, h = query.shape
    return jnp.moveaxis(query.reshape(b, t, heads, n // heads, h), 1, 3).reshape(b, heads, -1, h)


def unfold(out: jax.Array, query: jax.Array) -> jax.Array:
    """[B, K, G * T, X] as [B, T, N, X], given the query [B, T, N, H]."""
    b, t, n, _ = query.shape
    return jnp.moveaxis(out.reshape(b, out.shape[1], -1, t, out.shape[-1]), 3, 1).reshape(
        b, t, n, -1
    )
