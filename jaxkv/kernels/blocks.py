"""The tokens of one side of a tier, read block by block where they lie."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform
from jaxkv.formats import Format, channel_group
from jaxkv.tiers.place import Index
from jaxkv.tiers.tokens import SCALES, Tokens


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Keys or values, as `arrays` whose shape costs nothing to cut from.

    In linear memory what an array has of its slots is one last axis, and axes of a single element
    are left out: XLA:CPU copies an array of the shape [1, B, 1, S, W] to flatten it, or to carry it
    around a loop. In tiled memory the slots stay an axis: another shape of the last two is a copy.
    """

    tokens: Tokens
    fmt: Format
    arrays: dict[str, jax.Array]
    flat: bool

    @classmethod
    def of(cls, tokens: Tokens, fmt: Format) -> Blocks:
        held = {
            name: array
            for name in ("data", *SCALES)
            if (array := getattr(tokens, name)) is not None
        }
        flat = not platform.is_tiled()
        for name, array in held.items():
            lead = _before_slots(name, fmt, array)
            tail = (-1,) if flat else array.shape[len(lead) :]
            held[name] = array.reshape(*(n for n in lead if n > 1), *tail)
        return cls(tokens, fmt, held, flat)

    def at(
        self, start: jax.Array, size: int, layer: Index, row: Index = None, head: Index = None
    ) -> Tokens:
        """The slots [start, start + size) of one layer, still encoded, `data` [B, K, size * W]; of
        one row, or one head, where it is named. `start` and `size` are multiples of a channel
        group."""
        place = layer, row, head
        return Tokens(**{name: self._cut(name, start, size, place) for name in self.arrays})

    def joined(self, pieces: Tokens | list[Tokens]) -> Tokens:
        """Pieces one behind the other, [B, ...]: of n places [B, n, ...], or a list of them."""

        def one(name: str) -> jax.Array:
            axis = -2 if name in SCALES and channel_group(self.fmt) > 1 else -1
            if isinstance(pieces, list):
                # Stacked in front of the slots, so that XLA:CPU asks once a row of a piece, not
                # once an element, which piece it is: a fifth of the time.
                parts = [jnp.expand_dims(getattr(piece, name), axis - 1) for piece in pieces]
                x = jnp.concatenate(parts, axis - 1)
            else:
                x = jnp.moveaxis(getattr(pieces, name), 1, axis - 1)
            shape = list(x.shape)
            shape[axis - 1 :] = [shape[axis - 1] * shape[axis], *shape[axis:][1:]]
            return x.reshape(shape)

        return Tokens(**{name: one(name) for name in self.arrays})

    def _cut(
        self, name: str, start: jax.Array, size: int, place: tuple[Index, Index, Index]
    ) -> jax.Array:
        whole, array = getattr(self.tokens, name), self.arrays[name]
        lead, group = (
            _before_slots(name, self.fmt, whole),
            channel_group(self.fmt) if name in SCALES else 1,
        )
        tail = whole.shape[len(lead) + 1 :]  # of a slot, or of a group of them
        width = math.prod(tail)
        layer, *picked = place
        picked = [*([] if layer is None else [layer]), *picked, *[None] * len(lead)][: len(lead)]
        sizes = [n if at is None else 1 for n, at in zip(lead, picked, strict=True)]
        axes = [
            (0 if at is None else at, length)
            for n, at, length in zip(lead, picked, sizes, strict=True)
            if n > 1
        ]
        ends = [(start // group * width, size // group * width)]
        if not self.flat:
            ends = [(start // group, size // group), *((0, n) for n in tail)]
        starts, lengths = zip(*axes, *ends, strict=True)
        found = lax.dynamic_slice(array, [jnp.int32(at) for at in starts], lengths)
        return found.reshape(*sizes[layer is not None :], *((-1, width) if group > 1 else (-1,)))


def _before_slots(name: str, fmt: Format, array: jax.Array) -> tuple[int, ...]:
    """The axes [..., B, K] or [..., B, K, G] of an array in front of its slots."""
    return array.shape[: -2 if name == "data" or channel_group(fmt) > 1 else -1]
