"""How a block of each format is multiplied: scores from keys, weighted sums from values, without a dequantized copy.

Each format is a class of pure functions with the same five methods. Keys: `query` prepares queries once per step, `scores` uses them on a
block. Values: `zeros` starts a sum, `weigh` gives a block's share, `finish` turns the sum into outputs.
Shapes: B rows, K kv heads, R queries of a head, S slots of the block, H head dim, W words of a head, g group size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import codec, tokens
from jaxkv.config import Format, Precision, QuantSpec
from jaxkv.kernels import digits
from jaxkv.tokens import Tokens

EXACT = lax.Precision.HIGHEST


class Reader(Protocol):
    def query(self, query: jax.Array) -> Any: ...
    def scores(self, operand: Any, block: Tokens) -> jax.Array: ...
    def zeros(self, shape: tuple[int, ...]) -> Any: ...
    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> Any: ...
    def finish(self, total: Any) -> tuple[jax.Array, jax.Array]: ...


def reader(fmt: Format, head_dim: int, mean: jax.Array | None) -> Reader:
    if isinstance(fmt, Precision):
        return Floats(head_dim)
    return ChannelGroups(fmt, head_dim, mean) if fmt.axis == "channel" else TokenGroups(fmt, head_dim, mean)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Float32 product over the last axis of a and axis `contract` of b, leading axes shared."""
    batch = tuple(range(a.ndim - 2))
    return lax.dot_general(a, b, (((a.ndim - 1,), (b.ndim + contract,)), (batch, batch)), precision=EXACT)


