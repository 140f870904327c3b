"""Our cache in other packages' models, against their own cache: equal to float32 rounding when it
holds float32, within what quantization costs else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxkv
from jaxkv.integrations import equinox, flax

pytestmark = pytest.mark.slow

B, D, N, K, H = 2, 32, 4, 2, 8
PROMPT, TOTAL = 6, 14
X = jax.random.normal(jax.random.key(0), (B, TOTAL, D))
SMALL: dict[str, Any] = {"max_tokens": 16, "tail_length": 4}

# Preset -> the largest difference from their outputs, which are about 1.
BOUNDS = {"fp32": 4e-6, "q8": 2e-2, "q4": 2e-1}
slow = {"q8": [pytest.mark.slow], "q4": [pytest.mark.slow]}
presets = pytest.mark.parametrize(
    ("preset", "bound"),
    [pytest.param(*item, marks=slow.get(item[0], []), id=item[0]) for item in BOUNDS.items()],
)


def by_steps(call: Any) -> jax.Array:
    """A prompt in one call, then token by token."""
    outs = [call(X[:, :PROMPT]), *(call(X[:, t : t + 1]) for t in range(PROMPT, TOTAL))]
    return jnp.concatenate(outs, axis=1)


def assert_near(found: Any, wanted: Any, bound: float) -> None:
    """And not equal by accident, where something is quantized. Prints README's figures (-s)."""
    apart = float(jnp.abs(found - wanted).max())
    print(f"largest difference {apart:.1e}, largest output {float(jnp.abs(wanted).max()):.1f}")
    assert apart < bound and (bound < 1e-3 or apart > 1e-6)


# Flax NNX.


class Model(nnx.Module):
    def __init__(self, **options: Any) -> None:
        rngs = nnx.Rngs(0)
        self.attention = nnx.List(
            nnx.MultiHeadAttention(N, D, N * H, num_kv_heads=K, rngs=rngs, **options)
            for _ in range(2)
        )

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        for layer in self.attention:
            x = x + layer(x, mask=mask)
        return x


