"""One tier's partial attention in plain XLA, for every platform: blocks of slots, each unpacked in
cache and merged online.

A block is read where it lies, unpacked to int8 and dotted with the query's digits (`formats`,
`digits`); scales multiply scores and probabilities, never codes. Nothing is written that grows with
the tier. The loop visits the blocks that hold tokens, so cost follows the tokens held, not the
capacity. On CPUs the rows of a large batch come one after the other, each with a loop of its own
length and with blocks that are large enough: 8 ragged rows take half the time that they take
together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform
from jaxkv.chain import LANES
from jaxkv.formats import QuantSpec
from jaxkv.kernels.blocks import Blocks
from jaxkv.kernels.materialized import computed_once
from jaxkv.kernels.queries import Queries
from jaxkv.kernels.readers import Reader, reader
from jaxkv.kernels.walk import Walk, walk
from jaxkv.softmax import FLOOR, Partial, bounded
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment

TILE_BYTES, SCORES, SLOTS = 2**17, 7 * 2**11, (64, 256)
"""A block has at most so many bytes of codes and so many scores; fewer slots are not worth a
block's fixed cost (the second: for scores).

XLA:CPU splits an operation on more of them between its threads, which costs more in wake-ups and in
caches than it gains: at 16k tokens a program that stays on one core takes 6 ms, one whose every
operation uses two takes 8.
"""

TILED = 2**22, 2**18
"""The bytes and the scores of a block in tiled memory: what is unpacked of it stays on the chip."""

LAUNCHED = 2**24, 2**22
"""The bytes and the scores of a block elsewhere: each of two dozen operations is a launch, each
turn of the loop a wait."""


def partial_attention(part: Segment, own: Queries) -> Partial:
    """Attention of queries in the basis of one tier over its tokens: a Partial [B, K, R] in that of
    its values."""
    query = own.folded
    # Outside the loop over rows: XLA:CPU copies an array [B, 1, S, W] that is carried around a
    # loop.
    sides = tuple(
        Blocks.of(held, fmt) for held, fmt in zip(part.tier.sides, part.spec.formats, strict=True)
    )
    is_large = (
        min(TILE_BYTES // _slot_bytes(part, query), SCORES * query.shape[-1] // query.size)
        < SLOTS[1]
    )
    apart = is_large or part.pages is not None  # rows of a pool never lie side by side
    if query.shape[0] == 1 or not (apart and platform.visits_rows()):
        return visited(Scored.of(part, sides, own, (part.layer, None, None)))

    def of_row(row: jax.Array) -> Partial:
        """In which only the tier still has the other rows."""
        found = visited(Scored.of(part.row(row), sides, own.row(row), (part.layer, row, None)))
        return jax.tree.map(lambda x: x.squeeze(0), found)

    found: Partial = lax.map(of_row, jnp.arange(query.shape[0], dtype=jnp.int32))
    return found


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of some queries, block by block."""

    part: Segment
    sides: tuple[Blocks, ...]  # keys, and values unless a part of them
    blocks: Walk
    key: Reader
    operand: Any  # of `key`: the queries
    own: Queries
    never: jax.Array
    place: tuple[Index, Index, Index]  # layer, row and head, None where all are meant

    @classmethod
    def of(
        cls,
        part: Segment,
        sides: tuple[Blocks, ...],
        own: Queries,
        place: tuple[Index, Index, Index],
        most: int | None = None,
    ) -> Scored:
        """Of blocks of at most `most` slots, if that is given."""
        size = _block_size(part, own.folded)
        blocks = walk(part, own.reach[1], size if most is None else min(size, most))
        # The compiler sees through `< 0` where positions are a maximum with 0.
        never = part.high[0] == -1
        key = reader(part.spec.key, own.folded.shape[-1], never)
        own = own.by_blocks(blocks.size)
        return cls(part, sides, blocks, key, key.query(own.folded), own, never, place)

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The scores [B, K, R, S] of block `index`, -inf where hidden, and which of its tokens
        anyone looks at, [B, S] bool."""
        own, (position, valid) = self.own, self.blocks.look(index)
        seen = own.see(self.part, position) & valid[:, None]
        block = self.blocks.cut(self.sides[0], index, *self.place)
        scores = bounded(self.key.scores(self.operand, block) * own.unit)
        by_query = scores.reshape(*scores.shape[:2], -1, *seen.shape[1:])  # [B, K, G, T, S]
        if own.changes_scores:
            by_query = own.adjust(by_query, self.part.absolute(position))
        by_query = jnp.where(seen[:, None, None], by_query, -jnp.inf)
        return computed_once(self.never, by_query.reshape(scores.shape)), valid & seen.any(1)


def visited(scored: Scored) -> Partial:
    """Attention over all blocks."""
    part, spec, blocks = scored.part, scored.part.spec, scored.blocks
    query = scored.own.folded
    # Where values are a part of the keys, the keys' codes serve both products.
    value, values = scored.key, scored.sides[-1]
    if spec.value is not None:
        value = reader(spec.value, spec.value_dim or query.shape[-1], scored.never)

    def visit(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        top, total = carry
        scores, looked_at = scored.at(index)
        new_top = jnp.maximum(top, scores.max(-1))
        # Never above 1, also where a platform computes a score twice with other rounding: its
        # digits would start again at 0.
        weights, decay = (
            jnp.exp(jnp.minimum(scores - new_top[..., None], 0)),
            jnp.exp(top - new_top)[..., None],
        )
        more = value.weigh(weights, blocks.cut(values, index, *scored.place), looked_at)
        return new_top, jax.tree.map(lambda old, new: old * decay + new, total, more)

    # Under shard_map a loop's carry must start out as varying over the mesh as it will become:
    # zeros made of the operands do. None made by a product: a query may be NaN.
    zero = jnp.where((query[..., 0] > 0) & (part.low[:, None, None] > 0), 0.0, 0.0)
    carry = FLOOR + zero, jax.tree.map(lambda x: x + zero[..., None], value.zeros(query.shape[:3]))
    if part.pages is None and spec.capacity <= blocks.size:
        carry = visit(jnp.int32(0), carry)
    else:
        carry = lax.fori_loop(*blocks.turns(), visit, carry)
    out, total = value.finish(carry[1])
    return Partial(out, carry[0], total)


def _block_size(part: Segment, query: jax.Array) -> int:
    """Slots per block, whole groups of tokens."""
    rows, tile = query.size // query.shape[-1], _slot_bytes(part, query)
    key = part.spec.key
    of_parts = (
        SCORES // 2 if isinstance(key, QuantSpec) and key.bits == 2 else SCORES
    )  # a sum of four products is split sooner
    on_cpu, is_tiled = platform.name() == "cpu", platform.is_tiled()
    bytes_, scores = TILED if is_tiled else (TILE_BYTES, of_parts) if on_cpu else LAUNCHED
    most = max(SLOTS[0], min(bytes_ // tile, max(SLOTS[1], scores // rows)))
    # No more blocks than that makes, and all alike: the last one looks at slots again where it is
    # not full (a fifth of the time at 2,000).
    capacity, unit = part.spec.capacity, part.spec.group if part.spec.group > 1 else 32
    unit = math.lcm(unit, LANES) if is_tiled else unit
    even = -(-capacity // -(-capacity // most))
    return min(capacity, -(-even // unit) * unit)


def _slot_bytes(part: Segment, query: jax.Array) -> int:
    """Of the keys' codes, for all rows and heads of the queries."""
    data = part.tier.keys.data
    return int(query.shape[0] * query.shape[1] * data.shape[-1] * data.dtype.itemsize)
