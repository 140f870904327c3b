"""The keys or the values of one tier: arrays in the layout that attention reads, written and read
by slot.

Layout (B rows, K kv heads, S slots, H head dim; [L, ...] in front where a state holds several
layers):

    float tiers      data [B, K, S, H]; bfloat16 as its int16 bits
    quantized tiers  data [B, K, S, W] int8 words (`codec.pack`), W = ceil(H * bits / 8)
                     (3 bits: 3 * ceil(H / 8))
                     scale, zero_point: token axis [B, K or 1, H // group, S]; channel axis
                     [B, K, S // group, H]; uint16 (`codec.scales`) and float16, or uint8 and int8
                     in units of scale_unit, zero_unit [B, 1, 1, S] uint16 (two-level)
                     mean, turned_mean, mirror [B, K, H] float32 and balance [B, K, H] int32 where
                     the spec asks for them (`basis`, `turned`)

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
from jaxkv.codec.arithmetic import as_float16
from jaxkv.formats import LARGEST_FP16, Format, Precision, QuantSpec, channel_group
from jaxkv.rotary import Rotary
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.place import Index, Put, Run, index_of, located, scatter
from jaxkv.tiers.turned import TurnedMean
from jaxkv.trees import node


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
    turned_mean: jax.Array | None = None
    balance: jax.Array | None = None
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
    data = _array((heads, capacity, fmt.words(head_dim)), jnp.int8)
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
        row if fmt.turned_mean else None,
        _array((heads, head_dim), jnp.int32) if fmt.balance else None,
        *units,
    )


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def allocate(
    fmt: Format,
    lead: tuple[int, ...],
    heads: int,
    capacity: int,
    head_dim: int,
    stored: tuple[int, ...] | None = None,
) -> Tokens:
    """Empty tokens; `lead` is (B,) or (L, B), `stored` that of what is stored by slot, where that
    is pages."""
    wanted, stored = shapes(fmt, heads, capacity, head_dim), stored or lead
    arrays: dict[str, Any] = {
        name: None if a is None else jnp.zeros((*at, *a.shape), a.dtype)
        for name, a in vars(wanted).items()
        for at in [stored if name in STORED else lead]
    }
    return Tokens(**arrays)


def _scale_shape(spec: QuantSpec, heads: int, capacity: int, head_dim: int) -> tuple[int, int, int]:
    group = spec.group_size or head_dim
    if spec.axis == "channel":
        return heads, capacity // group, head_dim
    return (1, 1, capacity) if group > head_dim else (heads, head_dim // group, capacity)


# What a tier stores of some tokens: codes, or floats [B, T, K, H].
Encoded = codec.Quantized | jax.Array


SCALES = ("scale", "zero_point", "scale_unit", "zero_unit")

STORED = ("data", *SCALES)
"""What there is of a token; the rest is of a row."""


BASIS = ("mean", "mirror", "balance")
LEARNT = ("mirror", "turned_mean", "balance")
"""What belongs to a row, not to its slots; the second is learnt from its first tokens. Zeros are
neutral."""


def learnt(tokens: Tokens) -> dict[str, jax.Array]:
    """The arrays that a tier has learnt, by name."""
    return {name: a for name in LEARNT if (a := getattr(tokens, name)) is not None}


def without_basis(tokens: Tokens) -> Tokens:
    """The codes alone."""
    return dataclasses.replace(tokens, mean=None, mirror=None, turned_mean=None, balance=None)


def basis_of(tokens: Tokens, fmt: Format, layer: Index) -> Basis:
    """The basis of one layer's tokens."""
    arrays = {name: getattr(tokens, name) for name in BASIS}
    return Basis(
        fmt, **{name: a if a is None or layer is None else a[layer] for name, a in arrays.items()}
    )


def turned_mean_of(tokens: Tokens, rotary: Rotary | None, layer: Index) -> TurnedMean | None:
    """What depends on positions in the basis of one layer's keys, if anything."""
    if tokens.turned_mean is None or rotary is None:
        return None
    turns = jnp.asarray(rotary.turns(tokens.turned_mean.shape[-1]))
    mean = tokens.turned_mean if layer is None else tokens.turned_mean[layer]
    return TurnedMean(rotary, turns[layer] if turns.ndim == 2 else turns, mean)


