"""One tier's partial attention as a GPU kernel: packed codes are read once, unpacked in registers
and never written back.

The grid is (split, kv head and chunk of queries, row). A program walks its share of the row's
blocks of slots with an online softmax. Bounds are read inside: capacity without tokens, or beyond a
window, costs nothing, and the splits share evenly what there is, so that one long sequence fills
the chip. Their partial results are merged after (`_over_splits`).

All queries of a kv head are rows of one matrix product. Queries and weights enter as two bfloat16
terms (`pallas_codes`) stacked in the rows, of which a matrix unit has 16 at least: the second term
of up to 8 queries is free. A product of two numbers is off by 2**-16 of itself at most, in bfloat16
attention by 2**-8.

The backend is Pallas-Triton. A decoding query is too few rows for Hopper's warpgroup products, the
reason to write for Mosaic GPU, and Triton pipelines the loads, unpacks in registers and runs on
every NVIDIA GPU since Ampere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxkv.kernels import pallas_turns
from jaxkv.kernels.pallas_codes import padded, side
from jaxkv.kernels.pallas_kernel import Plan, kernel
from jaxkv.kernels.triton import on_triton
from jaxkv.softmax import Partial
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment, Tier


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is cut, and what the compiler is told. The defaults are for Hopper."""

    slots: int = 64  # of a block, a power of two
    rows: int = 16  # queries of a program at most: twice as many spill registers
    programs: int = 132 * 4  # of up to four warps at once: multiprocessors times what fits on one
    num_stages: int = 3
    num_warps: int | None = None  # of a program; None: `warps`

    def warps(self, rows: int, head_dim: int, bits: int) -> int:
        """By measurement (H200, batches of 16 by 8,192 tokens): 4-bit codes take 0.9 of the time
        with four warps, 2-bit codes 0.45 to 0.8 with one; more rows or elements than 8 and 128
        would spill in fewer than twice as many."""
        few = {2: 1, 4: 4}.get(bits, 2)
        doubled = few * (2 if rows > 8 or head_dim > 128 else 1)
        return self.num_warps or min(doubled, 4)


TUNING = Tuning()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the queries may look at, R of them as the kernel's rows. Positions are the row's own,
    int32."""

    upto: jax.Array  # [B, R]: the last one that a query sees; -1 if none
    since: jax.Array | None = None  # [B, R]: the first one, but for the sinks; None: no window
    sinks: int = 0  # those below are seen whatever the window


def partial_attention(
    part: Segment,
    query: jax.Array,
    unit: jax.Array,
    limits: Limits,
    layer: Index,
    basis: Basis | None = None,
    *,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> Partial:
    """Attention of queries [B, K, R, H] float32 in multiples of unit [B, K, R, 1] over the tokens
    of one tier, as `xla.partial_attention`: a Partial [B, K, R].

    Queries are in the basis of the codes; the result is what `basis` makes of it, None: as it is.
    """
    spec, (b, k, r, h), tuning = part.spec, query.shape, tuning or TUNING
    rows = min(max(8, 1 << (r - 1).bit_length()), tuning.rows)
    chunks = pl.cdiv(r, rows)
    splits = max(1, min(tuning.programs // (b * k * chunks), pl.cdiv(spec.capacity, tuning.slots)))
    assert spec.value is not None  # `dispatch.refusal`
    windowed, layered = limits.since is not None, layer is not None
    places, pages = spec if part.pages is None else part.pages, jnp.zeros((b, 2, 1), jnp.int32)
    if part.pages is not None:
        pages = jnp.stack([part.pages.table, part.pages.first], axis=1)
    plan = Plan(
        side(spec.key, h),
        side(spec.value, h),
        places.capacity,
        places.offset,
        rows,
        block_slots(part, tuning),
        splits,
        windowed,
        layered,
        0 if part.pages is None else part.pages.size,
    )
    small = *_bounds(part, limits, layer), query, unit[..., 0], pages
    partials = _call(plan, small, part.tier, tuning, interpret)
    if not pallas_turns.refusal(h):
        return pallas_turns.merged(plan.value, basis, partials, r, interpret=interpret)
    found = Partial(
        *(
            x.reshape(b, k, chunks * rows, *x.shape[3:])[:, :, :r]
            for x in _over_splits(plan, *partials)
        )
    )
    return (
        found
        if basis is None
        else dataclasses.replace(found, out=basis.output(found.out, found.sum))
    )


def block_slots(part: Segment, tuning: Tuning = TUNING) -> int:
    """Slots of a block, a power of two: of a page, whole blocks."""
    return tuning.slots if part.pages is None else math.gcd(tuning.slots, part.pages.size)


def _bounds(part: Segment, limits: Limits, layer: Index) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, 4]: the first position that any query sees, the tier's end, the sinks' end, the layer;
    then the queries' limits."""
    base = jnp.zeros_like(part.low) if part.base is None else part.base
    upto = limits.upto - base[:, None]
    low, sinks = part.low, limits.sinks - base
    since = upto if limits.since is None else limits.since - base[:, None]
    if limits.since is not None:
        first = jnp.where(limits.upto >= 0, since, jnp.iinfo(jnp.int32).max).min(1)
        low = jnp.where(low >= sinks, jnp.maximum(low, first), low)
    number = jnp.zeros_like(low) if layer is None else jnp.full_like(low, layer)
    return jnp.stack([low, part.high, sinks, number], axis=1), upto, since


