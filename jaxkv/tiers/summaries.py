"""What the full pages of a pool hold, in a few numbers: enough to bound the score of any of their
keys, and to say which pages matter.

Elementwise bounds of a page's keys are those of Quest (Tang et al. 2024), here around the mean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.chain import TierSpec
from jaxkv.codec.arithmetic import alone, as_float16, root, tree_sum
from jaxkv.formats import LARGEST_FP16
from jaxkv.softmax import MOST_SCORE
from jaxkv.tiers import tokens
from jaxkv.tiers.pages import Pages
from jaxkv.tiers.place import Index
from jaxkv.tiers.tokens import Tokens
from jaxkv.trees import node


@node
@dataclasses.dataclass(frozen=True)
class Summaries:
    """Of the keys in each page of each kv head, as attention sees them: [N, K, ...], in front the
    layers where there are several. Those of pages that are not full say nothing.

    Keys lie within `mean - unit * below` and `mean + unit * above`, element by element: 4 bytes for
    each channel of a page, 2.8 % of 128 tokens in 4 bits.
    """

    mean: jax.Array  # [N, K, H] float16
    below: jax.Array  # [N, K, H] uint8
    above: jax.Array  # [N, K, H] uint8
    unit: jax.Array  # [N, K] float32
    norm: jax.Array  # [N, K] float32: the mean of the keys' norms

    def of(self, page: jax.Array, layer: Index = None, head: Index = None) -> Summaries:
        """Those of pages of any shape [...]: [..., K, ...], or of one head; of one layer, or of all
        in front."""
        lead = [] if self.unit.ndim == 2 else [slice(None) if layer is None else layer]
        at = (*lead, page) if head is None else (*lead, page, head)
        return Summaries(*(x[at] for x in self._arrays()))

    def put(self, page: jax.Array, layer: Index, new: Summaries) -> Summaries:
        """With those of pages [B] replaced, by [B, K, ...]."""
        at = (page,) if layer is None else (layer, page)
        pairs = zip(self._arrays(), new._arrays(), strict=True)
        return Summaries(*(old.at[at].set(x) for old, x in pairs))

    def scores(self, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What queries [R, H] score with the keys of pages [P] on average, and the most that they
        may score with any, [R, P] each; of one head."""
        means = _products(query, self.mean)
        up, down = jnp.maximum(query, 0), jnp.maximum(-query, 0)
        return means, means + (_products(up, self.above) + _products(down, self.below)) * self.unit

    def _arrays(self) -> tuple[jax.Array, ...]:
        return self.mean, self.below, self.above, self.unit, self.norm


def _products(query: jax.Array, vectors: jax.Array) -> jax.Array:
    exact = lax.Precision.HIGHEST
    return jnp.matmul(query, vectors.astype(jnp.float32).T, precision=exact)


def allocate(num_pages: int, lead: tuple[int, ...], heads: int, head_dim: int) -> Summaries:
    """Of pages that hold nothing; `lead` is the layers, or nothing."""
    shape = (*lead, num_pages, heads)

    def vectors(dtype: Any) -> jax.Array:
        return jnp.zeros((*shape, head_dim), dtype)

    unit, norm = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    return Summaries(vectors(jnp.float16), vectors(jnp.uint8), vectors(jnp.uint8), unit, norm)


def summarized(keys: jax.Array, counted: jax.Array) -> Summaries:
    """The summaries [..., K] of keys [..., S, K, H] float32, of which those `counted` [..., S] are
    some. The same bits in every program."""
    keys = jnp.clip(keys, -MOST_SCORE, MOST_SCORE)
    counted = counted[..., None, None]
    share = 1.0 / jnp.maximum(tree_sum(counted.astype(jnp.float32), -3), 1.0)
    exact = tree_sum(alone(jnp.where(counted, keys, 0.0) * share), -3)
    mean = as_float16(jnp.clip(exact, -LARGEST_FP16, LARGEST_FP16))
    rest = jnp.where(counted, keys - mean, 0.0)
    low, high = (jnp.maximum(side.max(-3), 0.0) for side in (-rest, rest))
    # A little more than a 255th, so that rounding cannot leave the largest outside.
    unit = alone(jnp.maximum(low, high).max(-1) * (1.0 / 254.99))
    per = jnp.where(unit > 0, 1.0 / jnp.where(unit > 0, unit, 1.0), 0.0)[..., None]
    below, above = (jnp.ceil(alone(x * per)).clip(0, 255).astype(jnp.uint8) for x in (low, high))
    peak = jnp.maximum(jnp.abs(keys).max(-1, keepdims=True), 1e-30)
    scaled = keys * (1.0 / peak)
    norms = jnp.where(counted, root(tree_sum(alone(scaled * scaled), -1)) * peak, 0.0)
    norm = tree_sum(alone(norms * share), -3)[..., 0, :, 0]
    return Summaries(mean[..., 0, :, :].astype(jnp.float16), below, above, unit, norm)


def completed(
    held: Summaries,
    keys: Tokens,
    spec: TierSpec,
    pages: Pages,
    written: tuple[jax.Array, jax.Array],
    begin: jax.Array,
    layer: Index,
) -> Summaries:
    """With the summaries of those pages that a write of positions [low, high) [B] has filled, from
    what is stored; positions below `begin` [B] hold nothing.

    Most steps fill none: a page costs what it costs once.
    """
    low, high = ((x - pages.offset) // pages.size for x in written)
    inside = jnp.arange(pages.size, dtype=jnp.int32)

    def one(index: jax.Array, held: Summaries) -> Summaries:
        number = low + index
        position = pages.offset + number[:, None] * pages.size + inside
        slots = number[:, None] % pages.table.shape[1] * pages.size + inside
        found = tokens.read(keys, spec.key, slots, layer, pages)
        turned = tokens.turned_mean_of(keys, spec.rotary, layer)
        found = found if turned is None else found + turned.at(position)
        page, _ = pages.locate(slots[:, :1])
        filled = (number < high) & pages.holds(position[:, 0])
        page = jnp.where(filled, page[:, 0], pages.num_pages)
        return held.put(page, layer, summarized(found, position >= begin[:, None]))

    return lax.fori_loop(0, (high - low).max(), one, held)
