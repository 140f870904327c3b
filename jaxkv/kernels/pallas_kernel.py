"""The body of the GPU kernel: one program's walk over blocks of slots. R rows (queries), S slots of
a block, C elements of a tile."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxkv.kernels.pallas_codes import Block, Refs, Side, padded, two_terms
from jaxkv.softmax import FLOOR, bounded


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of a call."""

    key: Side
    value: Side
    capacity: int
    offset: int
    rows: int  # of a program, a power of two
    slots: int
    splits: int
    windowed: bool
    layered: bool
    page: int = 0  # slots of a page, whole blocks; 0: the slots are a ring of the row's own

    @property
    def bits(self) -> int:
        """Of the narrower side's elements."""
        return min(side.bits for side in (self.key, self.value))

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.capacity, self.slots)


def kernel(
    plan: Plan,
    bounds: Any,
    upto: Any,
    since: Any,
    query: Any,
    unit: Any,
    pages: Any,
    keys: Refs,
    values: Refs,
    *outs: Any,
) -> None:
    chunks = pl.cdiv(query.shape[0], plan.rows)
    place = (*((bounds[3],) if plan.layered else ()), pl.program_id(2), pl.program_id(1) // chunks)
    rows = pl.program_id(1) % chunks * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)
    queries = _queries(plan.key, query, rows)
    units = _of_rows(unit, rows, 0.0) * math.log2(math.e)  # the weights are powers of 2
    limits = _of_rows(upto, rows), _of_rows(since, rows) if plan.windowed else None, bounds[2]
    span = bounds[0], jnp.minimum(bounds[1], limits[0].max() + 1), bounds[1]

    def visit(step: jax.Array, carry: Any) -> Any:
        block, position = _block(plan, span, place, pages, step)
        assert block.valid is not None
        seen = block.valid[None] & _seen(limits, position)
        scores = _scores(plan.key, *queries, keys, dataclasses.replace(block, valid=None))
        scores = bounded(scores * units[:, None])
        return _accumulate(plan.value, jnp.where(seen, scores, -jnp.inf), carry, values, block)

    by_slot = jnp.zeros((plan.rows, plan.slots), jnp.float32)
    tiles = [jnp.zeros((plan.rows, padded(plan.value.size)), jnp.float32)] * plan.value.count
    zeros = (
        jnp.full((plan.rows,), FLOOR, jnp.float32),
        by_slot,
        [by_slot] * len(plan.value.kinds),
        tiles,
    )
    start, stop = steps(plan, *span[:2], pl.program_id(0))
    _finish(plan.value, lax.fori_loop(start, stop, visit, zeros), *outs)


def _of_rows(ref: Any, rows: jax.Array, other: float = -1) -> jax.Array:
    return plgpu.load(ref.at[rows], mask=rows < ref.shape[0], other=other)


