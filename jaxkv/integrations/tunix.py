"""tunix (google-tunix): its Llama 3 and Qwen 3 with a jaxkv cache, its sampler and beam search
included.

    model = with_cache(model, jaxkv.layers_of(config, "q4", max_tokens=4096))
    sampler = Sampler(transformer=model, ...)

The attention's body is one method, so its projections are written out here once more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

import jaxkv
from jaxkv.integrations.dicts import Cache, DictCache


class CachedAttention(nnx.Module):
    """One layer's attention: its weights, our cache."""

    def __init__(self, attn: Any, spec: jaxkv.LayerSpec) -> None:
        self.attn = attn
        self.cache = nnx.static(DictCache(spec))

    def __call__(
        self,
        x: jax.Array,
        segment_pos: jax.Array,
        cache: Cache | None,
        attn_mask: jax.Array | None,
        **others: Any,
    ) -> tuple[Cache | None, jax.Array]:
        attn = self.attn
        if cache is None:
            return attn(x, segment_pos, cache, attn_mask, **others)
        rotate = sys.modules[type(attn).__module__].apply_rope
        query, keys, values = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
        if hasattr(attn, "q_norm"):
            query, keys = attn.q_norm(query), attn.k_norm(keys)
        query, keys = (rotate(p, segment_pos, head_dim=attn.head_dim) for p in (query, keys))
        cache, out = self.cache.extend(cache, query, keys, values, attn_mask, scale=attn.scale)
        return cache, attn.o_proj(out)


def with_cache(model: Any, layers: Sequence[jaxkv.LayerSpec]) -> Any:
    """The model, changed in place: `model.init_cache` and its layers' attention are ours."""
    for layer, spec in zip(model.layers, layers, strict=True):
        layer.attn = CachedAttention(layer.attn, spec)
    caches = [layer.attn.cache for layer in model.layers]

    def init_cache(batch_size: int, cache_size: int, dtype: Any) -> dict[str, Cache]:
        return {f"layer_{i}": cache.init(batch_size) for i, cache in enumerate(caches)}

    model.init_cache = nnx.static(init_cache)
    return model
