"""The basis in which a quantized tier holds its tokens: what can be known of a row for nothing is
taken out of them before they are quantized."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.codec import balance, rotation
from jaxkv.codec.arithmetic import alone, tree_sum
from jaxkv.formats import Format, QuantSpec


@dataclasses.dataclass(frozen=True)
class Basis:
    """The basis in which a quantized tier holds its tokens: `mean` is subtracted and the channels
    balanced, then a Hadamard transform and a reflection applied.

    Orthogonal but for mean and balance, so queries are turned once per step and tokens never back.
    (What a mean before the rotary embedding takes out depends on the position: `TurnedMean`.)
    """

    fmt: Format
    mean: jax.Array | None = None  # [B, K, H]
    mirror: jax.Array | None = None  # [B, K, H], see `rotation.mirror_of`
    balance: jax.Array | None = None  # [B, K, H] int32, see `balance.balance_of`

    def at(self, row: jax.Array, head: jax.Array) -> Basis:
        """The basis of one row and head, [1, 1, H]."""
        arrays = (
            x if x is None else lax.dynamic_slice(x, (row, head, jnp.int32(0)), (1, 1, x.shape[2]))
            for x in (self.mean, self.mirror, self.balance)
        )
        return Basis(self.fmt, *arrays)

    def beside(self, other: Basis) -> Basis | None:
        """Both bases as one of a batch twice as large; None where they do not take out the same."""
        arrays: list[jax.Array | None] = []
        for name in ("mean", "mirror", "balance"):
            first, second = getattr(self, name), getattr(other, name)
            if (first is None) != (second is None):
                return None
            arrays.append(None if first is None else jnp.concatenate([first, second]))
        return Basis(self.fmt, *arrays) if self.fmt == other.fmt else None

    def enter(self, x: jax.Array) -> jax.Array:
        """Tokens [B, T, K, H] float32, to be quantized. The same bits in every program."""
        x = x if self.mean is None else x - self.mean[:, None]
        x = x if self.balance is None else alone(x * balance.factor(self.balance)[:, None])
        x = rotation.hadamard(x) if self._rotates else x
        return x if self.mirror is None else rotation.reflect(x, self.mirror[:, None])

    def leave(self, x: jax.Array) -> jax.Array:
        """The inverse of `enter`."""
        x = self._turn_back(x, None if self.mirror is None else self.mirror[:, None])
        x = x if self.balance is None else x / balance.factor(self.balance)[:, None]
        return x if self.mean is None else x + self.mean[:, None]

    def query(self, query: jax.Array) -> jax.Array:
        """Queries [B, K, R, H] so that their products with tokens in this basis are those with
        `token - mean`."""
        query = query if self.balance is None else query / balance.factor(self.balance)[:, :, None]
        query = rotation.inverse_hadamard(query) if self._rotates else query
        return query if self.mirror is None else rotation.reflect(query, self.mirror[:, :, None])

    def output(self, out: jax.Array, total: jax.Array) -> jax.Array:
        """Sums of values [B, K, R, H] with weights that add up to `total` [B, K, R], back among raw
        tokens."""
        out = self._turn_back(out, None if self.mirror is None else self.mirror[:, :, None])
        out = out if self.balance is None else out / balance.factor(self.balance)[:, :, None]
        return out if self.mean is None else out + total[..., None] * self.mean[:, :, None]

    def mean_score(self, query: jax.Array) -> jax.Array | None:
        """The score [B, K, R, 1] of the mean, which the products with tokens in this basis lack."""
        return (
            None
            if self.mean is None
            else jnp.sum(query * self.mean[:, :, None], axis=-1, keepdims=True)
        )

    def learn(self, first: jax.Array) -> Basis:
        """The basis with balance and mirror made anew from a row's first tokens [B, n, K, H]
        float32, without their turned mean."""
        found = self
        if self.balance is not None:
            rest = first - _mean(first)
            variance = tree_sum(alone(rest * rest), 1)[:, 0]
            found = dataclasses.replace(found, balance=balance.balance_of(variance))
        if self.mirror is not None:
            total = tree_sum(dataclasses.replace(found, mirror=None).enter(first), 1)[:, 0]
            found = dataclasses.replace(found, mirror=rotation.mirror_of(total))
        return found

    @property
    def turns(self) -> bool:
        """Whether it does anything to queries."""
        return self._rotates or not (self.mirror is None and self.balance is None)

    @property
    def _rotates(self) -> bool:
        return isinstance(self.fmt, QuantSpec) and self.fmt.rotate

    def _turn_back(self, x: jax.Array, mirror: jax.Array | None) -> jax.Array:
        x = x if mirror is None else rotation.reflect(x, mirror)
        return rotation.inverse_hadamard(x) if self._rotates else x


def _mean(x: jax.Array) -> jax.Array:
    """The mean over axis 1, kept."""
    return alone(tree_sum(x, 1) * (1 / x.shape[1]))
