"""Attention of many queries on CPUs: of one row and kv head at a time, a tile of queries over
blocks of slots, all in the L2 cache (FlashAttention; Dao et al. 2022).

For a token's few queries unpacked codes are dotted as they are (`xla`). A prompt has hundreds of
queries for every block, so the block is dequantized to float32 once for all of them, and the two
products are plain matrices, which XLA:CPU computes at full speed on all cores. Blocks that no query
of the tile may see are not visited.

Queries of bfloat16 over tokens of bfloat16 are multiplied as such where the CPU has units for it:
scores are those of float32, as a product of two bfloat16 is exact in it; weights are rounded to
bfloat16 before they meet the values, as outputs are. With AMX 2,048 tokens take 240 ms so, 410 in
float32 (32 query heads, 8 kv heads of 128, Q4).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import codec, platform
from jaxkv.formats import Format, Precision
from jaxkv.kernels.blocks import Blocks
from jaxkv.kernels.queries import Queries
from jaxkv.kernels.walk import walk
from jaxkv.softmax import Partial, bounded, empty
from jaxkv.tiers import tokens
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import SCALES, Tokens

ROWS, SLOTS = 1024, 256
"""Queries of a tile and slots of a block: a megabyte of scores. 2,048 tokens of 32 heads of 128
take 124 ms so (torch 229), 160 with half the queries, 290 with a quarter of them."""

Sides = tuple[Blocks, ...]

LEAST = 256
"""Queries that share a kv head from which on this is the faster way."""


def sides(part: Segment) -> Sides:
    """Keys and values to be read block by block; made outside of all loops (see `Blocks`)."""
    return tuple(
        Blocks.of(held, fmt) for held, fmt in zip(part.tier.sides, part.spec.formats, strict=True)
    )


def partial_attention(
    part: Segment,
    sides: Sides,
    own: Queries,
    row: jax.Array,
    head: jax.Array,
) -> Partial:
    """`xla.partial_attention` of the queries [1, 1, R, H] of one row and kv head, of which only the
    tier still has the others."""
    query, (oldest, newest) = own.folded, own.reach
    all_bfloat16 = own.is_bfloat16 and {side.fmt for side in sides} == {Precision.BF16}
    read = as_bfloat16 if all_bfloat16 and platform.multiplies_bfloat16() else decoded
    oldest = oldest if part.base is None else oldest - part.base
    blocks = walk(
        dataclasses.replace(part, low=jnp.maximum(part.low, oldest)), newest, block_size(part)
    )
    own = own.by_blocks(blocks.size)

    def visit(index: jax.Array, carry: Partial) -> Partial:
        position, valid = blocks.look(index)
        seen = own.see(part, position) & valid[:, None]  # [1, T, S]
        found = [
            read(blocks.cut(side, index, part.layer, row, head), side.fmt, blocks.size)
            for side in sides
        ]
        keys, values = found[0], found[-1]  # of the keys where values are a part of them
        scores = bounded(_dot(query[0, 0].astype(keys.dtype), keys, 1) * own.unit[0, 0])
        scores = scores.reshape(1, 1, -1, *seen.shape[1:])  # [1, 1, G, T, S]
        if own.changes_scores:
            scores = own.adjust(scores, part.absolute(position))
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf).reshape(-1, blocks.size)
        top = jnp.maximum(carry.max, scores.max(-1))
        weights, decay = jnp.exp(scores - top[:, None]), jnp.exp(carry.max - top)
        values = jnp.where(valid[0, :, None], values, 0)  # empty slots may hold anything
        out = carry.out * decay[:, None] + _dot(weights.astype(values.dtype), values, 0)
        return Partial(out, top, carry.sum * decay + weights.sum(-1))

    head_dim = query.shape[-1]  # also of values that are a part of the keys
    width = head_dim if len(sides) == 1 else part.spec.value_dim or head_dim
    none = jax.tree.map(lambda x: x[0, 0], nothing(query, part, width))
    if part.pages is None and part.spec.capacity <= blocks.size:
        found = visit(jnp.int32(0), none)
    else:
        found = lax.fori_loop(*blocks.turns(), visit, none)
    return Partial(found.out[None, None], found.max[None, None], found.sum[None, None])


def nothing(query: jax.Array, part: Segment, width: int) -> Partial:
    """The partial of no tokens, [1, 1, R, width], for queries [1, 1, R, H]. Made of both operands,
    as under shard_map a loop's carry must vary over the mesh from the start."""
    zero = jnp.where((query[..., 0] > 0) & (part.low[0] < 0) & False, 1.0, 0.0)
    none = empty(query.shape[:3], width)
    return Partial(none.out + zero[..., None], none.max + zero, none.sum + zero)


def block_size(part: Segment) -> int:
    unit = max(part.spec.group, 1)
    return min(part.spec.capacity, -(-SLOTS // unit) * unit)


def decoded(block: Tokens, fmt: Format, size: int) -> jax.Array:
    """A block of one head's slots, `data` [1, 1, S * W], as float32 [S, H] in its tier's basis."""
    data = block.data.reshape(1, size, 1, -1)
    if isinstance(fmt, Precision):
        return tokens.floats(data)[0, :, 0]
    scales = {name: x for name in SCALES if (x := getattr(block, name)) is not None}
    turned = {
        name: jnp.moveaxis(x, -2 if fmt.axis == "channel" else -1, 1) for name, x in scales.items()
    }
    return codec.dequantize(fmt, codec.Quantized(data, **{**dict.fromkeys(SCALES), **turned}))[
        0, :, 0
    ]


def as_bfloat16(block: Tokens, fmt: Format, size: int) -> jax.Array:
    """`decoded` of a bfloat16 tier, as it lies."""
    return lax.bitcast_convert_type(block.data.reshape(size, -1), jnp.bfloat16)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
