"""gemma, Google DeepMind's package: its Gemma 2 and 3 (`gemma.gm.nn`) with a jaxkv cache.

    caches = CachedGemma(layers_of(model.config, "q4", max_tokens=4096))
    cache = caches.init(batch_size)
    with caches:  # linen's own interception of method calls
        out = model.apply(variables, tokens, cache=cache, positions=caches.positions(cache, tokens))

Its attention is one method, so its projections are written out here once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from gemma.gm.math import _positional_embeddings
from gemma.gm.nn import _modules

import jaxkv
from jaxkv.integrations.dicts import Cache, DictCache


def layers_of(
    config: Any, preset: str, max_tokens: int, **fields: Any
) -> tuple[jaxkv.LayerSpec, ...]:
    """What each layer caches, from the package's own `TransformerConfig`; else as
    `jaxkv.layers_of`."""
    local = _modules.AttentionType.LOCAL_SLIDING
    found = {
        "model_type": "gemma3_text",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.sliding_window_size,
        "attn_logit_softcapping": config.attn_logits_soft_cap,
        "layer_types": [
            "sliding_attention" if kind is local else "full_attention"
            for kind in config.attention_types
        ],
    }
    return jaxkv.layers_of(found, preset, max_tokens, **fields)


class CachedGemma(contextlib.ContextDecorator):
    """The caches of a model's layers. Within `with`, its attention uses them."""

    def __init__(self, layers: Sequence[jaxkv.LayerSpec]) -> None:
        self.layers = tuple(DictCache(spec) for spec in layers)

    def init(self, batch_size: int) -> dict[str, Cache]:
        """Empty caches, in place of `model.init_cache(...)`."""
        return {f"layer_{i}": layer.init(batch_size) for i, layer in enumerate(self.layers)}

    def positions(self, cache: dict[str, Cache], tokens: jax.Array) -> jax.Array:
        """The positions [B, T] of tokens that are to come next, for `apply(positions=)`."""
        end = self.layers[0].state(cache["layer_0"]).end
        return end[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def __enter__(self) -> CachedGemma:
        self._interception = linen.intercept_methods(self._intercept)
        self._interception.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._interception.__exit__(*error)

    def _intercept(self, method: Any, args: Any, named: Any, context: Any) -> Any:
        attention = context.module
        if not isinstance(attention, _modules.Attention) or context.method_name != "__call__":
            return method(*args, **named)
        x, positions, cache, mask = args
        if cache is None:
            return method(*args, **named)
        number = int(attention.path[-2].removeprefix("layer_"))
        query, keys, values = _project(attention, x, positions)
        scale = attention.query_pre_attn_scalar
        cache, out = self.layers[number].extend(cache, query, keys, values, mask, scale=scale)
        return cache, attention.attn_vec_einsum("BTNH,NHD->BTD", out)


def _project(attention: Any, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] of a layer."""
    if attention.use_qkv_einsum:
        query, keys, values = attention.qkv_einsum("BTD,SNDH->SBTNH", x)
    else:
        query = attention.q_einsum("BTD,NDH->BTNH", x)
        keys, values = attention.kv_einsum("BSD,CKDH->CBSKH", x)
    if attention.use_qk_norm:
        query, keys = attention._query_norm(query), attention._key_norm(keys)
    query, keys = (
        _positional_embeddings.apply_rope(
            turned,
            positions,
            base_frequency=attention.rope_base_frequency,
            scale_factor=attention.rope_scale_factor,
        )
        for turned in (query, keys)
    )
    return query, keys, values
