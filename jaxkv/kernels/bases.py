"""What the basis of a tier does to queries, and to what comes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxkv import softmax
from jaxkv.kernels import dispatch
from jaxkv.kernels.queries import Queries
from jaxkv.softmax import Partial
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.segment import Segment
from jaxkv.tiers.tokens import basis_of, turned_mean_of
from jaxkv.tiers.turned import TurnedMean


@dataclasses.dataclass(frozen=True)
class Bases:
    """Those of a segment's keys and values."""

    key: Basis
    value: Basis
    turned: TurnedMean | None

    @classmethod
    def of(cls, part: Segment) -> Bases:
        sides = zip(part.tier.sides, part.spec.formats, strict=True)
        found = [basis_of(held, fmt, part.layer) for held, fmt in sides]
        turned = turned_mean_of(part.tier.keys, part.spec.rotary, part.layer)
        return cls(found[0], found[-1], turned)

    def at(self, row: jax.Array, head: jax.Array) -> Bases:
        """Those of one row and kv head."""
        turned = self.turned and self.turned.alone(row, head)
        return Bases(self.key.at(row, head), self.value.at(row, head), turned)

    def enter(self, own: Queries, implementation: dispatch.Implementation) -> Queries:
        """Queries as they meet codes."""
        mean, turned = self.key.mean_score(own.folded), self.turned
        return dataclasses.replace(
            own,
            folded=dispatch.turned_query(self.key, own.folded, implementation),
            mean_score=mean if mean is None else softmax.bounded(mean * own.unit),
            turned=turned,
            operand=None if turned is None else turned.operand(own.folded) * own.unit,
        )


def in_basis(
    part: Segment,
    bases: Bases,
    own: Queries,
    run: Callable[[Segment, Queries], Partial],
    implementation: dispatch.Implementation = "xla",
) -> Partial:
    """Attention over one segment by `run`, which knows codes, and gives sums of raw values."""
    entered = bases.enter(own, implementation)
    found = run(part.codes_only(), entered)
    top = found.max
    if entered.mean_score is not None and not own.is_capped:
        top = jnp.where(found.sum > 0, top + entered.mean_score[..., 0], top)
    return Partial(found.out[..., : part.spec.value_dim], top, found.sum)
