"""How the GPU kernel reads each format: tiles of 16-bit operands for the matrix units, scales and
offsets beside them.

A head lies in `count` tiles of `size` elements, tile j elements [j * size, (j + 1) * size), chosen
such that a tile is one part of some words (`codec.split`) and has one scale per token. An element
is `scale * operand + offset`, and only the operand meets the matrix units: keys give `scale *
dot(query, operand) + offset * sum(query)`, values `dot(weights * scale, operand) + sum(weights *
offset)`. The masked bits of a word are the operand, but for a power of two that the query or the
finished output takes; what the last part's codes lack joins the offset. Formats without a scale per
token (floats, groups of tokens, groups of few elements) are operands of two terms.

Every operand is bfloat16: codes are exact in it, and no product leaves its range. Floats enter as
two terms, off by 2**-17 of themselves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from jaxkv import codec
from jaxkv.formats import Format, Precision, QuantSpec

LEAST = 16
"""The fewest rows or columns of a matrix unit's tile."""

Refs = Any  # `Tokens` of one side, whole arrays in device memory
Kind = tuple[
    int, bool
]  # what tiles differ in by offset: their group, and whether they are of the words' last part


def padded(size: int) -> int:
    """The next power of two that a tile may have as a side."""
    return max(LEAST, 1 << (size - 1).bit_length())


def two_terms(x: jax.Array) -> list[jax.Array]:
    """Float32 as the sum of two bfloat16, off by 2**-17 of itself at most.

    The first term is cut off with bits, not rounded: XLA takes a cast to bfloat16 and back for
    nothing and would leave no rest.
    """
    high = lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**16)), jnp.float32
    )
    return [high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)]


@dataclasses.dataclass(frozen=True)
class Block:
    """The slots that one step of the kernel reads, [S] each."""

    place: tuple[Any, ...]  # index of the layer (where there are any), row and kv head in the data
    slot: jax.Array
    inside: jax.Array | None  # which slots exist; None if all do
    # which slots must not spoil a sum, whatever they hold: those of no token; None if that does
    # not matter
    valid: jax.Array | None

    def tile(
        self, ref: Any, rows: jax.Array, columns: jax.Array, width: int, mask: jax.Array | None
    ) -> jax.Array:
        """[S, C] of an array [..., rows, columns]; zeros where not `mask` [S], and for the columns
        from `width` on."""
        index = (*self.place[:-1], self.place[-1] if ref.shape[-3] > 1 else 0, rows, columns)
        shape = (self.slot.shape[0], max(rows.shape[-1], columns.shape[-1]))
        keep = (
            None
            if width == shape[1]
            else jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None] < width, shape)
        )
        if mask is not None:
            keep = mask[:, None] if keep is None else keep & mask[:, None]
        return _load(ref.at[index], None if keep is None else jnp.broadcast_to(keep, shape))

    def row(self, ref: Any, group: int) -> jax.Array:
        """[S] float32 of an array [..., groups, slots]; zeros where not `valid`."""
        index = (*self.place[:-1], self.place[-1] if ref.shape[-3] > 1 else 0, group, self.slot)
        found = _wide(_load(ref.at[index], self.inside))
        return found if self.valid is None else jnp.where(self.valid, found, 0)


def _wide(stored: jax.Array) -> jax.Array:
    """Scales, zero points or units as they are stored, in float32."""
    is_scale = stored.dtype == codec.SCALE_DTYPE
    return codec.widened_scale(stored) if is_scale else stored.astype(jnp.float32)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return (
        plgpu.load(ref)
        if mask is None
        else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))
    )


