"""The tokens of one side of a tier, read block by block where they lie."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.formats import Format, channel_group
from jaxkv.tiers.tokens import SCALES, Index, Tokens


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Keys or values, `flat`: what an array has of its slots in one last axis, and axes of a single
    element left out.

    XLA:CPU copies an array of the shape [1, B, 1, S, W] to flatten it, or to carry it around a
    loop.
    """

    tokens: Tokens
    fmt: Format
    flat: dict[str, jax.Array]

    @classmethod
    def of(cls, tokens: Tokens, fmt: Format) -> Blocks:
        held = {
            name: array
            for name in ("data", *SCALES)
            if (array := getattr(tokens, name)) is not None
        }
        flat = {
            name: a.reshape(*(n for n in _before_slots(name, fmt, a) if n > 1), -1)
            for name, a in held.items()
        }
        return cls(tokens, fmt, flat)

    def at(self, start: jax.Array, size: int, layer: Index, row: Index = None) -> Tokens:
        """The slots [start, start + size) of one layer, still encoded, `data` [B, K, size * W]; of
        one row where one is named. `start` and `size` are multiples of a channel group.
        """
        return Tokens(**{name: self._cut(name, start, size, layer, row) for name in self.flat})

    def _cut(self, name: str, start: jax.Array, size: int, layer: Index, row: Index) -> jax.Array:
        array: jax.Array = getattr(self.tokens, name)
        lead, group = (
            _before_slots(name, self.fmt, array),
            channel_group(self.fmt) if name in SCALES else 1,
        )
        width = math.prod(array.shape[len(lead) + 1 :])  # elements of a slot, or of a group of them
        picked = [*([] if layer is None else [layer]), row, *[None] * len(lead)][: len(lead)]
        sizes = [n if at is None else 1 for n, at in zip(lead, picked, strict=True)]
        axes = [
            (0 if at is None else at, length)
            for n, at, length in zip(lead, picked, sizes, strict=True)
            if n > 1
        ]
        starts, lengths = [jnp.int32(at) for at, _ in axes], [length for _, length in axes]
        found = lax.dynamic_slice(
            self.flat[name], [*starts, start // group * width], [*lengths, size // group * width]
        )
        return found.reshape(*sizes[layer is not None :], *((-1, width) if group > 1 else (-1,)))


def _before_slots(name: str, fmt: Format, array: jax.Array) -> tuple[int, ...]:
    """The axes [..., B, K] or [..., B, K, G] of an array in front of its slots."""
    return array.shape[: -2 if name == "data" or channel_group(fmt) > 1 else -1]
