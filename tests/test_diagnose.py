"""A cache says which of its layers lose, from the exact tokens in its tail."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from laws import norms

import jaxkv
from jaxkv import QuantSpec, Rotary, reference

pytestmark = pytest.mark.slow

HEADS, DIM, TAIL, LENGTH = 2, 32, 64, 100
PLAIN = QuantSpec(4, 32, rotate=True, align=True)


def config(**fields: object) -> jaxkv.KvCacheConfig:
    given = {"tail_length": TAIL, "max_tokens": 256, "num_kv_heads": HEADS, "head_dim": DIM}
    return jaxkv.KvCacheConfig(**{**given, **fields})


def tokens(rng: np.random.Generator, length: int = LENGTH) -> np.ndarray:
    return rng.normal(size=(1, length, HEADS, DIM)).astype(np.float32)


def biased(keys: np.ndarray) -> np.ndarray:
    """Keys with a bias of norm 300 before the rotary embedding."""
    bias = np.full((HEADS, DIM), 300 * DIM**-0.5)
    return (
        keys + np.stack([reference.turned(bias, p, Rotary()) for p in range(keys.shape[1])])
    ).astype(np.float32)


def layered(settings: jaxkv.KvCacheConfig, layers: list[np.ndarray]) -> jaxkv.CacheState:
    state, append = jaxkv.init(settings, num_layers=len(layers)), jax.jit(jaxkv.append)
    for layer, keys in enumerate(layers):
        state = append(state, keys, keys[:, ::-1], layer=layer)
    return state


def test_errors_are_those_of_the_store(rng: np.random.Generator) -> None:
    """Of tokens of one kind the tail's error is the store's."""
    keys, values = tokens(rng, 256), tokens(rng, 256)
    settings = config(max_tokens=300, tail_length=128)
    state = jax.jit(jaxkv.append)(jaxkv.init(settings), keys, values)
    found, held = jaxkv.diagnose(state), jaxkv.gather(state)
    missed = norms(np.asarray(held[0])[:, :256] - keys)[0, :128]
    expected = np.sqrt((missed**2).mean(0) / DIM)
    np.testing.assert_allclose(found.key_error[0], expected, rtol=0.1)
    lost = norms(np.asarray(held[1])[:, :256] - values)[0, :128]
    relative = np.sqrt((lost**2).mean(0) / (norms(values)[0, 128:] ** 2).mean(0))
    np.testing.assert_allclose(found.value_error[0], relative, rtol=0.1)


def test_layers_that_lose_are_named_and_kept_exact(rng: np.random.Generator) -> None:
    layers = [tokens(rng) for _ in range(3)]
    layers[1] = biased(layers[1])
    found = jaxkv.diagnose(layered(config(), layers))
    assert found.key_error.shape == (3, 1, HEADS)
    assert found.losing().tolist() == [1]
    configs = jaxkv.exact_layers(config(), found, 1)
    assert [c == config() for c in configs] == [True, False, True]
    assert not isinstance(configs[1].chain[-1].key, QuantSpec)


def test_a_known_embedding_cures_it(rng: np.random.Generator) -> None:
    layers = [biased(tokens(rng))]
    assert jaxkv.diagnose(layered(config(), layers)).losing().tolist() == [0]
    assert jaxkv.diagnose(layered(config(rotary=Rotary()), layers)).losing().tolist() == []


@pytest.mark.parametrize("length", [1, 40, 64])
def test_an_empty_store_is_diagnosed_by_the_tail(length: int, rng: np.random.Generator) -> None:
    state = jax.jit(jaxkv.append)(jaxkv.init(config()), tokens(rng, length), tokens(rng, length))
    found = jaxkv.diagnose(state)
    assert (np.asarray(found.key_error) < 0.3).all()
    assert jaxkv.stats(state).store_tokens.tolist() == [0]


def test_channel_groups_are_diagnosed_whole(rng: np.random.Generator) -> None:
    settings = config(
        key_quant=QuantSpec(4, 16, "channel"), migration="batched", migration_batch=16
    )
    found = jaxkv.diagnose(jax.jit(jaxkv.append)(jaxkv.init(settings), tokens(rng), tokens(rng)))
    assert (np.asarray(found.key_error) < 0.15).all()


def test_what_has_no_store_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="nothing to diagnose"):
        jaxkv.diagnose(jaxkv.init(config(store_precision="fp16")))
    found = jaxkv.diagnose(layered(config(), [tokens(rng)]))
    with pytest.raises(ValueError, match="there are 1 layers"):
        jaxkv.exact_layers(config(), found, 2)
