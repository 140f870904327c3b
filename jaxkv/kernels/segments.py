"""Attention over the segments of a chain: each by itself, in the basis of its tier, and merged."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform, softmax
from jaxkv.checks import undifferentiable
from jaxkv.kernels import dispatch, flash
from jaxkv.kernels.bases import Bases, in_basis
from jaxkv.kernels.queries import Queries
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import Sliced, only

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
        def over(part: Segment) -> Partial:
            def run(codes: Segment, own: Queries) -> Partial:
                return dispatch.partial_attention(codes, bases.value, own, implementation)

            bases = Bases.of(part)
            return in_basis(part, bases, own, run, implementation)

        own = Queries.of(query, position, scoring, sink_tokens, heads)
        return softmax.merge([over(part) for part in parts(position)])

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
    bases, sides = [Bases.of(part) for part in held], [flash.sides(part) for part in held]
    sliced = Sliced.of(query)

    def at(index: jax.Array) -> Partial:
        row, head, start = index // (heads * tiles), index // tiles % heads, starts[index % tiles]
        queries = sliced.at((row, start, head * group, 0), (1, tile, group, h))
        each = lax.dynamic_slice_in_dim(position, start, tile, 1)
        places, found = only(each, row), parts(each)
        options = scoring.block(start, tile).head(head, heads).row(row)
        own = Queries.of(queries, places, options, sink_tokens, 1)
        none = flash.nothing(own.folded, found[0], found[0].spec.value_dim or h)

        def over(part: Segment, bases: Bases, sides: flash.Sides) -> Partial:
            def run(codes: Segment, own: Queries) -> Partial:
                found = flash.partial_attention(codes, sides, own, row, head)
                return dispatch.in_tokens_basis(bases.value, found)

            part, bases = part.row(row), bases.at(row, head)
            oldest, newest = part.within(own.reach)
            return lax.switch(
                (oldest < newest).any().astype(jnp.int32),
                [lambda: none, lambda: in_basis(part, bases, own, run)],
            )

        merged = softmax.merge([over(*part) for part in zip(found, bases, sides, strict=True)])
        return jax.tree.map(lambda x: x[0, 0].reshape(group, tile, *x.shape[3:]), merged)

    found: Partial = lax.map(at, jnp.arange(batch * heads * tiles, dtype=jnp.int32))

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(batch, heads, tiles, *x.shape[1:]), 2, 3)
        x = x.reshape(batch, heads, group, -1, *x.shape[5:])[:, :, :, :size]
        return x.reshape(batch, heads, group * size, *x.shape[4:])

    return jax.tree.map(joined, found)


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
