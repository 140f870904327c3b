"""tunix's models and its sampler with our cache, against its own. Not collected by default, since
tunix brings three gigabytes of packages: python -m pytest tests/with_tunix.py"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler

import jaxkv
from jaxkv.integrations.tunix import with_cache

# Three prompts with padding before them, in a buffer of S slots; T tokens in all.
LENGTHS, P, T, S, VOCABULARY = np.array([10, 6, 8]), 10, 20, 24, 64
B, LAYERS, N, K, H = 3, 2, 4, 2, 16
SIZES = dict(num_layers=LAYERS, vocab_size=VOCABULARY, embed_dim=32, hidden_dim=64) | dict(
    num_heads=N, head_dim=H, num_kv_heads=K, norm_eps=1e-6, rope_theta=10000, weight_tying=True
)
FIELDS = dict(model_type="llama", num_hidden_layers=LAYERS, num_attention_heads=N) | dict(
    num_key_value_heads=K, head_dim=H
)
# Preset -> the largest difference of logits, which are about 5.
BOUNDS = {"fp32": 1e-5, "q8": 0.1, "q4": 1.5}
MODELS = {"llama3": ("Llama3", {}), "qwen3": ("Qwen3", {"use_tied_embedding": True})}


def make(name: str) -> Any:
    """A model with random weights, and its family's means of making a cache where it has none."""
    module = importlib.import_module(f"tunix.models.{name}.model")
    known = module.ModelConfig.__dataclass_fields__
    class_name, others = MODELS[name]
    sizes = {key: value for key, value in {**SIZES, **others}.items() if key in known}
    model = getattr(module, class_name)(module.ModelConfig(**sizes), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def weights(x: Any) -> Any:
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(1), x.size), x.shape)
        return 0.2 * drawn if x.ndim > 1 else jnp.ones_like(x, jnp.float32)

    return nnx.merge(graph, jax.tree.map(weights, state))


def own_cache(model: Any) -> dict[str, Any]:
    def zeros() -> Any:
        return jnp.zeros((B, S, K, H))

    return {
        f"layer_{i}": {"k": zeros(), "v": zeros(), "end_index": jnp.zeros(B, jnp.int32)}
        for i in range(LAYERS)
    }


@nnx.jit
def call(model: Any, tokens: Any, positions: Any, cache: Any, mask: Any) -> Any:
    return model(tokens, positions, cache, mask)


def logits(model: Any, cache: Any) -> Any:
    """The prompts in one call, then token by token; zeros where there is padding."""
    tokens = jax.random.randint(jax.random.key(0), (B, T), 1, VOCABULARY)
    first = (P - LENGTHS)[:, None]
    positions = np.maximum(np.arange(T) - first, 0)
    slots = np.arange(S)
    outs = []
    for start, end in [(0, P), *((t, t + 1) for t in range(P, T))]:
        mask = slots <= np.arange(start, end)[None, :, None]
        mask = mask & (slots >= first)[:, None]
        part = (tokens[:, start:end], jnp.asarray(positions[:, start:end]))
        out, cache = call(model, *part, cache, jnp.asarray(mask))
        outs.append(out)
    return jnp.concatenate(outs, axis=1) * (np.arange(T) >= first)[..., None]


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    wanted = logits(make(name), own_cache(make(name)))
    for preset, bound in BOUNDS.items():
        model = with_cache(make(name), jaxkv.layers_of(FIELDS, preset, S, tail_length=4))
        found = logits(model, model.init_cache(B, S, jnp.float32))
        apart, largest = (float(jnp.abs(x).max()) for x in (found - wanted, wanted))
        print(f"{preset}: largest difference {apart:.1e}, largest logit {largest:.1f}")
        assert apart < bound


class Letters:
    """A tokenizer with a token for each letter."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 61 for letter in text]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0


@pytest.mark.parametrize("beam_size", [None, 2])
def test_sampler(beam_size: int | None) -> None:
    """Prompts of unlike lengths, greedily and by beam search: the same tokens as its own cache."""

    def sampled(model: Any) -> list[list[int]]:
        sampler = Sampler(model, Letters(), CacheConfig(32, LAYERS, K, H))
        prompts = ["a cat", "the dogs", "x"]
        found = sampler(prompts, max_generation_steps=10, beam_size=beam_size, eos_tokens=[999])
        return [np.asarray(tokens).tolist() for tokens in found.tokens]

    ours = with_cache(make("qwen3"), jaxkv.layers_of(FIELDS, "fp32", 32))
    assert sampled(ours) == sampled(make("qwen3"))
