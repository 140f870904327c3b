"""gemma's transformers with our cache, against its own. Not collected by default, since gemma brings
three gigabytes of packages: python -m pytest tests/with_gemma.py"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma.gm.nn import _config, _modules, _transformer

from jaxkv.integrations.gemma import CachedGemma, layers_of

LOCAL, GLOBAL = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
B, P, T = 2, 12, 28
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 1, 64)
CAUSAL = jnp.tril(jnp.ones((B, T, T), bool))
# Name -> soft cap, kv heads, norm of queries and keys.
MODELS: dict[str, tuple[Any, ...]] = {
    "Gemma 2, GQA": (50.0, 2, False),
    "Gemma 3, MQA": (None, 1, True),
}
# Preset -> the largest difference of logits, which are about 10.
BOUNDS = {"fp32": 1e-5, "q8": 0.15, "q4": 1.5}


def make(soft_cap: float | None, kv_heads: int, use_qk_norm: bool) -> tuple[Any, Any]:
    config = _config.TransformerConfig(
        num_embed=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=16,
        num_kv_heads=kv_heads,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[LOCAL, LOCAL, GLOBAL, LOCAL],
        attn_logits_soft_cap=soft_cap,
        sliding_window_size=8,
        use_qk_norm=use_qk_norm,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
    )
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    params = model.init(jax.random.key(1), TOKENS[:, :4])["params"]

    def weights(x: Any) -> Any:
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(2), x.size), x.shape)
        return drawn * (0.3 if x.ndim > 1 else 0.1)

    return model, jax.tree.map(weights, params)


def logits(model: Any, params: Any, cache: Any, positions: Any) -> Any:
    """A prompt in one call, then token by token."""
    step = jax.jit(
        lambda tokens, cache, mask: model.apply(
            {"params": params},
            tokens,
            cache=cache,
            positions=positions(cache, tokens),
            attention_mask=mask,
        )
    )
    outs = []
    for start, end in [(0, P), *((t, t + 1) for t in range(P, T))]:
        out = step(TOKENS[:, start:end], cache, CAUSAL[:, start:end])
        cache = out.cache
        outs.append(out.logits)
    return jnp.concatenate(outs, axis=1)


def own_positions(cache: Any, tokens: Any) -> Any:
    return cache["layer_0"]["end_index"][:, None] + jnp.arange(tokens.shape[1])


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits(options: tuple[Any, ...]) -> None:
    model, params = make(*options)
    own = model.init_cache(batch_size=B, dtype=jnp.float32, cache_length=T)
    wanted = logits(model, params, own, own_positions)
    for preset, bound in BOUNDS.items():
        caches = CachedGemma(layers_of(model.config, preset, T, tail_length=4))
        with caches:
            found = logits(model, params, caches.init(B), caches.positions)
        apart, largest = (float(jnp.abs(x).max()) for x in (found - wanted, wanted))
        print(f"{preset}: largest difference {apart:.1e}, largest logit {largest:.1f}")
        assert apart < bound


def test_rows_of_unlike_lengths() -> None:
    """A prompt with padding after it (token 0) goes on as the row does without any cache."""
    model, params = make(*MODELS["Gemma 3, MQA"])
    caches = CachedGemma(layers_of(model.config, "fp32", T))
    cache, size = caches.init(B), P - 3
    prompt = TOKENS[:, :P].at[1, size:].set(0)
    mask = CAUSAL[:, :P, :P] & (prompt != 0)[:, None]
    row = jnp.concatenate([TOKENS[1:, :size], TOKENS[1:, P : P + 4]], axis=1)
    wanted = model.apply({"params": params}, row).logits
    with caches:
        for tokens, seen in [
            (prompt, mask),
            *((TOKENS[:, t : t + 1], None) for t in range(P, P + 4)),
        ]:
            positions = caches.positions(cache, tokens)
            out = model.apply(
                {"params": params}, tokens, cache=cache, positions=positions, attention_mask=seen
            )
            cache = out.cache
    np.testing.assert_allclose(out.logits[1, 0], wanted[0, -1], rtol=0, atol=1e-5)
