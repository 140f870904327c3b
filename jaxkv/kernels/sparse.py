"""Attention that reads a pool page by page: only the pages that matter, or all of them with the
weight that each got.

Which pages matter each kv head finds by itself, from what its queries may score with the keys of a
page: their mean and, some way above it, the bound of Quest (Tang et al. 2024). What is read is
computed as everywhere else: a row of fewer pages is a row of pages.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform, softmax
from jaxkv.kernels import dispatch, flash, xla
from jaxkv.kernels.bases import Bases, in_basis
from jaxkv.kernels.queries import Queries
from jaxkv.kernels.walk import PageWalk
from jaxkv.kernels.xla import Scored
from jaxkv.scoring import EVERY, Scoring
from jaxkv.softmax import FLOOR, MOST_SCORE, Partial, bounded
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.summaries import Summaries
from jaxkv.tiers.tokens import only
from jaxkv.trees import node

REACH = 0.3
"""How far a page's best score is taken to be from the score of its mean to the bound of all. With
an eighth of the pages of 64 tokens 0.19 and 0.16 of the weight is lost (SmolLM2, Qwen2.5; 4,096
tokens); by bounds alone 0.21 and 0.18, by the weights themselves 0.16 and 0.14."""

FIRST = 4
"""The page with any of so many of a row's first tokens is always read: models look at those from
everywhere. Without it 0.24 is lost in place of 0.21."""


@node
@dataclasses.dataclass(frozen=True)
class Paged:
    """Attention over the pages read, and what is known of each page."""

    partial: Partial  # [B, K, R, V], R = G * T
    mass: jax.Array  # [B, K, R, P]: each page's part of `partial.sum`; zeros where not asked for
    left: jax.Array  # [B, K, R]: the log of the most that the pages left out may weigh

    def beside(self, other: Partial) -> Paged:
        """With what other tiers gave."""
        partial = softmax.merge([self.partial, other])
        mass = self.mass * jnp.exp(self.partial.max - partial.max)[..., None]
        return Paged(partial, mass, self.left)

    def shares(self, sinks: Partial) -> jax.Array:
        """What share of the queries' weight each page got, [B, K, P], summed over the queries;
        `sinks` are the learned ones."""
        every = softmax.merge([self.partial, sinks])
        total = jnp.where(every.sum > 0, every.sum, 1) * jnp.exp(every.max - self.partial.max)
        return (self.mass / total[..., None]).sum(2)


def nothing_left(partial: Partial, part: Segment) -> Paged:
    """Of a partial for which every page was read, and none was weighed."""
    assert part.pages is not None
    mass = jnp.zeros((*partial.max.shape, part.pages.table.shape[1]), jnp.float32)
    return Paged(partial, mass, jnp.full(partial.max.shape, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What of a pool is read, and reported."""

    summaries: Summaries | None
    top_pages: int | None  # for each kv head, besides those that are always read; None: all
    mass: bool


def over_pages(
    part: Segment,
    query: jax.Array,
    position: jax.Array,
    scoring: Scoring,
    sink_tokens: int,
    reading: Reading,
) -> Paged:
    """Attention of queries [B, T, N, H] at `position` [B, T] over the tokens of a pool, of one row
    and kv head at a time: each has pages of its own to read."""
    heads, batch = part.tier.keys.data.shape[-3], query.shape[0]
    group, bases, sides = query.shape[2] // heads, Bases.of(part), flash.sides(part)

    def at(index: jax.Array) -> Paged:
        row, head = index // heads, index % heads
        queries = lax.dynamic_slice_in_dim(only(query, row), head * group, group, axis=2)
        options = scoring.head(head, heads).row(row)
        own = Queries.of(queries, only(position, row), options, sink_tokens, 1)
        chosen, left = _chosen(part.row(row), own, reading, row, head)
        partial, mass = _attended(chosen, bases.at(row, head), own, sides, (row, head), reading)
        found = Paged(partial, mass, left)
        return jax.tree.map(lambda x: x[0, 0], found)

    every = jnp.arange(batch * heads, dtype=jnp.int32)
    found: Paged = lax.map(at, every) if platform.visits_rows() else jax.vmap(at)(every)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), found)


def covers(part: Segment, scoring: Scoring, newest: jax.Array, most: int) -> jax.Array:
    """Whether `most` pages, besides those that are always read, are all pages of every row, []."""
    assert part.pages is not None
    needed = part.pages.needed(part.low, _stop(part, newest))
    ranked = needed & ~_always(part, scoring)
    return (ranked.sum(1, dtype=jnp.int32) <= most).all()


def _stop(part: Segment, newest: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.minimum(part.high, newest + 1), part.low)


def _always(part: Segment, scoring: Scoring) -> jax.Array:
    """The columns [B, P] that are read whatever they hold: pages that are not full, which have no
    summary, that of a row's first tokens, and all that a window shows."""
    assert part.pages is not None
    filling = part.pages.first + part.pages.size > part.high[:, None]
    return filling | (part.absolute(part.pages.first) < FIRST) | (scoring.window is not None)


