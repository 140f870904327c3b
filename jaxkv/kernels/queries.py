"""Queries as attention over a tier takes them, and what a tier's basis does to them and to what
comes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxkv import softmax
from jaxkv.codec.arithmetic import power_of_two, to_unit
from jaxkv.kernels import dispatch
from jaxkv.kernels.xla import Adjust, Visible
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import basis_of, only, turned_mean_of
from jaxkv.tiers.turned import TurnedMean


@dataclasses.dataclass(frozen=True)
class Queries:
    """Scaled queries [B, K, G * T, H] in multiples of unit [B, K, G * T, 1], their positions [B, T]
    and options."""

    folded: jax.Array
    unit: jax.Array
    position: jax.Array
    scoring: Scoring
    sink_tokens: int

    @classmethod
    def of(
        cls,
        query: jax.Array,
        position: jax.Array,
        scoring: Scoring,
        sink_tokens: int,
        heads: int,
    ) -> Queries:
        """Of queries [B, T, N, H] to `heads` kv heads.

        What sees nothing may hold anything. Rows of size 1 keep every product within float32; the
        powers of two that they lack multiply the scores.
        """
        seeing = jnp.where(position[..., None, None] >= 0, query.astype(jnp.float32), 0.0)
        rows, exponent = to_unit(seeing)
        scale, scale_exponent = to_unit(scoring.scale_of_heads)
        exponent = jnp.clip(exponent + scale_exponent, -126, 126)
        unit = power_of_two(fold(exponent, heads))
        return cls(fold(rows * scale, heads), unit, position, scoring, sink_tokens)

    @property
    def newest(self) -> jax.Array:
        """A position [B] that no query looks beyond."""
        return self.scoring.reach(self.position, self.sink_tokens)[1]

    def visible(self, key: jax.Array, row: Index = None) -> jax.Array:
        return self.scoring.row(row).visible(only(self.position, row), key, self.sink_tokens)


Run = Callable[[Segment, Basis, jax.Array, Visible, Adjust | None], Partial]


@dataclasses.dataclass(frozen=True)
class Bases:
    """Those of a segment's keys and values."""

    key: Basis
    value: Basis
    turned: TurnedMean | None

    @classmethod
    def of(cls, part: Segment) -> Bases:
        sides = zip(part.tier.sides, part.spec.formats, strict=True)
        found = [basis_of(held, fmt, part.layer) for held, fmt in sides]
        turned = turned_mean_of(part.tier.keys, part.spec.rotary, part.layer)
        return cls(found[0], found[-1], turned)

    def at(self, row: jax.Array, head: jax.Array) -> Bases:
        """Those of one row and kv head."""
        turned = self.turned and self.turned.alone(row, head)
        return Bases(self.key.at(row, head), self.value.at(row, head), turned)


def in_basis(
    part: Segment,
    bases: Bases,
    own: Queries,
    run: Run,
    implementation: dispatch.Implementation = "xla",
) -> Partial:
    """Attention over one segment by `run`, which knows codes and the basis of their sums: what else
    the basis does to queries and scores."""
    mean_score, capped = bases.key.mean_score(own.folded), own.scoring.soft_cap is not None
    if mean_score is not None:
        mean_score = softmax.bounded(mean_score * own.unit)
    turned = bases.turned
    operand = None if turned is None else turned.operand(own.folded) * own.unit

    def adjust(scores: jax.Array, key: jax.Array, row: Index = None) -> jax.Array:
        if turned is not None and operand is not None:
            added = turned.score(only(operand, row), key)
            scores = softmax.bounded(scores + added.reshape(scores.shape))
        if mean_score is not None and capped:
            scores = scores + only(mean_score, row).reshape(*scores.shape[:4], 1)
        return own.scoring.row(row).adjust(scores, only(own.position, row), key)

    found = run(
        part.codes_only(),
        bases.value,
        dispatch.turned_query(bases.key, own.folded, implementation),
        own.visible,
        adjust if own.scoring.changes_scores or turned is not None else None,
    )
    top = found.max
    if mean_score is not None and not capped:
        top = jnp.where(found.sum > 0, top + mean_score[..., 0], top)
    return Partial(found.out[..., : part.spec.value_dim], top, found.sum)


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
