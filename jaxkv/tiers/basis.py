"""The basis in which a quantized tier holds its tokens: what can be known of a row for nothing is
taken out of them before they are quantized."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.codec import rotation
from jaxkv.formats import Format, QuantSpec


@dataclasses.dataclass(frozen=True)
class Basis:
    """The basis in which a quantized tier holds its tokens: `mean` is subtracted, then a Hadamard
    transform and a reflection applied.

    Orthogonal but for the mean, so queries are turned once per step and tokens never back.
    """

    fmt: Format
    mean: jax.Array | None = None  # [B, K, H]
    mirror: jax.Array | None = None  # [B, K, H], see `rotation.mirror_of`

    def enter(self, x: jax.Array) -> jax.Array:
        """Tokens [B, T, K, H] float32, to be quantized. The same bits in every program."""
        x = x if self.mean is None else x - self.mean[:, None]
        x = rotation.hadamard(x) if self._rotates else x
        return x if self.mirror is None else rotation.reflect(x, self.mirror[:, None])

    def leave(self, x: jax.Array) -> jax.Array:
        """The inverse of `enter`."""
        x = self._turn_back(x, None if self.mirror is None else self.mirror[:, None])
        return x if self.mean is None else x + self.mean[:, None]

    def query(self, query: jax.Array) -> jax.Array:
        """Queries [B, K, R, H] so that their products with tokens in this basis are those with
        `token - mean`."""
        query = rotation.inverse_hadamard(query) if self._rotates else query
        return query if self.mirror is None else rotation.reflect(query, self.mirror[:, :, None])

    def output(self, out: jax.Array, total: jax.Array) -> jax.Array:
        """Sums of values [B, K, R, H] with weights that add up to `total` [B, K, R], back among raw
        tokens."""
        out = self._turn_back(out, None if self.mirror is None else self.mirror[:, :, None])
        return out if self.mean is None else out + total[..., None] * self.mean[:, :, None]

    def mean_score(self, query: jax.Array) -> jax.Array | None:
        """The score [B, K, R, 1] of the mean, which the products with tokens in this basis lack."""
        return (
            None
            if self.mean is None
            else jnp.sum(query * self.mean[:, :, None], axis=-1, keepdims=True)
        )

    @property
    def _rotates(self) -> bool:
        return isinstance(self.fmt, QuantSpec) and self.fmt.rotate

    def _turn_back(self, x: jax.Array, mirror: jax.Array | None) -> jax.Array:
        x = x if mirror is None else rotation.reflect(x, mirror)
        return rotation.inverse_hadamard(x) if self._rotates else x