def learn(
    tokens: Tokens,
    fmt: Format,
    rotary: Rotary | None,
    first: jax.Array,
    position: jax.Array,
    where: jax.Array,
    layer: Index,
) -> dict[str, jax.Array]:
    """What the tokens have learnt, that of rows `where` [B] made anew from some of their first
    tokens [B, n, K, H] at positions [B, n]."""
    old, turned, first = (
        basis_of(tokens, fmt, layer),
        turned_mean_of(tokens, rotary, layer),
        first.astype(jnp.float32),
    )
    new = {}
    if turned is not None:
        turned = turned.learn(first, position)
        new["turned_mean"], first = turned.mean, first - turned.at(position)
    basis = old.learn(first)
    new |= {name: getattr(basis, name) for name in ("mirror", "balance")}
    found = {}
    for name, array in new.items():
        held = getattr(tokens, name)
        if held is not None:
            own = held if layer is None else held[layer]
            array = jnp.where(where[:, None, None], array, own)
            found[name] = array if layer is None else held.at[layer].set(array)
    return found


def encode(basis: Basis, x: jax.Array) -> Encoded:
    """Tokens [B, T, K, H] in a tier's format; channel groups must be whole."""
    if isinstance(basis.fmt, QuantSpec):
        return codec.quantize(basis.fmt, basis.enter(x.astype(jnp.float32)))
    return float_data(x, basis.fmt)


def encode_both(
    bases: tuple[Basis, Basis], keys: jax.Array, values: jax.Array
) -> tuple[Encoded, Encoded]:
    """Keys and values [B, T, K, H] in a tier's formats; where these are one, as rows of one batch:
    half the operations to compile, and to start."""
    first, second = bases
    alike = keys.shape == values.shape and not isinstance(first.fmt, Precision)
    basis = first.beside(second) if alike else None
    if basis is None:
        return encode(first, keys), encode(second, values)
    both = encode(basis, jnp.concatenate([x.astype(jnp.float32) for x in (keys, values)]))
    batch = keys.shape[0]
    return jax.tree.map(lambda x: x[:batch], both), jax.tree.map(lambda x: x[batch:], both)


def float_data(x: jax.Array, precision: Precision) -> jax.Array:
    """Floats as a float tier holds them."""
    if precision is Precision.FP16:  # what codes of an earlier tier stand for may lie beyond
        x = as_float16(jnp.clip(jnp.asarray(x, jnp.float32), -LARGEST_FP16, LARGEST_FP16))
    x = jnp.asarray(x).astype(precision.dtype_name)
    return lax.bitcast_convert_type(x, jnp.int16) if precision is Precision.BF16 else x


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


@dataclasses.dataclass(frozen=True)
class Sliced:
    """An array that a loop takes slices of; bfloat16 as its bits, or XLA:CPU widens all of it."""

    bits: jax.Array
    dtype: Any

    @classmethod
    def of(cls, x: jax.Array) -> Sliced:
        wide = lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.bfloat16 else x
        return cls(wide, x.dtype)

    def at(self, start: tuple[Index, ...], sizes: tuple[int, ...]) -> jax.Array:
        found = lax.dynamic_slice(self.bits, [jnp.int32(at) for at in start], sizes)
        if self.dtype == jnp.bfloat16:
            return lax.bitcast_convert_type(found, jnp.bfloat16)
        return found


def write(
    tokens: Tokens, fmt: Format, encoded: Encoded, run: Run, layer: Index, put: Put = scatter
) -> Tokens:
    """Writes encoded tokens [B, T, ...] into the slots of a run."""
    if isinstance(encoded, jax.Array):
        encoded = codec.Quantized(encoded, None, None)
    groups, axis = run.of_groups(channel_group(fmt)), scale_axis(fmt)
    held = {name: array for name in SCALES if (array := getattr(tokens, name)) is not None}
    scales = {
        name: put(array, getattr(encoded, name), groups, layer, axis)
        for name, array in held.items()
    }
    return dataclasses.replace(
        tokens, data=put(tokens.data, encoded.codes, run, layer, -2), **scales
    )


def read(
    tokens: Tokens, fmt: Format, slots: jax.Array, layer: Index, pages: Pages | None = None
) -> jax.Array:
    """The tokens [B, T, K, H] float32 in `slots` [B, T]; channel groups must be whole."""
    data = tokens.data[index_of(located(slots, pages), layer, -2)]
    if tokens.scale is None:
        return floats(data)
    group = channel_group(fmt)
    at = located(slots[:, ::group] // group, pages and pages.of_groups(group))
    place = index_of(at, layer, scale_axis(fmt))
    arrays = [
        array if array is None else array[place]
        for array in (getattr(tokens, name) for name in SCALES)
    ]
    return decode(basis_of(tokens, fmt, layer), codec.Quantized(data, *arrays))


def scale_axis(fmt: Format) -> int:
    """The axis of the slots, or of groups of them, in a format's scales."""
    return -2 if channel_group(fmt) > 1 else -1


def only(x: jax.Array, row: Index) -> jax.Array:
    """One row [1, ...] of [B, ...]; None: all."""
    return x if row is None else lax.dynamic_slice_in_dim(x, row, 1)
