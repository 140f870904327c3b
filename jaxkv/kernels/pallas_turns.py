"""What stands before and behind the walk of the GPU kernel, as one launch each: what a tier's basis
does to queries, and the merge of the splits' partial results with what it does to outputs.

XLA makes five kernels of a Hadamard transform and a reflection, of which some compute the whole
transform anew for every element, and four of the merge: 20 microseconds a layer on an H200 at one
row, twice the attention over 8,192 tokens itself. Here a program keeps its rows in registers and
runs the very functions of `Basis`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxkv.kernels.pallas_codes import Side
from jaxkv.kernels.triton import on_triton
from jaxkv.softmax import FLOOR, Partial
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.tokens import BASIS

ROWS = 16
"""Queries of a program: 2,048 elements at heads of 128."""

SPLITS = 32
"""Partial results that are merged at once."""

LEAST, MOST = 16, 256


def refusal(head_dim: int) -> str | None:
    """Why the kernels cannot take heads of this size, or None. Triton's tiles have powers of two as
    sides."""
    if head_dim & (head_dim - 1) or not LEAST <= head_dim <= MOST:
        return f"head_dim={head_dim} is no power of two from {LEAST} to {MOST}"
    return None


def query(basis: Basis, query: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`Basis.query` of queries [B, K, R, H] float32."""
    b, k, r, h = query.shape
    rows, vectors = min(1 << (r - 1).bit_length(), ROWS), _vectors(basis)
    whole = pl.BlockSpec((None, None, r, h), lambda c, k, b: (b, k, 0, 0))
    found: list[jax.Array] = on_triton(
        functools.partial(_turn, basis.fmt, tuple(vectors), rows),
        "jaxkv_turn",
        num_warps=max(1, min(8, rows * h // 256)),
        num_stages=1,
        grid=(pl.cdiv(r, rows), k, b),
        in_specs=[whole, *_of_heads(vectors, lambda c, k, b: (b, k, 0))],
        out_specs=[whole],
        out_shape=[_float32(query.shape, query)],
        interpret=interpret,
    )(query, *vectors.values())
    return found[0]


def merged(
    value: Side,
    basis: Basis | None,
    partials: tuple[jax.Array, jax.Array],
    queries: int,
    *,
    interpret: bool = False,
) -> Partial:
    """The partial results of splits, [B, K * chunks, splits, tiles + 1, rows, C] and their maxima
    [B, K * chunks, splits, rows], as one Partial [B, K, queries] turned back by the values'
    basis."""
    (b, chunks, splits, _, rows, _), h = partials[0].shape, value.head_dim
    parts = pl.cdiv(queries, rows)
    k, vectors = chunks // parts, {} if basis is None else _vectors(basis)
    specs = [
        pl.BlockSpec(
            (None, None, *x.shape[2:]),
            lambda r, k, b, rest=(0,) * (x.ndim - 2): (b, k * parts + r // rows, *rest),
        )
        for x in partials
    ]
    number = pl.BlockSpec((None, None, None), lambda r, k, b: (b, k, r))
    found = on_triton(
        functools.partial(_merge, value, basis and basis.fmt, tuple(vectors), rows, splits),
        "jaxkv_merge",
        num_warps=max(1, h // 32),
        num_stages=1,
        grid=(queries, k, b),
        in_specs=[*specs, *_of_heads(vectors, lambda r, k, b: (b, k, 0))],
        out_specs=[
            pl.BlockSpec((None, None, None, h), lambda r, k, b: (b, k, r, 0)),
            number,
            number,
        ],
        out_shape=[_float32((b, k, queries, *rest), partials[0]) for rest in ((h,), (), ())],
        interpret=interpret,
    )(*partials, *vectors.values())
    return Partial(*found)


def _vectors(basis: Basis) -> dict[str, jax.Array]:
    return {name: x for name in BASIS if (x := getattr(basis, name)) is not None}


def _of_heads(vectors: dict[str, jax.Array], place: Any) -> list[pl.BlockSpec]:
    return [pl.BlockSpec((None, 1, x.shape[-1]), place) for x in vectors.values()]


def _float32(shape: tuple[int, ...], like: jax.Array) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=kind)


def _basis(fmt: Any, names: tuple[str, ...], refs: tuple[Any, ...]) -> Basis:
    return Basis(fmt, **{name: ref[...][None] for name, ref in zip(names, refs, strict=True)})


def _turn(fmt: Any, names: tuple[str, ...], rows: int, query: Any, *refs: Any) -> None:
    out = refs[-1]
    row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    place = row[:, None], jnp.arange(out.shape[-1], dtype=jnp.int32)[None]
    keep = jnp.broadcast_to((row < out.shape[0])[:, None], (rows, out.shape[-1]))
    given = plgpu.load(query.at[place], mask=keep, other=0.0)
    turned = _basis(fmt, names, refs[:-1]).query(given[None, None])
    plgpu.store(out.at[place], turned.reshape(given.shape), mask=keep)


def _merge(
    value: Side,
    fmt: Any,
    names: tuple[str, ...],
    rows: int,
    splits: int,
    partial: Any,
    tops: Any,
    *refs: Any,
) -> None:
    """One query's partial results."""
    out_ref, top_ref, total_ref = refs[-3:]
    row, element = pl.program_id(0) % rows, jnp.arange(value.head_dim, dtype=jnp.int32)
    tile, column = (element // value.size)[None], (element % value.size)[None]
    step = min(SPLITS, 1 << (splits - 1).bit_length())

    def visit(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = carry
        split = turn * step + jnp.arange(step, dtype=jnp.int32)
        inside = split < splits
        found = plgpu.load(tops.at[split, row], mask=inside, other=FLOOR)
        highest = jnp.maximum(top, found.max())
        weight, decay = jnp.where(inside, jnp.exp(found - highest), 0.0), jnp.exp(top - highest)
        keep = jnp.broadcast_to(inside[:, None], (step, value.head_dim))
        outs = plgpu.load(partial.at[split[:, None], tile, row, column], mask=keep, other=0.0)
        sums = plgpu.load(partial.at[split, value.count, row, 0], mask=inside, other=0.0)
        new = (weight[:, None] * outs).sum(0), highest, (weight * sums).sum()
        return out * decay + new[0], highest, total * decay + new[2]

    none = jnp.zeros((value.head_dim,), jnp.float32), jnp.float32(FLOOR), jnp.float32(0)
    out, top, total = lax.fori_loop(0, pl.cdiv(splits, step), visit, none)
    if fmt is not None:
        turned = _basis(fmt, names, refs[:-3]).output(
            out[None, None, None], total[None, None, None]
        )
        out = turned.reshape(out.shape)
    out_ref[...], top_ref[...], total_ref[...] = out, top, total
