"""How quantized tiers are multiplied (`readers`): integer products of codes, scales outside."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import codec
from jaxkv.formats import QuantSpec
from jaxkv.kernels import digits
from jaxkv.kernels.floats import dot, zeros
from jaxkv.kernels.materialized import computed_once, laid_out
from jaxkv.tiers.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class _Coded:
    """What the two quantized formats share: a word's parts."""

    never: jax.Array
    head_dim: int
    spec: QuantSpec

    @property
    def words(self) -> int:
        return self.spec.width(self.head_dim)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """[..., H] in pieces of `words`, as the codes are packed; zeros for what fills up the last
        words."""
        lacking = self.words * self.spec.parts - self.head_dim
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lacking)]) if lacking else x
        return jnp.split(x, self.spec.parts, axis=-1)

    def joined(self, parts: list[jax.Array]) -> jax.Array:
        """The inverse of `parts`."""
        return jnp.concatenate(parts, axis=-1)[..., : self.head_dim]

    def codes(self, block: Tokens) -> list[tuple[jax.Array, float]]:
        """A block's codes [B, K, S, W] part by part, with their weights (see `codec.split`)."""
        flat = codec.planes(block.data, self.spec.bits, self.words)
        if len(flat) > 1:  # cut out of short rows once: 2 times Q4's time, 7 otherwise
            flat = computed_once(self.never, flat)
        parts, weights = zip(*codec.split(flat, self.spec.bits), strict=True)
        return list(zip(laid_out(self.never, list(parts), self.words), weights, strict=True))

    def lacking(self, x: jax.Array) -> jax.Array:
        """[..., H] times what the codes of each element lack: those of the last part, or all
        of 3 bits, are short of half their range (see `codec`)."""
        factors = np.zeros(self.head_dim, np.float32)
        signed = 0 if self.spec.bits == 3 else self.words * (self.spec.parts - 1)
        factors[signed:] = 2.0 ** (self.spec.bits - 1)
        return x * factors.reshape(*[1] * (x.ndim - 1), -1)


