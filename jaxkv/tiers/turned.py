"""The mean of a row's keys before the rotary embedding: what it is at a position is taken out of
the key there, and its score given back, which depends on the position alone.

A bias of the key projection is most of it (Qwen2: norm 277 against deviations of 3 to 6). Turned,
it is another vector at every position, which no reflection can align.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.codec import turning
from jaxkv.codec.arithmetic import alone, tree_sum
from jaxkv.rotary import Rotary

PAYS = 3.0
"""How many times smaller the first tokens' deviation must be from the turned mean than from the
plain one. 70 to 90 for Qwen2.5's first layer; 1 to 2 in most heads, where taking it out makes a
few odd tokens worse and with them the scores (KL 0.015 for 0.006)."""


@dataclasses.dataclass(frozen=True)
class TurnedMean:
    """`mean` [B, K, H], as it was before the rotary embedding; zeros where it does not pay."""

    rotary: Rotary
    turns: jax.Array  # [F] uint32
    mean: jax.Array

    def alone(self, row: jax.Array, head: jax.Array) -> TurnedMean:
        """That of one row and head, [1, 1, H]."""
        at = row, head, jnp.int32(0)
        mean = lax.dynamic_slice(self.mean, at, (1, 1, self.mean.shape[-1]))
        return dataclasses.replace(self, mean=mean)

    def at(self, position: jax.Array) -> jax.Array:
        """What the mean is at positions [B, T]: [B, T, K, H]. The same bits in every program."""
        cos, sin = turning.cos_sin(position[..., None], self.turns)  # [B, T, 1, F]
        return turning.turn(self.mean[:, None], cos, sin, self.rotary)

    def learn(self, first: jax.Array, position: jax.Array) -> TurnedMean:
        """Made anew from a row's first tokens [B, n, K, H] at positions [B, n]."""
        cos, sin = turning.cos_sin(position[..., None], self.turns)
        scale = 1 / first.shape[1]
        mean = alone(tree_sum(turning.turn(first, cos, -sin, self.rotary), 1) * scale)[:, 0]
        found = dataclasses.replace(self, mean=mean)
        rest, plain = first - found.at(position), first - alone(tree_sum(first, 1) * scale)
        pays = alone(_square(plain)) > alone(_square(rest) * PAYS)
        return dataclasses.replace(self, mean=jnp.where(pays, mean, 0.0))

    def operand(self, query: jax.Array) -> jax.Array:
        """Queries [B, K, R, H] for `score`: what multiplies cosines, sines, and 1, [B, K, R, 2 F +
        1]."""
        (a, b, rest), (m, n, still) = (
            turning.pairs(x, self.rotary) for x in (query, self.mean[:, :, None])
        )
        constant = jnp.sum(rest * still, axis=-1, keepdims=True)
        return jnp.concatenate([a * m + b * n, b * m - a * n, constant], axis=-1)

    def score(self, operand: jax.Array, position: jax.Array) -> jax.Array:
        """The scores [B, K, R, S] of the mean at positions [B, S]."""

        def product(operand: jax.Array) -> jax.Array:
            cos, sin = turning.cos_sin(position, self.turns)
            table = jnp.concatenate([cos, sin, jnp.ones_like(cos[..., :1])], axis=-1)
            return jnp.einsum("bkrf,bsf->bkrs", operand, table, precision=lax.Precision.HIGHEST)

        def nothing(operand: jax.Array) -> jax.Array:
            shape = (*operand.shape[:-1], position.shape[-1])
            return jnp.broadcast_to(operand[..., :1] * 0, shape)

        # Most layers have none; the conditional is on the data, not another program.
        return lax.cond(jnp.any(operand != 0), product, nothing, operand)


def _square(x: jax.Array) -> jax.Array:
    """Of tokens [B, n, K, H], by head: [B, K, 1]."""
    by_channel = tree_sum(alone(x * x), 1)[:, 0]
    return tree_sum(by_channel, -1)