def _over_splits(
    plan: Plan, out: jax.Array, top: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merges partial results [B, K * chunks, splits, (tiles + 1,) rows(, C)], as `softmax.merge`,
    into [B, K * chunks, rows(, H)]."""
    highest = top.max(2)
    merged = (out * jnp.exp(top - highest[:, :, None])[:, :, :, None, :, None]).sum(2)
    tiles = jnp.swapaxes(merged[:, :, :-1, :, : plan.value.size], 2, 3)
    return tiles.reshape(*highest.shape, -1), highest, merged[:, :, -1, :, 0]


def _call(
    plan: Plan, small: tuple[jax.Array, ...], tier: Tier, tuning: Tuning, interpret: bool
) -> Any:
    bounds, upto, _, query, *_, pages = small
    chunks, stored = pl.cdiv(upto.shape[1], plan.rows), (tier.keys, tier.values)
    grid = plan.splits, query.shape[1] * chunks, query.shape[0]

    def result(*sizes: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        shape = (*reversed(grid[1:]), plan.splits, *sizes)
        kind = jax.ShapeDtypeStruct(
            shape, jnp.float32, manual_axis_type=jax.typeof(query).manual_axis_type
        )
        return pl.BlockSpec(
            (None, None, None, *sizes), lambda s, c, b: (b, c, s, *(0,) * len(sizes))
        ), kind

    outs = [result(plan.value.count + 1, plan.rows, padded(plan.value.size)), result(plan.rows)]
    return on_triton(
        functools.partial(kernel, plan),
        "jaxkv_partial_attention",
        tuning.warps(plan.rows, plan.key.head_dim, plan.bits),
        tuning.num_stages,
        grid=grid,
        in_specs=[
            *[
                pl.BlockSpec((None, array.shape[1]), lambda s, c, b: (b, 0))
                for array in (bounds, upto, upto)
            ],
            *[
                pl.BlockSpec(
                    (None, None, *array.shape[2:]),
                    lambda s, c, b, rest=(0,) * (array.ndim - 2): (b, c // chunks, *rest),
                )
                for array in small[3:5]
            ],
            pl.BlockSpec((None, *pages.shape[1:]), lambda s, c, b: (b, 0, 0)),
            *jax.tree.map(lambda _: pl.BlockSpec(), stored),
        ],
        out_specs=[spec for spec, _ in outs],
        out_shape=[shape for _, shape in outs],
        interpret=interpret,
    )(*small, *stored)
