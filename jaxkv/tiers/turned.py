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

from jaxkv import softmax
from jaxkv.codec import turning
from jaxkv.codec.arithmetic import alone, tree_sum
from jaxkv.rotary import Rotary

EXACT = lax.Precision.HIGHEST

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
        """Queries [B, K, R, H] for `add`: what multiplies cosines, sines, and 1, [B, K, R, 2 F +
        1]."""
        (a, b, rest), (m, n, still) = (
            turning.pairs(x, self.rotary) for x in (query, self.mean[:, :, None])
        )
        constant = jnp.sum(rest * still, axis=-1, keepdims=True)
        return jnp.concatenate([a * m + b * n, b * m - a * n, constant], axis=-1)

    def steps(self, size: int) -> jax.Array:
        """What `add` asks for where it looks at so many positions, [2 F, S]."""
        return self._table(jnp.arange(size, dtype=jnp.int32)).T

    def add(
        self, scores: jax.Array, operand: jax.Array, position: jax.Array, steps: jax.Array
    ) -> jax.Array:
        """Scores [B, K, R, S] of keys at positions [B, S] with those of the mean there.

        Cosines of every position cost as much as the codes there. Where positions follow one
        another, as in all blocks but one of a ring, the operand turns to the first of them.
        """

        def anywhere(scores: jax.Array) -> jax.Array:
            table = self._table(position)
            return sums(scores, jnp.einsum("bkrf,bsf->bkrs", turns, table, precision=EXACT))

        def in_a_row(scores: jax.Array) -> jax.Array:
            cos, sin = (x[:, None] for x in turning.cos_sin(first, self.turns))  # [B, 1, 1, F]
            a, b = jnp.split(turns, 2, axis=-1)
            begun = jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
            return sums(scores, jnp.matmul(begun, steps, precision=EXACT))

        def sums(scores: jax.Array, added: jax.Array) -> jax.Array:
            return softmax.bounded(scores + (added + constant))

        turns, constant = operand[..., :-1], operand[..., -1:]
        first = position[:, :1]
        follow = position == first + jnp.arange(position.shape[1], dtype=jnp.int32)
        # Most layers have none; the conditional is on the data, not another program.
        way = jnp.any(operand != 0).astype(jnp.int32) * (1 + follow.all().astype(jnp.int32))
        found: jax.Array = lax.switch(way, [lambda scores: scores, anywhere, in_a_row], scores)
        return found

    def _table(self, position: jax.Array) -> jax.Array:
        """Cosines and sines at positions [...]: [..., 2 F]."""
        return jnp.concatenate(turning.cos_sin(position, self.turns), axis=-1)


def _square(x: jax.Array) -> jax.Array:
    """Of tokens [B, n, K, H], by head: [B, K, 1]."""
    by_channel = tree_sum(alone(x * x), 1)[:, 0]
    return tree_sum(by_channel, -1)