@nnx.jit
def call(model: Model, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return model(x, mask)


def own_cache() -> jax.Array:
    """Their decode mode: one token at a time."""
    model = Model(decode=True)
    for layer in model.attention:
        layer.init_cache((B, TOTAL, D))
    return jnp.concatenate([call(model, X[:, t : t + 1]) for t in range(TOTAL)], axis=1)


@presets
def test_nnx_attention(preset: str, bound: float) -> None:
    model = flax.with_caches(Model(decode=False), B, preset, **SMALL)
    assert_near(by_steps(lambda x: call(model, x)), own_cache(), bound)


def nnx_caches(model: Model) -> list[flax.KvCache]:
    return [layer.attention_fn for layer in model.attention]


def test_nnx_split_merge_and_verbs() -> None:
    model = flax.with_caches(Model(decode=False), B, "fp32", rewind_length=4, **SMALL)
    call(model, X[:, :PROMPT])
    graph, caches, rest = nnx.split(model, nnx.Cache, ...)
    assert (
        len(jax.tree.leaves(caches))
        == len(jax.tree.leaves(nnx_caches(model)[0].state.get_value())) * 2
    )
    fork = nnx.merge(graph, *jax.tree.map(jnp.copy, (caches, rest)))
    call(model, X[:, PROMPT : PROMPT + 2])
    for cache in nnx_caches(model):
        cache.change(jaxkv.rewind, 2)
    wanted = call(fork, X[:, PROMPT : PROMPT + 1])
    np.testing.assert_array_equal(call(model, X[:, PROMPT : PROMPT + 1]), wanted)


def test_nnx_rows_of_unlike_lengths() -> None:
    """Padding on the left of one row, by the mask: it goes on as the row alone."""
    valid = jnp.arange(PROMPT) >= jnp.asarray([0, 2])[:, None]
    mask = linen.combine_masks(
        linen.make_causal_mask(valid), linen.make_attention_mask(valid, valid), dtype=bool
    )
    model, alone = (flax.with_caches(Model(decode=False), rows, "fp32", **SMALL) for rows in (B, 1))
    found = [call(model, X[:, :PROMPT], mask), call(model, X[:, PROMPT : PROMPT + 1])]
    wanted = [call(alone, X[1:, 2:PROMPT]), call(alone, X[1:, PROMPT : PROMPT + 1])]
    np.testing.assert_allclose(found[0][1, 2:], wanted[0][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1][1], wanted[1][0], rtol=1e-5, atol=1e-6)


def test_nnx_scan() -> None:
    """Over layers, with a stack in the carry; over tokens, with the model in it."""
    config = jaxkv.preset("q8", num_kv_heads=K, head_dim=H, **SMALL)
    stack, single = flax.KvCache(config, B, num_layers=2), flax.KvCache(config, B)
    heads = [
        jax.random.normal(jax.random.key(i), (TOTAL, B, 1, n, H)) for i, n in enumerate((N, K, K))
    ]

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def over_tokens(cache: flax.KvCache, news: Any) -> Any:
        return cache, cache(*news)

    @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=(nnx.Carry, 0))
    def over_layers(cache: flax.KvCache, layer: jax.Array, news: Any) -> Any:
        return cache, cache(*news, layer=layer)

    single, outs = over_tokens(single, heads)
    for t in range(2):
        stack, both = over_layers(stack, jnp.arange(2), [x[t] for x in heads])
        np.testing.assert_allclose(both[0], outs[t], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(both[0], both[1])
    assert single.state.get_value().end.tolist() == [TOTAL] * B


def test_their_own_cache_beside_ours_is_refused() -> None:
    model = flax.with_caches(Model(decode=True), B, "fp32", **SMALL)
    for layer in model.attention:
        layer.init_cache((B, TOTAL, D))
        layer.decode = True
    with pytest.raises(ValueError, match="keys"):
        model(X[:, :1])


# Flax linen.


@presets
def test_linen_attention(preset: str, bound: float) -> None:
    config = jaxkv.preset(preset, num_kv_heads=N, head_dim=H, **SMALL)
    sizes: dict[str, Any] = {"num_heads": N, "qkv_features": N * H}
    ours = linen.MultiHeadDotProductAttention(**sizes, attention_fn=flax.cached_attention(config))
    own = linen.MultiHeadDotProductAttention(**sizes, decode=True)
    variables = ours.init(jax.random.key(1), X[:, :PROMPT])
    theirs = own.init(jax.random.key(1), X) | {"params": variables["params"]}

    def stepper(module: Any, variables: Any) -> Any:
        held = dict(variables)
        apply = jax.jit(lambda v, x: module.apply(v, x, mutable=["cache"]))

        def step(x: jax.Array) -> jax.Array:
            out, changed = apply(held, x)
            held.update(changed)
            return out

        return step

    step = stepper(own, theirs)
    wanted = jnp.concatenate([step(X[:, t : t + 1]) for t in range(TOTAL)], axis=1)
    assert_near(by_steps(stepper(ours, variables)), wanted, bound)


# Equinox.


def equinox_parts(preset: str) -> tuple[Any, Any, equinox.KvCache]:
    theirs = eqx.nn.MultiheadAttention(N, D, key=jax.random.key(2))
    config = jaxkv.preset(preset, num_kv_heads=N, head_dim=D // N, **SMALL)
    return theirs, equinox.CachedAttention(theirs), equinox.KvCache(config)


@presets
def test_equinox_attention(preset: str, bound: float) -> None:
    """Rows by vmap, against their attention with a causal mask."""
    theirs, ours, _ = equinox_parts(preset)
    causal = jnp.tril(jnp.ones((TOTAL, TOTAL), bool))
    wanted = jax.vmap(lambda x: theirs(x, x, x, mask=causal))(X)
    caches = eqx.filter_vmap(lambda _: equinox_parts(preset)[2])(jnp.arange(B))
    step = eqx.filter_jit(eqx.filter_vmap(ours))
    held = [caches]

    def call_rows(x: jax.Array) -> jax.Array:
        out, held[0] = step(x, held[0])
        return out

    assert_near(by_steps(call_rows), wanted, bound)


def test_equinox_serialisation(tmp_path: Path) -> None:
    """A cache on disk by their means goes on bit for bit."""
    _, ours, cache = equinox_parts("q4")
    step = eqx.filter_jit(ours)
    _, cache = step(X[0, :PROMPT], cache)
    eqx.tree_serialise_leaves(tmp_path / "cache.eqx", cache)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "cache.eqx", equinox_parts("q4")[2])
    for one, other in zip(step(X[0, 6:7], cache), step(X[0, 6:7], loaded), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