def _queries(key: Side, query: Any, rows: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Some rows of the queries [..., H] as an operand of every tile, and their sums [R] for every
    kind of offset."""
    columns, row = jnp.arange(padded(key.size), dtype=jnp.int32)[None], rows[:, None]
    keep = (columns < key.size) & (row < query.shape[0])
    tiles = [
        plgpu.load(query.at[row, tile * key.size + columns], mask=keep, other=0.0)
        for tile in range(key.count)
    ]
    sums = [
        _sum([x.sum(1) for tile, x in enumerate(tiles) if key.kind(tile) == kind])
        for kind in key.kinds
    ]
    return [_stacked(two_terms(x * key.weight(tile))) for tile, x in enumerate(tiles)], sums


def steps(
    plan: Plan, low: jax.Array, stop: jax.Array, split: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A split's share of the blocks that hold positions [low, stop), counted around the ring from
    the one that holds `low`."""
    first, last = (low - plan.offset) % plan.capacity, (stop - 1 - plan.offset) % plan.capacity
    blocks = last // plan.slots - first // plan.slots + 1
    blocks = jnp.minimum(jnp.where(first <= last, blocks, blocks + plan.blocks), plan.blocks)
    blocks = jnp.where(low < stop, blocks, 0)
    share = (blocks + plan.splits - 1) // plan.splits
    start = jnp.minimum(split * share, blocks)
    return start, jnp.minimum(start + share, blocks)


def _block(
    plan: Plan, span: Any, place: Any, pages: Any, step: jax.Array
) -> tuple[Block, jax.Array]:
    """The block of a step, and the positions in its slots: `ring.position_of` with one division for
    all slots. In a pool, `pages` [2, P] are the row's, and the positions at which they start."""
    low, stop, end = span
    index = (low - plan.offset) % plan.capacity // plan.slots + step
    first = jnp.where(index < plan.blocks, index, index - plan.blocks) * plan.slots
    slot = first + jnp.arange(plan.slots, dtype=jnp.int32)
    newest = (end - 1 - plan.offset) % plan.capacity
    position = slot + (end - 1 - newest) - jnp.where(slot > newest, plan.capacity, 0)
    valid = (position >= low) & (position < stop)
    if plan.page:
        column = first // plan.page
        page, start = pages[0, column], pages[1, column]
        slot = slot - column * plan.page
        valid &= position - slot == start  # or the page was never taken, or let go
        place = (*place[:-2], jnp.maximum(page, 0), place[-1])
        return Block(place, slot, None, valid), position
    inside = None if plan.capacity % plan.slots == 0 else slot < plan.capacity
    return Block(place, slot, inside, valid if inside is None else valid & inside), position


def _seen(limits: Any, position: jax.Array) -> jax.Array:
    upto, since, sinks = limits
    seen = position[None] <= upto[:, None]
    return (
        seen
        if since is None
        else seen & ((position[None] >= since[:, None]) | (position < sinks)[None])
    )


def _scores(
    key: Side, queries: list[jax.Array], sums: list[jax.Array], refs: Refs, block: Block
) -> jax.Array:
    operands, parts = key.operands(refs, block), []
    for group, tiles in key.groups.items():
        found = _joined(
            _sum([_dot(queries[tile], term, 1) for tile in tiles for term in operands[tile]])
        )
        scale = key.scale(refs, block, group)
        parts.append(found if scale is None else found * scale[None])
    return _sum(
        [
            *parts,
            *(
                key.offset(refs, block, kind)[None] * x[:, None]
                for kind, x in zip(key.kinds, sums, strict=True)
            ),
        ]
    )


def _accumulate(value: Side, scores: jax.Array, carry: Any, refs: Refs, block: Block) -> Any:
    """A step of the online softmax. What needs no matrix product is summed slot by slot and joined
    at the end: no reductions here."""
    top, total, shifts, outs = carry
    new_top = jnp.maximum(top, scores.max(1))
    weights, decay = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)[:, None]
    operands, new = value.operands(refs, block), list(outs)
    for group, tiles in value.groups.items():
        scale = value.scale(refs, block, group)
        rows = _stacked(two_terms(weights if scale is None else weights * scale[None]))
        for tile in tiles:
            new[tile] = outs[tile] * decay + _joined(
                _sum([_dot(rows, term, 0) for term in operands[tile]])
            )
    shifts = [
        x * decay + weights * value.offset(refs, block, kind)[None]
        for kind, x in zip(value.kinds, shifts, strict=True)
    ]
    return new_top, total * decay + weights, shifts, new


def _finish(value: Side, carry: Any, out_ref: Any, top_ref: Any) -> None:
    """Stores the partial result; the sum of weights as one more tile, so that one pass merges
    all."""
    top, total, shifts, outs = carry
    by_kind = {kind: x.sum(1)[:, None] for kind, x in zip(value.kinds, shifts, strict=True)}
    for tile, out in enumerate(outs):
        out_ref[tile] = out * value.weight(tile) + by_kind.get(value.kind(tile), 0.0)
    out_ref[value.count] = jnp.broadcast_to(total.sum(1)[:, None], out_ref.shape[1:])
    top_ref[...] = jnp.where(top > FLOOR, top * math.log(2), FLOOR)


def _sum(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    return lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
    )


def _stacked(terms: list[jax.Array]) -> jax.Array:
    """Two terms [R, X] as the rows [2 R, X] of one operand."""
    return jnp.transpose(jnp.stack(terms, axis=-1), (2, 0, 1)).reshape(-1, terms[0].shape[1])


def _joined(products: jax.Array) -> jax.Array:
    """The products [2 R, X] of such an operand, summed over its terms: [R, X]."""
    return products.reshape(2, -1, products.shape[1]).sum(0)