@dataclasses.dataclass(frozen=True)
class TokenGroups(_Coded):
    """Scales per token: factored out of the sum over the head dim for keys, into the weights for
    values.

    A part of a word may share its group with other parts or hold several. Several are several sets
    of query rows, zero outside their group, over the same codes: rows are cheap, and slicing the
    codes instead copied them at a tenth of the speed.
    """

    @property
    def group(self) -> int:
        return min(
            self.spec.group_size or self.head_dim, self.head_dim
        )  # a group over all heads is one per head here

    @property
    def num_groups(self) -> int:
        return self.head_dim // self.group

    def groups_of(self, part: int) -> range:
        """The groups that a part of a word touches; what fills up the last words counts as the last
        one's."""
        first, last = part * self.words, (part + 1) * self.words - 1
        most = self.num_groups - 1
        return range(min(first // self.group, most), min(last // self.group, most) + 1)

    def inside(self, part: int) -> np.ndarray:
        """Which words of a part belong to which of its groups, [1, 1, n, 1, W] bool."""
        element = part * self.words + np.arange(self.words)
        group = np.minimum(element // self.group, self.num_groups - 1)
        return group == np.array(self.groups_of(part)).reshape(1, 1, -1, 1, 1)

    def query(self, query: jax.Array) -> Any:
        fixed, unit = digits.of_signed(query)
        rows = [
            jnp.where(self.inside(i), x[:, :, None], 0) for i, x in enumerate(self.parts(fixed))
        ]  # [B, K, n, 3 R, W]
        sums = [
            x.reshape(*x.shape[:-1], self.num_groups, self.group).sum(-1)
            for x in (query, self.lacking(query))
        ]
        return rows, jnp.concatenate(sums, axis=-1) / unit, unit

    def scores(self, operand: Any, block: Tokens) -> jax.Array:
        rows, sums, unit = operand
        scale, zero_point = computed_once(self.never, _scales(self.spec, block))
        columns = jnp.concatenate([zero_point, scale], axis=2)
        score = dot(sums, jnp.broadcast_to(columns, (*sums.shape[:2], *columns.shape[2:])), -2)
        for part, (codes, weight) in enumerate(self.codes(block)):
            found = digits.dot_rows(rows[part], codes, -1) * weight  # [B, K, n, R, S]
            for index, group in enumerate(self.groups_of(part)):
                score = score + found[:, :, index] * scale[:, :, group, None]
        return score * unit

    def zeros(self, shape: tuple[int, ...]) -> Any:
        parts = [zeros(*shape, self.words)] * self.spec.parts
        return parts, zeros(*shape, 1 + 2 * self.num_groups)

    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> Any:
        scale, zero_point = computed_once(
            self.never,
            tuple(jnp.where(valid[:, None, None], a, 0.0) for a in _scales(self.spec, block)),
        )
        rows: dict[range, tuple[jax.Array, jax.Array]] = {}
        out = []
        for part, (codes, weight) in enumerate(self.codes(block)):
            groups = self.groups_of(part)
            if groups not in rows:
                # Counted in units of what is summed, weight times scale: the scale of a token that
                # nobody looks at is no measure.
                shares = weights[:, :, None] * scale[:, :, groups.start : groups.stop, None]
                rows[groups] = digits.of_positive(computed_once(self.never, shares))
            counts, unit = rows[groups]
            found = digits.dot_rows(counts, codes, -2) * (unit * weight)  # [B, K, n, R, W]
            out.append(jnp.where(self.inside(part), found, 0.0).sum(2))
        columns = jnp.concatenate([jnp.ones_like(scale[:, :, :1]), zero_point, scale], axis=2)
        return out, dot(
            weights, jnp.broadcast_to(columns, (*weights.shape[:2], *columns.shape[2:])), -1
        )

    def finish(self, total: Any) -> tuple[jax.Array, jax.Array]:
        parts, sums = total
        zero_point, scale = (
            jnp.repeat(x, self.group, axis=-1) for x in jnp.split(sums[..., 1:], 2, axis=-1)
        )
        return self.joined(parts) + zero_point + self.lacking(scale), sums[..., 0]


@dataclasses.dataclass(frozen=True)
class ChannelGroups(_Coded):
    """Scales per channel and group of tokens: factored into the query for keys, out of the sum over
    a group's tokens for values."""

    def by_group(self, x: jax.Array) -> jax.Array:
        """[B, K, S, X] as [B, K, S // g, g, X]."""
        assert self.spec.group_size is not None
        return x.reshape(*x.shape[:2], -1, self.spec.group_size, x.shape[-1])

    def query(self, query: jax.Array) -> Any:
        return query

    def scores(self, operand: Any, block: Tokens) -> jax.Array:
        scale, zero_point = _scales(self.spec, block)
        scaled = operand[:, :, None] * scale[:, :, :, None]  # [B, K, S // g, R, H]
        fixed, unit = digits.of_signed(scaled)
        score = self.lacking(scaled).sum(-1, keepdims=True)
        score = score + jnp.moveaxis(dot(operand, zero_point, -1), -1, -2)[..., None]
        for part, (codes, weight) in zip(self.parts(fixed), self.codes(block), strict=True):
            score = score + digits.dot(part, self.by_group(codes), -1) * (unit * weight)
        return jnp.moveaxis(score, -2, -3).reshape(*operand.shape[:3], -1)

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return zeros(*shape, self.head_dim), zeros(*shape, 1)

    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> Any:
        used = self.by_group(valid[:, None, :, None])[..., 0].any(-1)[
            ..., None
        ]  # [B, 1, S // g, 1]
        scale, zero_point = (jnp.where(used, a, 0) for a in _scales(self.spec, block))
        grouped = jnp.swapaxes(
            self.by_group(jnp.swapaxes(weights, -1, -2)), -1, -2
        )  # [B, K, S // g, R, g]
        (fixed, unit), totals = digits.of_positive(grouped), jnp.swapaxes(grouped.sum(-1), -1, -2)
        out = []
        for part_scale, (codes, weight) in zip(self.parts(scale), self.codes(block), strict=True):
            summed = digits.dot(fixed, self.by_group(codes), -2) * part_scale[:, :, :, None]
            out.append((summed * unit).sum(2) * weight)
        rest = dot(totals, zero_point + self.lacking(scale), -2)
        return self.joined(out) + rest, totals.sum(-1, keepdims=True)

    def finish(self, total: Any) -> tuple[jax.Array, jax.Array]:
        return total[0], total[1][..., 0]


def _scales(spec: QuantSpec, block: Tokens) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points in float32."""
    scale, zero_point = codec.widened(block)
    return scale, codec.full_zero_point(spec.bits, scale, zero_point)