def _chosen(
    part: Segment, own: Queries, reading: Reading, row: jax.Array, head: jax.Array
) -> tuple[Segment, jax.Array]:
    """The segment of one row with the pages to be read alone, and the log of the most [1, 1, R]
    that the others may weigh."""
    nothing = jnp.full(own.unit.shape[:3], -jnp.inf)
    if reading.top_pages is None:
        return part, nothing
    pages, summaries = part.pages, reading.summaries
    assert pages is not None and summaries is not None
    needed = pages.needed(part.low, _stop(part, own.reach[1]))
    always = needed & _always(part, own.scoring)
    ranked = (needed & ~always)[:, None, None]
    likely, bounds = (jnp.where(ranked, x, -jnp.inf) for x in _expected(part, own, summaries, head))
    # A page counts by its share of each query's weight, the queries of a kv head together.
    shares = jnp.exp(likely - jnp.maximum(likely.max(-1, keepdims=True), FLOOR))
    value = (shares / jnp.maximum(shares.sum(-1, keepdims=True), 1.0)).sum((1, 2))  # [1, P]
    value = jnp.where(ranked[0, 0], value, -1.0)
    number = min(reading.top_pages, value.shape[1])
    top = lax.top_k(value[0], number)[1]
    taken = jnp.zeros_like(needed).at[0, top].set(True) & (value >= 0)
    rest = jnp.where(taken[:, None, None], -jnp.inf, bounds)
    rest = jnp.where(jnp.isneginf(rest), rest, rest + jnp.log(jnp.float32(pages.size)))
    left = jax.nn.logsumexp(rest, axis=-1)
    return dataclasses.replace(part, pages=pages.only(always | taken)), left


def _expected(
    part: Segment, own: Queries, summaries: Summaries, head: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What each query [1, 1, R] of a head is likely to score at best in each page of a row, and the
    most that it may score there, [1, 1, R, P] each; -inf in those that it does not see."""
    pages, size = part.pages, own.position.shape[1]
    assert pages is not None
    held = summaries.of(jnp.maximum(pages.table[0], 0), part.layer, head)
    first, last = jnp.maximum(pages.first, part.low[:, None]), pages.first + (pages.size - 1)
    seen = own.scoring.visible(own.position, first, own.sink_tokens)  # [1, T, P]
    if part.span is not None:
        low, high = (bound[..., None] for bound in part.span)
        seen &= (first[:, None] < high) & (last[:, None] >= low)

    def adjusted(scores: jax.Array) -> jax.Array:
        scores = bounded(scores * own.unit[0, 0])[None, None]
        scores = jnp.where(jnp.isnan(scores), -MOST_SCORE, scores)  # their own outputs' affair
        by_query = scores.reshape(1, 1, -1, size, scores.shape[-1])
        if own.scoring.changes_scores:
            by_query = _adjusted(by_query, own, first, last, pages.size)
        return jnp.where(seen[:, None, None], by_query, -jnp.inf).reshape(scores.shape)

    mean, most = held.scores(own.folded[0, 0])
    return adjusted(mean + REACH * (most - mean)), adjusted(most)


def _adjusted(
    scores: jax.Array, own: Queries, first: jax.Array, last: jax.Array, size: int
) -> jax.Array:
    """Scores [1, 1, G, T, P] of pages as soft cap, decay, bias and mask leave them at most.

    A cap is monotone, a decay so over positions: a page's ends will do. What is given position by
    position is looked up for all of them.
    """
    scoring = own.scoring
    steps = range(size) if scoring.bias is not None or scoring.mask is not None else (0, size - 1)
    most = jnp.full(scores.shape, -jnp.inf)
    for step in steps:
        at = jnp.minimum(first + step, last).clip(0, EVERY)
        most = jnp.maximum(most, scoring.adjust(scores, own.position, at))
    return most


def _attended(
    part: Segment,
    bases: Bases,
    own: Queries,
    sides: flash.Sides,
    place: tuple[jax.Array, jax.Array],
    reading: Reading,
) -> tuple[Partial, jax.Array]:
    """Attention of the queries of one row and kv head over the pages of a segment, and each page's
    part [1, 1, R, P] of the sum."""
    pages, found, most = part.pages, [], None
    assert pages is not None
    if reading.top_pages is not None:  # a block of more pages than are read would be half empty
        most = (reading.top_pages + 1) * pages.size

    def run(codes: Segment, own: Queries) -> Partial:
        scored = Scored.of(codes, sides, own, (codes.layer, *place), most)
        partial = xla.visited(scored)
        found.append(_mass(scored, partial, pages.table.shape[1]) if reading.mass else None)
        return dispatch.in_tokens_basis(bases.value, partial)

    partial = in_basis(part, bases, own, run)
    (mass,) = found
    none = jnp.zeros((*own.unit.shape[:3], pages.table.shape[1]), jnp.float32)
    return partial, none if mass is None else mass


def _mass(scored: Scored, partial: Partial, width: int) -> jax.Array:
    """Each page's part [1, 1, R, P] of a partial's sum, by columns of the row's table: the scores
    once more, against the final maximum."""
    blocks = scored.blocks
    assert isinstance(blocks, PageWalk)

    def visit(index: jax.Array, mass: jax.Array) -> jax.Array:
        scores, _ = scored.at(index)
        weights = jnp.exp(jnp.minimum(scores - partial.max[..., None], 0))
        by_page = weights.reshape(*weights.shape[:3], blocks.each, -1).sum(-1)
        return mass.at[..., blocks.columns_of(index)[0]].add(by_page)

    zero = jnp.zeros((*partial.max.shape, width), jnp.float32) + 0 * partial.sum[..., None]
    return lax.fori_loop(*blocks.turns(), visit, zero)
