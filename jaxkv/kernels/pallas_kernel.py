"""The body of the GPU kernel: one program's walk over blocks of slots. R rows (queries), S slots of a block, C elements of a tile."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxkv.kernels.pallas_codes import Block, Refs, Side, padded, two_terms
from jaxkv.softmax import FLOOR


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

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.capacity, self.slots)


def kernel(plan: Plan, bounds: Any, upto: Any, since: Any, query: Any, sums: Any, keys: Refs, values: Refs, *outs: Any) -> None:
    chunks = pl.num_programs(1) // keys.data.shape[-3]
    place = (*((bounds[4],) if plan.layered else ()), pl.program_id(2), pl.program_id(1) // chunks)
    queries = [query[tile] for tile in range(plan.key.count)], [sums[index] for index in range(len(plan.key.kinds))]
    limits = upto[...], since[...] if plan.windowed else None, bounds[3]

    def visit(step: jax.Array, carry: Any) -> Any:
        block, position = _block(plan, bounds, place, step)
        assert block.valid is not None
        seen = block.valid[None] & _seen(limits, position)
        scores = _scores(plan.key, *queries, keys, dataclasses.replace(block, valid=None))
        return _accumulate(plan.value, jnp.where(seen, scores, -jnp.inf), carry, values, block)

    by_slot = jnp.zeros((plan.rows, plan.slots))
    tiles = [jnp.zeros((plan.rows, padded(plan.value.size)))] * plan.value.count
    zeros = jnp.full((plan.rows,), FLOOR), by_slot, [by_slot] * len(plan.value.kinds), tiles
    start, stop = steps(plan, bounds[0], bounds[1], pl.program_id(0))
    _finish(plan.value, lax.fori_loop(start, stop, visit, zeros), *outs)


def steps(plan: Plan, low: jax.Array, stop: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A split's share of the blocks that hold positions [low, stop), counted around the ring from the one that holds `low`."""
    first, last = (low - plan.offset) % plan.capacity, (stop - 1 - plan.offset) % plan.capacity
    blocks = last // plan.slots - first // plan.slots + 1
    blocks = jnp.minimum(jnp.where(first <= last, blocks, blocks + plan.blocks), plan.blocks)
    blocks = jnp.where(low < stop, blocks, 0)
    share = (blocks + plan.splits - 1) // plan.splits
    start = jnp.minimum(split * share, blocks)
    return start, jnp.minimum(start + share, blocks)


def _block(plan: Plan, bounds: Any, place: Any, step: jax.Array) -> tuple[Block, jax.Array]:
    """The block of a step, and the positions in its slots: `ring.position_of` with one division for all slots."""
    low, stop, end = bounds[0], bounds[1], bounds[2]
    index = (low - plan.offset) % plan.capacity // plan.slots + step
    slot = jnp.where(index < plan.blocks, index, index - plan.blocks) * plan.slots + jnp.arange(plan.slots, dtype=jnp.int32)
    newest = (end - 1 - plan.offset) % plan.capacity
    position = slot + (end - 1 - newest) - jnp.where(slot > newest, plan.capacity, 0)
    valid = (position >= low) & (position < stop)
    inside = None if plan.capacity % plan.slots == 0 else slot < plan.capacity
    return Block(place, slot, inside, valid if inside is None else valid & inside), position


def _seen(limits: Any, position: jax.Array) -> jax.Array:
    upto, since, sinks = limits
    seen = position[None] <= upto[:, None]
    return seen if since is None else seen & ((position[None] >= since[:, None]) | (position < sinks)[None])


def _scores(key: Side, queries: list[jax.Array], sums: list[jax.Array], refs: Refs, block: Block) -> jax.Array:
    operands, parts = key.operands(refs, block), []
    for group, tiles in key.groups.items():
        found = _joined(_sum([_dot(queries[tile], term, 1) for tile in tiles for term in operands[tile]]))
        scale = key.scale(refs, block, group)
        parts.append(found if scale is None else found * scale[None])
    return _sum([*parts, *(key.offset(refs, block, kind)[None] * x[:, None] for kind, x in zip(key.kinds, sums, strict=True))])


def _accumulate(value: Side, scores: jax.Array, carry: Any, refs: Refs, block: Block) -> Any:
    """A step of the online softmax. What needs no matrix product is summed slot by slot and joined at the end: no reductions here."""
    top, total, shifts, outs = carry
    new_top = jnp.maximum(top, scores.max(1))
    weights, decay = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)[:, None]
    operands, new = value.operands(refs, block), list(outs)
    for group, tiles in value.groups.items():
        scale = value.scale(refs, block, group)
        rows = _stacked(two_terms(weights if scale is None else weights * scale[None]))
        for tile in tiles:
            new[tile] = outs[tile] * decay + _joined(_sum([_dot(rows, term, 0) for term in operands[tile]]))
    shifts = [x * decay + weights * value.offset(refs, block, kind)[None] for kind, x in zip(value.kinds, shifts, strict=True)]
    return new_top, total * decay + weights, shifts, new


def _finish(value: Side, carry: Any, out_ref: Any, top_ref: Any, total_ref: Any) -> None:
    top, total, shifts, outs = carry
    by_kind = {kind: x.sum(1)[:, None] for kind, x in zip(value.kinds, shifts, strict=True)}
    for tile, out in enumerate(outs):
        out_ref[tile] = out * value.weight(tile) + by_kind.get(value.kind(tile), 0.0)
    top_ref[...], total_ref[...] = top * math.log(2), total.sum(1)


def _sum(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)


def _stacked(terms: list[jax.Array]) -> jax.Array:
    """Two terms [R, X] as the rows [2 R, X] of one operand."""
    return jnp.transpose(jnp.stack(terms, axis=-1), (2, 0, 1)).reshape(-1, terms[0].shape[1])


def _joined(products: jax.Array) -> jax.Array:
    """The products [2 R, X] of such an operand, summed over its terms: [R, X]."""
    return products.reshape(2, -1, products.shape[1]).sum(0)
