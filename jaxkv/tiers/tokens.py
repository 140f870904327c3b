"""The keys or the values of one tier: arrays in the layout that attention reads, written and read
by slot.

Layout (B rows, K kv heads, S slots, H head dim; [L, ...] in front where a state holds several
layers):

    float tiers      data [B, K, S, H]; bfloat16 as its int16 bits
    quantized tiers  data [B, K, S, W] int8 words (`codec.pack`), W = ceil(H * bits / 8)
                     scale, zero_point: token axis [B, K or 1, H // group, S]; channel axis
                     [B, K, S // group, H]; uint16 (`codec.scales`) and float16, or uint8 and int8
                     in units of scale_unit, zero_unit [B, 1, 1, S] uint16 (two-level)
                     mean, mirror [B, K, H] float32 where the spec centres or aligns

XLA:CPU widens a scatter or a loop's slices of bfloat16, and with them the whole buffer, to float32
(40 ms an append at 16k tokens); integers stay as they are.

Head-major because a block of one head's tokens is then one contiguous read: on CPU the token-major
[B, S, K, W] was six times as slow. Scales have their slots last, as the scores that they multiply.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import codec
from jaxkv.codec import arithmetic, rotation
from jaxkv.formats import LARGEST_FP16, Format, Precision, QuantSpec, channel_group
from jaxkv.tiers.basis import Basis
from jaxkv.trees import node

Index = Any  # a layer: int, traced int32 scalar, or None where the state has no layer axis


@node
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Keys or values of one tier; see the module for the layout. None where the format has no such
    array."""

    data: jax.Array
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    mean: jax.Array | None = None
    mirror: jax.Array | None = None
    scale_unit: jax.Array | None = None
    zero_unit: jax.Array | None = None


