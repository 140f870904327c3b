"""What a tier learns of a row's keys besides a mirror: their mean before the rotary embedding, and
a factor for each channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkv.chain import TierSpec
from jaxkv.formats import QuantSpec
from jaxkv.reference.formats import Array
from jaxkv.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Of one tier's keys: `mean` [K, H] before the rotary embedding, and `factor` [K, H]."""

    mean: Array
    factor: Array
    rotary: Rotary | None

    def enter(self, keys: Array, positions: Sequence[int]) -> Array:
        """What is quantized of keys [T, K, H]."""
        return ((keys - self.taken_out(positions)) * self.factor).astype(np.float32)

    def leave(self, keys: Array, positions: Sequence[int]) -> Array:
        return (keys / self.factor + self.taken_out(positions)).astype(np.float32)

    def taken_out(self, positions: Sequence[int]) -> Array:
        """The mean turned to its positions [T, K, H]."""
        if self.rotary is None:
            return np.zeros((len(positions), *self.mean.shape))
        return np.stack([turned(self.mean, position, self.rotary) for position in positions])


def neutral(heads: int, head_dim: int) -> Adapted:
    return Adapted(np.zeros((heads, head_dim)), np.ones((heads, head_dim)), None)


def turned(x: Array, position: int, rotary: Rotary) -> Array:
    """x [..., H] turned by the rotary embedding at a position; written as complex numbers."""
    dim = rotary.dim_of(x.shape[-1])
    speed = rotary.base ** (-np.arange(0, dim, 2) / dim)
    speed = speed * (1.0 if rotary.scaling is None else np.asarray(rotary.scaling))
    if rotary.pairing == "halves":
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    else:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    pair = (x[..., first] + 1j * x[..., second]) * np.exp(1j * position * speed)
    out = x.astype(np.float64)
    out[..., first], out[..., second] = pair.real, pair.imag
    return out


def adapted(first: Array, positions: Sequence[int], tier: TierSpec) -> Adapted:
    """What a row whose first keys are `first` [n, K, H] at `positions` teaches a tier."""
    found, spec = neutral(*first.shape[1:]), tier.key
    if not isinstance(spec, QuantSpec):
        return found
    if spec.turned_mean and tier.rotary is not None:
        back = [turned(k, -p, tier.rotary) for k, p in zip(first, positions, strict=True)]
        found = Adapted(np.mean(back, axis=0), found.factor, tier.rotary)
        rest, plain = first - found.taken_out(positions), first - first.mean(0)
        pays = (plain**2).sum((0, 2)) > 3 * (rest**2).sum((0, 2))
        found = dataclasses.replace(found, mean=np.where(pays[:, None], found.mean, 0))
    if spec.balance:
        found = dataclasses.replace(found, factor=factors(found.enter(first, positions)))
    return found


def factors(x: Array) -> Array:
    """About the -1/2 power of the deviations of channels of x [n, K, H], where they are uneven: the
    fourth root of a variance is a quarter of its float's bits."""
    variance = x.astype(np.float64).var(0)
    variance = np.maximum(variance, variance.max(-1, keepdims=True) * 2.0**-20)
    uneven = variance.mean(-1) > 1.5 * np.sqrt(variance).mean(-1) ** 2
    bits = variance.astype(np.float32).view(np.int32).astype(np.int64) // 4
    middle = (bits // 1024).sum(-1, keepdims=True) // x.shape[-1] * 1024
    kept = (0x3F800000 - (bits - middle)) & -(2**20)
    factor = kept.astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(uneven[:, None], factor, 1.0)
