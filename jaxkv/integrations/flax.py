"""Flax: a cache as an NNX module or a linen one, in the place of the `attention_fn` of its own
attention modules.

    attention = nnx.MultiHeadAttention(..., attention_fn=KvCache(config, batch), decode=False)
    attention = nn.MultiHeadDotProductAttention(..., attention_fn=cached_attention(config))

`decode=False`, since their own cache would run besides: it gives the `attention_fn` the whole of
its buffer, which is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jaxkv


class KvCache(nnx.Module):
    """A cache that changes in place, like every NNX module: `nnx.jit`, `nnx.split`, `nnx.scan` and
    `nnx.state` carry it as one variable of the type `nnx.Cache`.

    Called with queries [B, T, N, H], keys and values [B, T, K, H] it attends, and remembers them.
    Of a `mask` [B, 1, T, T] its diagonal counts: a token that may not see itself is padding, and
    never enters. There is no dropout.
    """

    def __init__(
        self,
        config: jaxkv.KvCacheConfig,
        batch_size: int = 1,
        num_layers: int | None = None,
        **options: Any,
    ) -> None:
        """`options` as for `attend`: window, soft_cap, ..."""
        self.state = nnx.Cache(jaxkv.init(config, batch_size, num_layers))
        self.options = options

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        layer: Any = None,
        **_: Any,
    ) -> jax.Array:
        held, valid = self.state.get_value(), _valid(mask)
        state, out = jaxkv.extend(held, query, key, value, valid, layer=layer, **self.options)
        self.state.set_value(state)
        return out

    def change(self, verb: Callable[..., jaxkv.CacheState], *args: Any) -> None:
        """Another verb in place: `cache.change(jaxkv.rewind, 3)`."""
        self.state.set_value(verb(self.state.get_value(), *args))


def with_caches(model: nnx.Module, batch_size: int, preset: str = "q4", **fields: Any) -> Any:
    """The model, changed in place: each `nnx.MultiHeadAttention` in it has a cache of its own.

    Args:
      **fields: of `KvCacheConfig`, over the preset's; the heads are the module's.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            heads = {"num_kv_heads": module.num_kv_heads, "head_dim": module.head_dim}
            config = jaxkv.preset(preset, **heads, **fields)
            module.attention_fn = nnx.data(KvCache(config, batch_size))
            module.decode = False
    return model


class LinenKvCache(linen.Module):
    """The same for linen: the state is the variable "state" of the collection "cache"."""

    config: jaxkv.KvCacheConfig
    options: tuple[tuple[str, Any], ...] = ()

    @linen.compact
    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        state = self.variable("cache", "state", jaxkv.init, self.config, query.shape[0])
        options = dict(self.options)
        new, out = jaxkv.extend(state.value, query, key, value, _valid(mask), **options)
        if not self.is_initializing():
            state.value = new
        return out


def cached_attention(config: jaxkv.KvCacheConfig, **options: Any) -> Callable[..., jax.Array]:
    """An `attention_fn` for linen's attention modules; apply them with `mutable=["cache"]`."""

    def attention(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        **_: Any,
    ) -> jax.Array:
        module = LinenKvCache(config, tuple(options.items()), name="kv_cache")
        return module(query, key, value, mask)

    return attention


def _valid(mask: jax.Array | None) -> jax.Array | None:
    """Which tokens [B, T] are no padding, by a mask [B, N or 1, T, T]."""
    return None if mask is None else jnp.diagonal(mask[:, 0], axis1=1, axis2=2).astype(bool)