def shapes(fmt: Format, heads: int, capacity: int, head_dim: int) -> Tokens:
    """Shapes and dtypes of one row's tokens in a tier, as `jax.ShapeDtypeStruct`s."""
    if isinstance(fmt, Precision):
        return Tokens(
            _array(
                (heads, capacity, head_dim), "int16" if fmt is Precision.BF16 else fmt.dtype_name
            )
        )
    data = _array((heads, capacity, -(-head_dim // fmt.codes_per_byte)), jnp.int8)
    shape, unit = (
        _scale_shape(fmt, heads, capacity, head_dim),
        _array((1, 1, capacity), codec.SCALE_DTYPE),
    )
    kinds = (jnp.uint8, jnp.int8) if fmt.two_level else (codec.SCALE_DTYPE, codec.ZERO_DTYPE)
    scale, zero_point = (_array(shape, kind) for kind in kinds)
    units = (unit, unit) if fmt.two_level else (None, None)
    row = _array((heads, head_dim), jnp.float32)
    return Tokens(
        data,
        scale,
        None if fmt.symmetric else zero_point,
        row if fmt.center else None,
        row if fmt.align else None,
        *units,
    )


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def allocate(
    fmt: Format, lead: tuple[int, ...], heads: int, capacity: int, head_dim: int
) -> Tokens:
    """Empty tokens; `lead` is (B,) or (L, B)."""
    return jax.tree.map(
        lambda a: jnp.zeros((*lead, *a.shape), a.dtype), shapes(fmt, heads, capacity, head_dim)
    )


def _scale_shape(spec: QuantSpec, heads: int, capacity: int, head_dim: int) -> tuple[int, int, int]:
    group = spec.group_size or head_dim
    if spec.axis == "channel":
        return heads, capacity // group, head_dim
    return (1, 1, capacity) if group > head_dim else (heads, head_dim // group, capacity)


# What a tier stores of some tokens: codes, or floats [B, T, K, H].
Encoded = codec.Quantized | jax.Array


SCALES = ("scale", "zero_point", "scale_unit", "zero_unit")


def basis_of(tokens: Tokens, fmt: Format, layer: Index) -> Basis:
    """The basis of one layer's tokens."""
    mean, mirror = (
        array if array is None or layer is None else array[layer]
        for array in (tokens.mean, tokens.mirror)
    )
    return Basis(fmt, mean, mirror)


def new_mirror(
    tokens: Tokens, fmt: Format, first: jax.Array, where: jax.Array, layer: Index
) -> jax.Array:
    """The tokens' mirrors, those of rows `where` [B] made anew from some of their first tokens [B,
    n, K, H]."""
    old = basis_of(tokens, fmt, layer)
    assert tokens.mirror is not None and old.mirror is not None
    total = arithmetic.tree_sum(
        dataclasses.replace(old, mirror=None).enter(first.astype(jnp.float32)), 1
    )[:, 0]
    mirror = jnp.where(where[:, None, None], rotation.mirror_of(total), old.mirror)
    return mirror if layer is None else tokens.mirror.at[layer].set(mirror)


def encode(basis: Basis, x: jax.Array) -> Encoded:
    """Tokens [B, T, K, H] in a tier's format; channel groups must be whole."""
    if isinstance(basis.fmt, QuantSpec):
        return codec.quantize(basis.fmt, basis.enter(x.astype(jnp.float32)))
    if basis.fmt is Precision.FP16:  # what codes of an earlier tier stand for may lie beyond
        x = jnp.clip(x, -LARGEST_FP16, LARGEST_FP16)
    x = jnp.asarray(x).astype(basis.fmt.dtype_name)
    return lax.bitcast_convert_type(x, jnp.int16) if basis.fmt is Precision.BF16 else x


def decode(basis: Basis, encoded: Encoded) -> jax.Array:
    """The tokens [B, T, K, H] float32 that `encoded` stands for."""
    if isinstance(encoded, jax.Array):
        return floats(encoded)
    assert isinstance(basis.fmt, QuantSpec)
    return basis.leave(codec.dequantize(basis.fmt, encoded))


def floats(data: jax.Array) -> jax.Array:
    """The data of a float tier in float32."""
    if data.dtype == jnp.int16:
        return lax.bitcast_convert_type(data.astype(jnp.int32) << 16, jnp.float32)
    return data.astype(jnp.float32)


def write(tokens: Tokens, fmt: Format, encoded: Encoded, slots: jax.Array, layer: Index) -> Tokens:
    """Writes encoded tokens into `slots` [B, T]; a slot outside the ring drops its token.

    The rows' own slots make this a scatter, which XLA does in place where a dynamic_update_slice
    that is read later costs two copies of the whole buffer (openxla/xla#20440).
    """
    if isinstance(encoded, jax.Array):
        encoded = codec.Quantized(encoded, None, None)
    scale_slots = _scale_slots(fmt, slots)

    def put(old: jax.Array, new: jax.Array | None, at: jax.Array, is_scale: bool) -> jax.Array:
        assert new is not None
        if at.size == 1:
            # XLA takes a scatter of one update for a dynamic_update_slice: one more, to be dropped
            at, new = (
                jnp.pad(at, ((0, 0), (0, 1)), constant_values=jnp.iinfo(jnp.int32).max),
                jnp.concatenate([new, new], axis=1),
            )
        return old.at[_scale_place(fmt, at, layer) if is_scale else _data_place(at, layer)].set(
            new, mode="drop"
        )

    held = {name: array for name in SCALES if (array := getattr(tokens, name)) is not None}
    scales = {
        name: put(array, getattr(encoded, name), scale_slots, True) for name, array in held.items()
    }
    return dataclasses.replace(tokens, data=put(tokens.data, encoded.codes, slots, False), **scales)


def read(tokens: Tokens, fmt: Format, slots: jax.Array, layer: Index) -> jax.Array:
    """The tokens [B, T, K, H] float32 in `slots` [B, T]; channel groups must be whole."""
    data = tokens.data[_data_place(slots, layer)]
    if tokens.scale is None:
        return floats(data)
    place = _scale_place(fmt, _scale_slots(fmt, slots), layer)
    arrays = [
        array if array is None else array[place]
        for array in (getattr(tokens, name) for name in SCALES)
    ]
    return decode(basis_of(tokens, fmt, layer), codec.Quantized(data, *arrays))


def _data_place(slots: jax.Array, layer: Index) -> tuple[Any, ...]:
    """Index of [..., B, K, S, W] that gives, or takes, [B, T, K, W]."""
    return *_leading(slots, layer), slice(None), slots


def _scale_slots(fmt: Format, slots: jax.Array) -> jax.Array:
    """The slots [B, n] of the scales of `slots` [B, T]: one for each channel group, or for each
    token."""
    group = channel_group(fmt)
    return slots[:, ::group] // group


def _scale_place(fmt: Format, slots: jax.Array, layer: Index) -> tuple[Any, ...]:
    if channel_group(fmt) > 1:
        return _data_place(slots, layer)
    return *_leading(slots, layer), slice(None), slice(None), slots


def _leading(slots: jax.Array, layer: Index) -> tuple[Any, ...]:
    rows = jnp.arange(slots.shape[0])[:, None]
    return (rows,) if layer is None else (layer, rows)


def only(x: jax.Array, row: Index) -> jax.Array:
    """One row [1, ...] of [B, ...]; None: all."""
    return x if row is None else lax.dynamic_slice_in_dim(x, row, 1)
