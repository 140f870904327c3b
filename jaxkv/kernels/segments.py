"""Attention over the segments of a chain: each by itself, in the basis of its tier, and merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform, softmax
from jaxkv.checks import undifferentiable
from jaxkv.codec.arithmetic import power_of_two, to_unit
from jaxkv.kernels import dispatch, flash
from jaxkv.kernels.xla import Adjust, Visible
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import Sliced, basis_of, only, turned_mean_of

Parts = Callable[[jax.Array], list[Segment]]

QUERY_BLOCK = 128
"""Queries attended at once off CPUs; longer prompts are mapped over blocks so that scores stay
small."""


def over_segments(
    parts: Parts,
    query: jax.Array,
    position: jax.Array,
    scoring: Scoring,
    sink_tokens: int,
    implementation: dispatch.Implementation = None,
) -> Partial:
    """The merged Partial [B, K, G * T] of queries [B, T, N, H] at `position` [B, T]; -1 sees
    nothing. `parts` gives the segments for queries at [B, T']."""
    query = undifferentiable(query)
    heads, size = parts(position)[0].tier.keys.data.shape[-3], query.shape[1]
    turned = any(part.tier.keys.turned_mean is not None for part in parts(position))
    if not turned and _takes_tiles(query.shape, heads, implementation):
        return _by_tiles(parts, query, position, scoring, sink_tokens)

    def some(query: jax.Array, position: jax.Array, scoring: Scoring) -> Partial:
        def run(
            part: Segment, basis: Basis, query: jax.Array, visible: Visible, adjust: Adjust | None
        ) -> Partial:
            return dispatch.partial_attention(
                part,
                basis,
                query,
                own.unit,
                visible,
                adjust,
                newest,
                part.layer,
                position=position,
                scoring=scoring,
                sink_tokens=sink_tokens,
                implementation=implementation,
            )

        newest = scoring.reach(position, sink_tokens)[1]
        own = _Queries.of(query, position, scoring, sink_tokens, heads)
        return softmax.merge(
            [_in_basis(part, _bases(part), own, run, implementation) for part in parts(position)]
        )

    if size <= QUERY_BLOCK:
        return some(query, position, scoring)
    starts, query, position, scoring = _blocks(query, position, scoring, QUERY_BLOCK)

    def at(start: jax.Array) -> Partial:
        queries, positions = (
            lax.dynamic_slice_in_dim(x, start, QUERY_BLOCK, 1) for x in (query, position)
        )
        return some(queries, positions, scoring.block(start, QUERY_BLOCK))

    blocks: Partial = lax.map(at, starts)
    return Partial(*(_joined(array, size) for array in (blocks.out, blocks.max, blocks.sum)))


def _takes_tiles(
    shape: tuple[int, ...], heads: int, implementation: dispatch.Implementation
) -> bool:
    """Whether queries [B, T, N, H] are many enough for `flash`, on a CPU that may take rows and
    heads apart."""
    dispatch.check_implementation(implementation)
    rows = shape[1] * shape[2] // heads
    return rows >= flash.LEAST and platform.visits_rows() and implementation != "pallas"


def _by_tiles(
    parts: Parts,
    query: jax.Array,
    position: jax.Array,
    scoring: Scoring,
    sink_tokens: int,
) -> Partial:
    """`over_segments` of a prompt on a CPU: tile by tile of the queries of one row and kv head."""
    held = parts(position)
    (batch, size, n, h), heads = query.shape, held[0].tier.keys.data.shape[-3]
    group = n // heads
    tiles = -(-size * group // flash.ROWS)
    tile = -(-size // tiles)
    starts, query, position, scoring = _blocks(query, position, scoring, tile)
    bases, sides = [_bases(part) for part in held], [flash.sides(part) for part in held]
    sliced = Sliced.of(query)

    def at(index: jax.Array) -> Partial:
        row, head, start = index // (heads * tiles), index // tiles % heads, starts[index % tiles]
        queries = sliced.at((row, start, head * group, 0), (1, tile, group, h))
        each = lax.dynamic_slice_in_dim(position, start, tile, 1)
        places, found = only(each, row), parts(each)
        options = scoring.block(start, tile).head(head, heads).row(row)
        reach = options.reach(places, sink_tokens)
        own = _Queries.of(queries, places, options, sink_tokens, 1)
        none = flash.nothing(own.folded, found[0], found[0].spec.value_dim or h)

        def over(part: Segment, bases: Bases, sides: flash.Sides) -> Partial:
            def run(
                part: Segment,
                basis: Basis,
                query: jax.Array,
                visible: Visible,
                adjust: Adjust | None,
            ) -> Partial:
                codes = flash.partial_attention(
                    part, sides, query, own.unit, visible, adjust, reach, row, head
                )
                return dispatch.in_tokens_basis(basis, codes)

            part = part.row(row)
            key, value = (basis.at(row, head) for basis in bases)
            oldest, newest = part.within(reach)
            return lax.switch(
                (oldest < newest).any().astype(jnp.int32),
                [lambda: none, lambda: _in_basis(part, (key, value), own, run)],
            )

        merged = softmax.merge([over(*part) for part in zip(found, bases, sides, strict=True)])
        return jax.tree.map(lambda x: x[0, 0].reshape(group, tile, *x.shape[3:]), merged)

    found: Partial = lax.map(at, jnp.arange(batch * heads * tiles, dtype=jnp.int32))

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(batch, heads, tiles, *x.shape[1:]), 2, 3)
        x = x.reshape(batch, heads, group, -1, *x.shape[5:])[:, :, :, :size]
        return x.reshape(batch, heads, group * size, *x.shape[4:])

    return jax.tree.map(joined, found)


@dataclasses.dataclass(frozen=True)
class _Queries:
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
    ) -> _Queries:
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

    def visible(self, key: jax.Array, row: Index = None) -> jax.Array:
        return self.scoring.row(row).visible(only(self.position, row), key, self.sink_tokens)


Bases = tuple[Basis, Basis]
Run = Callable[[Segment, Basis, jax.Array, Visible, Adjust | None], Partial]


def _bases(part: Segment) -> Bases:
    sides = zip(part.tier.sides, part.spec.formats, strict=True)
    found = [basis_of(held, fmt, part.layer) for held, fmt in sides]
    return found[0], found[-1]


def _in_basis(
    part: Segment,
    bases: Bases,
    own: _Queries,
    run: Run,
    implementation: dispatch.Implementation = "xla",
) -> Partial:
    """Attention over one segment by `run`, which knows codes and the basis of their sums: what else
    the basis does to queries and scores."""
    key_basis, value_basis = bases
    mean_score, capped = key_basis.mean_score(own.folded), own.scoring.soft_cap is not None
    if mean_score is not None:
        mean_score = softmax.bounded(mean_score * own.unit)
    turned = turned_mean_of(part.tier.keys, part.spec.rotary, part.layer)
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
        value_basis,
        dispatch.turned_query(key_basis, own.folded, implementation),
        own.visible,
        adjust if own.scoring.changes_scores or turned is not None else None,
    )
    top = found.max
    if mean_score is not None and not capped:
        top = jnp.where(found.sum > 0, top + mean_score[..., 0], top)
    return Partial(found.out[..., : part.spec.value_dim], top, found.sum)


def _blocks(
    query: jax.Array, position: jax.Array, scoring: Scoring, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, Scoring]:
    """Where blocks of `size` queries start, and what they are cut from, with a last one that is
    whole."""
    starts = jnp.arange(0, query.shape[1], size, dtype=jnp.int32)
    lacking = -query.shape[1] % size
    pad = [(0, 0), (0, lacking)]
    query = jnp.pad(query, [*pad, (0, 0), (0, 0)])
    return starts, query, jnp.pad(position, pad, constant_values=-1), scoring.padded(lacking)


def _joined(blocks: jax.Array, size: int) -> jax.Array:
    """[blocks, B, K, G * QUERY_BLOCK, ...] as [B, K, G * size, ...]."""
    count, b, k, rows, *rest = blocks.shape
    by_query = jnp.moveaxis(
        blocks.reshape(count, b, k, rows // QUERY_BLOCK, QUERY_BLOCK, *rest), 0, 3
    )
    return by_query.reshape(b, k, rows // QUERY_BLOCK, -1, *rest)[:, :, :, :size].reshape(
        b, k, -1, *rest
    )


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
