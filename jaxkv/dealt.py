"""Attention over a cache that is dealt out over devices: scores by the positions of the whole, and
partial results merged over all devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkv import softmax
from jaxkv.attend import finish, scoring_of
from jaxkv.checks import check_query
from jaxkv.dealing import Deal
from jaxkv.kernels.dispatch import Implementation
from jaxkv.kernels.segments import Parts, over_segments
from jaxkv.padding import Padding
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dealt(Scoring):
    """Scoring of keys that are given by their position on this device."""

    deal: Deal

    def reach(self, query: jax.Array, sink_tokens: int) -> tuple[jax.Array, jax.Array]:
        oldest, newest = super().reach(query, sink_tokens)
        return self.deal.below(oldest), newest

    def visible(self, query: jax.Array, key: jax.Array, sink_tokens: int) -> jax.Array:
        return super().visible(query, self._whole(key), sink_tokens * self.deal.parts)

    def adjust(self, scores: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        return super().adjust(scores, query, self._whole(key))

    def _whole(self, position: jax.Array) -> jax.Array:
        return position * self.deal.parts + self.deal.part


@dataclasses.dataclass(frozen=True)
class Asked:
    """Queries [B, T, N, H] and the options they come with, as the caller gave them; where there is
    `padding`, it has put the queries together, and the options are in the order it undoes."""

    query: jax.Array
    scale: ArrayLike | None
    options: dict[str, Any]
    padding: Padding | None = None


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of queries [B, T, N, H] at `position` [B, T] over what all devices hold."""

    deal: Deal
    query: jax.Array
    position: jax.Array
    scoring: Scoring

    @classmethod
    def of(cls, deal: Deal, asked: Asked, first: jax.Array, count: jax.Array) -> Attention:
        """Of the first `count` [B] queries, at positions `first` [B] and on."""
        config = deal.cache.config
        query = check_query(
            asked.query, deal.cache.batch_size, config.num_kv_heads, config.head_dim
        )
        index = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
        position = jnp.where(index < count[:, None], first[:, None] + index, -1)
        scoring = scoring_of(config, query, asked.scale, asked.options)
        if asked.padding is not None:
            scoring = scoring.reordered(asked.padding.together)
        return cls(deal, query, position, _Dealt(**vars(scoring), deal=deal))

    def over(self, parts: Parts) -> Partial:
        """Over segments of this device."""
        # The GPU kernel takes positions as they are; dealt out, they are for `_Dealt` to interpret.
        implementation: Implementation = "xla" if self.deal.parts > 1 else None
        sink_tokens = self.deal.cache.config.sink_tokens if self.scoring.window_sinks else 0
        return over_segments(
            parts, self.query, self.position, self.scoring, sink_tokens, implementation
        )

    def merged(self, partials: list[Partial], return_lse: bool) -> Any:
        """Over the tokens of all devices: outputs like the query."""
        merged = softmax.merge(partials)
        if self.deal.axis is not None:
            merged = softmax.merge_over(self.deal.axis, merged)
        return finish([merged], self.scoring, self.query, return_lse)