@dataclasses.dataclass(frozen=True)
class Floats:
    """Float tiers: the block itself is the operand, in float32."""

    head_dim: int

    def query(self, query: jax.Array) -> jax.Array:
        return query

    def scores(self, operand: jax.Array, block: Tokens) -> jax.Array:
        return _dot(operand, tokens.floats(block.data), -1)

    def zeros(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((*shape, self.head_dim)), jnp.zeros((*shape, 1))

    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = jnp.where(valid[:, None, :, None], tokens.floats(block.data), 0)
        return _dot(weights, values, -2), weights.sum(-1, keepdims=True)

    def finish(self, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return total[0], total[1][..., 0]


@dataclasses.dataclass(frozen=True)
class _Coded:
    """What the two quantized formats share: parts of a word, and the basis change around them."""

    spec: QuantSpec
    head_dim: int
    mean: jax.Array | None  # [B, K, H]

    @property
    def words(self) -> int:
        return self.head_dim // self.spec.codes_per_byte

    @property
    def middle(self) -> float:
        """What the last part's codes lack (see `codec`)."""
        return 2.0 ** (self.spec.bits - 1)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """[..., H] in pieces of `words`, as the codes are packed."""
        return jnp.split(x, self.spec.codes_per_byte, axis=-1)

    def rotated(self, query: jax.Array) -> jax.Array:
        return codec.inverse_hadamard(query) if self.spec.rotate else query

    def mean_score(self, query: jax.Array) -> jax.Array:
        """The score of the mean [B, K, R, 1], which every token's score lacks."""
        return jnp.zeros(()) if self.mean is None else _dot(query, self.mean[:, :, None], -1)

    def restored(self, out: jax.Array, total: jax.Array) -> jax.Array:
        out = codec.inverse_hadamard(out) if self.spec.rotate else out
        return out if self.mean is None else out + total[..., None] * self.mean[:, :, None]


@dataclasses.dataclass(frozen=True)
class TokenGroups(_Coded):
    """Scales per token: factored out of the sum over the head dim for keys, into the weights for values.

    A part of a word may share its group with other parts or hold several. Several are several sets of query rows, zero outside their
    group, over the same codes: rows are cheap, and slicing the codes instead copied them at a tenth of the speed.
    """

    @property
    def group(self) -> int:
        return min(self.spec.group_size or self.head_dim, self.head_dim)  # a group over all heads is one per head here

    @property
    def num_groups(self) -> int:
        return self.head_dim // self.group

    def groups_of(self, part: int) -> range:
        """The groups that a part of a word touches."""
        return range(part * self.words // self.group, ((part + 1) * self.words - 1) // self.group + 1)

    def inside(self, part: int) -> jax.Array:
        """Which words of a part belong to which of its groups, [n, 1, W] bool."""
        element = part * self.words + jnp.arange(self.words)
        return element // self.group == jnp.array(self.groups_of(part))[:, None, None]

    def query(self, query: jax.Array) -> Any:
        rotated = self.rotated(query)
        fixed, unit = digits.of_signed(rotated)
        rows = [jnp.where(self.inside(i), x[:, :, None], 0) for i, x in enumerate(self.parts(fixed))]  # [B, K, n, 3 R, W]
        lacking = jnp.where(jnp.arange(self.head_dim) >= self.head_dim - self.words, rotated * self.middle, 0)
        sums = [x.reshape(*x.shape[:-1], self.num_groups, self.group).sum(-1) / unit for x in (rotated, lacking)]
        return rows, *sums, self.mean_score(query) / unit, 1 / unit

    def scores(self, operand: Any, block: Tokens) -> jax.Array:
        rows, sums, lacking, score, units = operand
        scale, zero_point = _scales(self.spec, block)
        products = [lacking[..., group, None] for group in range(self.num_groups)]
        for part, (codes, weight) in enumerate(codec.split(block.data, self.spec.bits)):
            found = digits.dot_rows(rows[part], codes, -1)  # [B, K, n, R, S]
            for index, group in enumerate(self.groups_of(part)):
                products[group] = products[group] + found[:, :, index] * weight
        for group, product in enumerate(products):
            score = score + product * scale[:, :, group, None] + sums[..., group, None] * zero_point[:, :, group, None]
        # Counted in the query's units and divided at last: XLA:CPU computes a division once, a product again for every use.
        return score / units

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return [jnp.zeros((*shape, self.words))] * self.spec.codes_per_byte, jnp.zeros((*shape, 1 + 2 * self.num_groups))

    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> Any:
        scale, zero_point = (jnp.where(valid[:, None, None], a, 0) for a in _scales(self.spec, block))
        most = jnp.maximum(scale.max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        relative, scale, zero_point = lax.optimization_barrier((scale / most, scale, zero_point))
        rows: dict[range, jax.Array] = {}
        out = []
        for part, (codes, weight) in enumerate(codec.split(block.data, self.spec.bits)):
            groups = self.groups_of(part)
            if groups not in rows:
                rows[groups] = digits.of_fraction(weights[:, :, None] * relative[:, :, groups.start : groups.stop, None])
            found = digits.dot_rows(rows[groups], codes, -2)  # [B, K, n, R, W]
            found = found * (most[:, :, groups.start : groups.stop, None] * (digits.FRACTION_UNIT * weight))
            out.append(jnp.where(self.inside(part), found, 0).sum(2))
        columns = jnp.concatenate([jnp.ones_like(scale[:, :, :1]), zero_point, scale], axis=2)
        return out, _dot(weights, jnp.broadcast_to(columns, (*weights.shape[:2], *columns.shape[2:])), -1)

    def finish(self, total: Any) -> tuple[jax.Array, jax.Array]:
        parts, sums = total
        zero_point, scale = (jnp.repeat(x, self.group, axis=-1) for x in jnp.split(sums[..., 1:], 2, axis=-1))
        lacking = jnp.where(jnp.arange(self.head_dim) >= self.head_dim - self.words, scale * self.middle, 0)
        return self.restored(jnp.concatenate(parts, axis=-1) + zero_point + lacking, sums[..., 0]), sums[..., 0]


@dataclasses.dataclass(frozen=True)
class ChannelGroups(_Coded):
    """Scales per channel and group of tokens: factored into the query for keys, out of the sum over a group's tokens for values."""

    def by_group(self, x: jax.Array) -> jax.Array:
        """[B, K, S, X] as [B, K, S // g, g, X]."""
        assert self.spec.group_size is not None
        return x.reshape(*x.shape[:2], -1, self.spec.group_size, x.shape[-1])

    def query(self, query: jax.Array) -> Any:
        return self.rotated(query), self.mean_score(query)

    def scores(self, operand: Any, block: Tokens) -> jax.Array:
        query, mean_score = operand
        scale, zero_point = _scales(self.spec, block)
        scaled = query[:, :, None] * scale[:, :, :, None]  # [B, K, S // g, R, H]
        fixed, unit = digits.of_signed(scaled)
        score = self.parts(scaled)[-1].sum(-1, keepdims=True) * self.middle
        score = score + jnp.moveaxis(_dot(query, zero_point, -1), -1, -2)[..., None]
        for part, (codes, weight) in zip(self.parts(fixed), codec.split(block.data, self.spec.bits), strict=True):
            score = score + digits.dot(part, self.by_group(codes), -1) * (unit * weight)
        return jnp.moveaxis(score, -2, -3).reshape(*query.shape[:3], -1) + mean_score

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return jnp.zeros((*shape, self.head_dim)), jnp.zeros((*shape, 1))

    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> Any:
        used = self.by_group(valid[:, None, :, None])[..., 0].any(-1)[..., None]  # [B, 1, S // g, 1]
        scale, zero_point = (jnp.where(used, a, 0) for a in _scales(self.spec, block))
        grouped = jnp.swapaxes(self.by_group(jnp.swapaxes(weights, -1, -2)), -1, -2)  # [B, K, S // g, R, g]
        fixed, totals = digits.of_fraction(grouped), jnp.swapaxes(grouped.sum(-1), -1, -2)
        out = []
        words = zip(self.parts(scale), codec.split(block.data, self.spec.bits), strict=True)
        for part_scale, (codes, weight) in words:
            summed = digits.dot(fixed, self.by_group(codes), -2) * part_scale[:, :, :, None]
            out.append(summed.sum(2) * (digits.FRACTION_UNIT * weight))
        lacking = jnp.where(jnp.arange(self.head_dim) >= self.head_dim - self.words, self.middle, 0.0)
        out_all = jnp.concatenate(out, axis=-1) + _dot(totals, zero_point + scale * lacking, -2)
        return out_all, totals.sum(-1, keepdims=True)

    def finish(self, total: Any) -> tuple[jax.Array, jax.Array]:
        return self.restored(total[0], total[1][..., 0]), total[1][..., 0]


def _scales(spec: QuantSpec, block: Tokens) -> tuple[jax.Array, jax.Array]:
    assert block.scale is not None
    return block.scale.astype(jnp.float32), codec.full_zero_point(spec, block.scale, block.zero_point)
