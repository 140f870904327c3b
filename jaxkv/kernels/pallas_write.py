"""A quantizing write as one GPU kernel: tokens are turned, quantized, packed and stored in the
slots of their tier.

XLA makes some thirty kernels of this, since every reduction over a group ends one; a step that
moves one token is then all launches. Here a program takes one token (and one head, where scales are
a head's own), and its groups stay in registers. It runs the very functions of `codec`, which give
the same bits in every program, but for the last bit of Triton's divisions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxkv import codec
from jaxkv.formats import Format, QuantSpec
from jaxkv.kernels.triton import on_triton
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.place import Index, Run
from jaxkv.tiers.tokens import BASIS, SCALES, Tokens, basis_of

MOST_ELEMENTS = 4096  # of a program
STORED = ("data", *SCALES)


def refusal(fmt: Format, heads: int, head_dim: int) -> str | None:
    """Why the kernel cannot write a format, or None. Triton's tiles have powers of two as sides."""
    if not isinstance(fmt, QuantSpec) or fmt.axis == "channel":
        return f"it quantizes tokens one by one, not {fmt}"
    if fmt.bits == 3:
        return "it packs codes of 8, 4 or 2 bits, not of 3"
    together = heads if _spans_heads(fmt, head_dim) else 1
    if (
        head_dim % 8
        or head_dim & (head_dim - 1)
        or together & (together - 1)
        or together * head_dim > MOST_ELEMENTS
    ):
        return (
            f"{together} heads of {head_dim} together are no powers of two of at least 8, "
            f"or more than {MOST_ELEMENTS} elements"
        )
    return None


def _spans_heads(spec: QuantSpec, head_dim: int) -> bool:
    return spec.two_level or (spec.group_size or 0) > head_dim


def write(
    held: Tokens,
    fmt: QuantSpec,
    new: jax.Array,
    run: Run,
    layer: Index,
    *,
    interpret: bool = False,
) -> Tokens:
    """`tokens.write` of tokens [B, T, K, H] that are still to be quantized. What is not to be
    written is masked."""
    (b, t, heads, h), basis = new.shape, basis_of(held, fmt, layer)
    together = heads if _spans_heads(fmt, h) else 1
    names = [name for name in STORED if getattr(held, name) is not None]
    stored = [getattr(held, name) for name in names]
    turns = {name: array for name in BASIS if (array := getattr(basis, name)) is not None}
    where = jnp.concatenate(
        [
            jnp.where(run.written, run.slots, run.capacity).reshape(-1),
            jnp.zeros((1,), jnp.int32) if layer is None else jnp.full((1,), layer, jnp.int32),
        ]
    )
    whole = pl.BlockSpec()
    small = [
        pl.BlockSpec((where.size,), lambda i, k, r: (0,)),
        pl.BlockSpec((None, None, together, h), lambda i, k, r: (r, i, k, 0)),
    ]
    small += [pl.BlockSpec((None, together, h), lambda i, k, r: (r, k, 0))] * len(turns)
    written = on_triton(
        functools.partial(_kernel, fmt, names, tuple(turns), layer is not None),
        "jaxkv_quantizing_write",
        num_warps=max(1, min(8, together * h // 128)),
        num_stages=1,
        grid=(t, heads // together, b),
        in_specs=[*small, *[whole] * len(stored)],
        out_specs=[whole] * len(stored),
        out_shape=[
            jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=jax.typeof(a).manual_axis_type)
            for a in stored
        ],
        input_output_aliases={len(small) + index: index for index in range(len(stored))},
        interpret=interpret,
    )(where, new, *turns.values(), *stored)
    return dataclasses.replace(held, **dict(zip(names, written, strict=True)))


def _kernel(
    spec: QuantSpec,
    names: list[str],
    turns: tuple[str, ...],
    layered: bool,
    where: Any,
    new: Any,
    *refs: Any,
) -> None:
    vectors, outs = refs[: len(turns)], dict(zip(names, refs[-len(names) :], strict=True))
    index, part, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slot = where[row * pl.num_programs(0) + index]
    lead = (where[pl.num_programs(0) * pl.num_programs(2)], row) if layered else (row,)
    basis = Basis(spec, **{name: ref[...][None] for name, ref in zip(turns, vectors, strict=True)})
    quantized = codec.quantize(spec, basis.enter(new[...].astype(jnp.float32)[None, None]))
    for name, ref in outs.items():
        _store(
            ref,
            lead,
            part * new.shape[0],
            slot,
            quantized.codes if name == "data" else getattr(quantized, name),
            name == "data",
        )


def _store(
    ref: Any,
    lead: tuple[Any, ...],
    first_head: jax.Array,
    slot: jax.Array,
    new: jax.Array,
    is_data: bool,
) -> None:
    """Writes [1, 1, heads, X] to a slot of [..., heads, slots, W] or of [..., heads, groups,
    slots]."""
    new = new.reshape(new.shape[2:])
    head = first_head + jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    elements = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    capacity = ref.shape[-2] if is_data else ref.shape[-1]
    place = (*lead, head, slot, elements) if is_data else (*lead, head, elements, slot)
    plgpu.store(ref.at[place], new, mask=jnp.broadcast_to(slot < capacity, new.shape))
