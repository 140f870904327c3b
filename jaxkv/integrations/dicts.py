"""Models that pass a dict of arrays for each layer, a mask from outside, and prompts with padding:
the pattern of gemma, tunix, and many that were copied from them.

Their layer's cache is {"k", "v", "end_index"}; ours is {"end_index", "0", "1", ...}, the arrays of
a `CacheState`, so that what selects rows of it, donates it or counts it goes on working. Rows are
ragged here: padding, on either side, never enters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxkv

Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DictCache:
    """One layer's cache as a dict of arrays [B, ...]: what is fixed about it."""

    spec: jaxkv.LayerSpec

    @property
    def config(self) -> jaxkv.KvCacheConfig:
        if self.spec.config is None:
            raise ValueError("the layer has no config: make its spec with `layers_of`")
        return self.spec.config

    def init(self, batch_size: int) -> Cache:
        """An empty one."""
        state = jaxkv.init(self.config, batch_size)
        return self._dict(state, jnp.zeros(batch_size, jnp.int32))

    def state(self, cache: Cache) -> jaxkv.CacheState:
        """The state whose arrays these are."""
        leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: jaxkv.init(self.config)))
        return jax.tree.unflatten(tree, [cache[str(i)] for i in range(len(leaves))])

    def extend(
        self,
        cache: Cache,
        query: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: jax.Array | None = None,
        **options: Any,
    ) -> tuple[Cache, jax.Array]:
        """Attention of T new tokens, which the cache then holds; `options` as for `attend`.

        Args:
          mask: [B, T, S] bool over the slots that the model believes in, of which the new tokens
            take `end_index` to `end_index + T`; a token that may not see itself is padding.
        """
        size, start = query.shape[1], cache["end_index"]
        valid = None
        if mask is not None and size > 1:
            first = start if mask.shape[-1] > size else 0  # a mask of the new tokens alone
            valid = jaxkv.valid_from_mask(mask, self.state(cache), first=first)
        options = {**self.spec.options(), **options}
        state, out = jaxkv.extend(self.state(cache), query, keys, values, valid, **options)
        return self._dict(state, start + size), out

    def rewind(self, cache: Cache, count: Any) -> Cache:
        """Takes back the newest tokens, `count` (int or [B]) of them."""
        state = jaxkv.rewind(self.state(cache), count)
        return self._dict(state, cache["end_index"] - count)

    def _dict(self, state: jaxkv.CacheState, end_index: jax.Array) -> Cache:
        arrays = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        return {"end_index": end_index, **arrays}