@dataclasses.dataclass(frozen=True)
class Side:
    """The keys or the values of one tier: floats, and what all formats share."""

    fmt: Format
    head_dim: int

    @property
    def bits(self) -> int:
        return self.fmt.bits if isinstance(self.fmt, QuantSpec) else 16

    @property
    def size(self) -> int:
        return self.head_dim

    @property
    def count(self) -> int:
        return self.head_dim // self.size

    def kind(self, tile: int) -> Kind:
        return 0, False

    def weight(self, tile: int) -> float:
        """What turns operands into codes."""
        return 1.0

    @property
    def groups(self) -> dict[int, list[int]]:
        """The tiles of each group."""
        found: dict[int, list[int]] = {}
        for tile in range(self.count):
            found.setdefault(self.kind(tile)[0], []).append(tile)
        return found

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of tiles that have an offset."""
        return []

    def scale(self, refs: Refs, block: Block, group: int) -> jax.Array | None:
        """The scales [S] of a group; None if it has none."""
        return None

    def offset(self, refs: Refs, block: Block, kind: Kind) -> jax.Array:
        """The offsets [S] of a kind; floats have none."""
        return jnp.zeros(block.slot.shape, jnp.float32)

    def operands(self, refs: Refs, block: Block) -> list[list[jax.Array]]:
        """The terms [S, padded(size)] bfloat16 of every tile, zeros beyond `size`."""
        columns = jnp.arange(padded(self.size), dtype=jnp.int32)[None]
        data = block.tile(
            refs.data,
            block.slot[:, None],
            columns,
            self.size,
            block.inside if block.valid is None else block.valid,
        )
        if data.dtype == jnp.int16:
            return [[lax.bitcast_convert_type(data, jnp.bfloat16)]]
        return [two_terms(data.astype(jnp.float32))]


@dataclasses.dataclass(frozen=True)
class _Coded(Side):
    fmt: QuantSpec

    @property
    def words(self) -> int:
        return self.head_dim // self.fmt.parts

    @property
    def group(self) -> int:
        return self.fmt.group_size or self.head_dim

    def part(self, tile: int) -> int:
        return tile * self.size // self.words

    def is_last(self, tile: int) -> bool:
        return self.part(tile) == self.fmt.parts - 1

    def masked(self, refs: Refs, block: Block) -> list[jax.Array]:
        """The bits of every tile's codes where they lie in the words, [S, padded(size)] int8."""
        columns = jnp.arange(padded(self.size), dtype=jnp.int32)[None]
        pieces = [
            block.tile(refs.data, block.slot[:, None], first + columns, self.size, block.inside)
            for first in range(0, self.words, self.size)
        ]
        return [pieces[tile % len(pieces)] & _int8(self.mask(tile)) for tile in range(self.count)]

    def mask(self, tile: int) -> int:
        return (2**self.fmt.bits - 1) << (self.fmt.bits * self.part(tile))

    def shift(self, scale: jax.Array, zero_point: jax.Array | None, is_last: bool) -> jax.Array:
        """The zero point, and what the codes of a word's last part lack."""
        middle = 2.0 ** (self.fmt.bits - 1)
        offset = -middle * scale if zero_point is None else zero_point
        return offset + middle * scale if is_last else offset


def _int8(bits: int) -> np.int8:
    return np.int8(bits - 256 if bits > 127 else bits)


class TokenGroups(_Coded):
    """Groups of elements of one token: a tile is what a group and a part of the words have in
    common."""

    @property
    def size(self) -> int:
        return math.gcd(self.group, self.words)

    def kind(self, tile: int) -> Kind:
        return tile * self.size // self.group, self.is_last(tile)

    def weight(self, tile: int) -> float:
        return 2.0 ** (-self.fmt.bits * self.part(tile))

    @property
    def kinds(self) -> list[Kind]:
        found = dict.fromkeys(self.kind(tile) for tile in range(self.count))
        return [
            kind for kind in found if not (self.fmt.symmetric and kind[1])
        ]  # a last part is centred as it is

    def scale(self, refs: Refs, block: Block, group: int) -> jax.Array:
        found = block.row(refs.scale, group)
        return found if refs.scale_unit is None else found * block.row(refs.scale_unit, 0)

    def offset(self, refs: Refs, block: Block, kind: Kind) -> jax.Array:
        scale, zero_point = self.scale(refs, block, kind[0]), None
        if refs.zero_point is not None:
            unit = scale if refs.zero_unit is None else block.row(refs.zero_unit, 0)
            zero_point = block.row(refs.zero_point, kind[0]) * unit
        return self.shift(scale, zero_point, kind[1])

    def operands(self, refs: Refs, block: Block) -> list[list[jax.Array]]:
        return [[words.astype(jnp.bfloat16)] for words in self.masked(refs, block)]


class Dequantized(_Coded):
    """Groups of tokens, and groups of too few elements for a tile: dequantized in registers, a tile
    for each part of the words."""

    @property
    def size(self) -> int:
        return self.words

    def operands(self, refs: Refs, block: Block) -> list[list[jax.Array]]:
        return [
            two_terms(self.dequantized(refs, block, tile, words))
            for tile, words in enumerate(self.masked(refs, block))
        ]

    def dequantized(self, refs: Refs, block: Block, tile: int, words: jax.Array) -> jax.Array:
        codes = words.astype(jnp.float32) * 2.0 ** (-self.fmt.bits * self.part(tile))
        scale, zero_point = self.by_element(refs.scale, block, tile), None
        if refs.scale_unit is not None:
            scale = scale * block.row(refs.scale_unit, 0)[:, None]
        if refs.zero_point is not None:
            unit = scale if refs.zero_unit is None else block.row(refs.zero_unit, 0)[:, None]
            zero_point = self.by_element(refs.zero_point, block, tile) * unit
        return codes * scale + self.shift(scale, zero_point, self.is_last(tile))

    def by_element(self, ref: Any, block: Block, tile: int) -> jax.Array:
        """The scales or zero points [S, padded(size)] of a tile's elements, without their units."""
        slots, elements = (
            block.slot[:, None],
            tile * self.size + jnp.arange(padded(self.size), dtype=jnp.int32)[None],
        )
        index = (
            (slots // self.group, elements)
            if self.fmt.axis == "channel"
            else (elements // self.group, slots)
        )
        mask = block.inside if block.valid is None else block.valid
        return _wide(block.tile(ref, *index, self.size, mask))


def side(fmt: Format, head_dim: int) -> Side:
    """How the kernel reads a format."""
    if isinstance(fmt, Precision):
        return Side(fmt, head_dim)
    found = TokenGroups(fmt, head_dim)
    return found if fmt.axis == "token" and found.size >= LEAST // 2 else Dequantized(fmt, head_dim)
