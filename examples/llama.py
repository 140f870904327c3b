"""A Llama in pure JAX whose attention is a parameter: through a jaxkv cache, or without any.

Axis letters: B batch, T new tokens, N query heads, K kv heads, H head dim, L layers, D model width,
F feed-forward width, V vocabulary. Activations are `[B, T, D]`; every matrix is `[out, in]`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxkv


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float
    norm_eps: float


class Layer(NamedTuple):
    """The weights of one layer, or of all layers stacked with a leading L."""

    attention_norm: Array  # [D]
    query: Array  # [N * H, D]
    key: Array  # [K * H, D]
    value: Array  # [K * H, D]
    output: Array  # [D, N * H]
    ffn_norm: Array  # [D]
    gate: Array  # [F, D]
    up: Array  # [F, D]
    down: Array  # [D, F]


class Params(NamedTuple):
    embedding: Array  # [V, D], also the output projection
    layers: Layer | tuple[Layer, ...]  # stacked: a scan over layers; a tuple: unrolled
    norm: Array  # [D]


# attention(state, query [B, T, N, H], keys [B, T, K, H], values [B, T, K, H], layer=i)
# returns the state and the output [B, T, N, H]. The state is the cache of all layers, or None.
State = Any
Index = int | Array
Attended = tuple[State, Array]
Attention = Callable[..., Attended]


def cached(state: State, query: Array, keys: Array, values: Array, *, layer: Index) -> Attended:
    """The tokens enter the cache, and the queries attend over what it then holds: decoding."""
    state = jaxkv.append(state, keys, values, layer=layer)
    return state, jaxkv.attend(state, query, layer=layer)


def prefilled(state: State, query: Array, keys: Array, values: Array, *, layer: Index) -> Attended:
    """The queries attend exactly, then the tokens enter the cache: a prompt."""
    return jaxkv.prefill(state, query, keys, values, layer=layer)


def uncached(state: State, query: Array, keys: Array, values: Array, *, layer: Index) -> Attended:
    """The whole sequence attends to itself, without any cache."""
    return state, jax.nn.dot_product_attention(query, keys, values, is_causal=True)


def skipped(state: State, query: Array, keys: Array, values: Array, *, layer: Index) -> Attended:
    """No attention at all, to time a step without its cache; the sum keeps all three projections in
    use."""
    return state, query + jnp.repeat(keys + values, query.shape[2] // keys.shape[2], axis=2)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def project(x: Array, weight: Array) -> Array:
    """x [..., in], weight [out, in] -> [..., out]; XLA:CPU copies the weight for `x @ weight.T`."""
    return jnp.einsum("...i,oi->...o", x, weight)


def rotary_angles(config: LlamaConfig, positions: Array) -> Array:
    """positions [B, T] -> angles [B, T, 1, H / 2]"""
    exponents = jnp.arange(0, config.head_dim, 2) / config.head_dim
    return positions[..., None, None] * config.rope_base**-exponents


def rotate(x: Array, angles: Array) -> Array:
    """Rotates the interleaved pairs (0, 1), (2, 3), ... of the last axis: x [B, T, heads, H]."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def run_layer(
    config: LlamaConfig, weights: Layer, state: State, x: Array, angles: Array, attend: Attention
) -> tuple[State, Array]:
    """One transformer layer: x [B, T, D] -> state, x [B, T, D]."""

    def heads(weight: Array) -> Array:  # [out, D] -> [B, T, out / H, H]
        return project(normed, weight).reshape(*x.shape[:2], -1, config.head_dim)

    normed = rms_norm(x, weights.attention_norm, config.norm_eps)
    query, keys = rotate(heads(weights.query), angles), rotate(heads(weights.key), angles)
    state, attended = attend(state, query, keys, heads(weights.value))
    x = x + project(attended.reshape(*x.shape[:2], -1), weights.output)
    normed = rms_norm(x, weights.ffn_norm, config.norm_eps)
    x = x + project(
        jax.nn.silu(project(normed, weights.gate)) * project(normed, weights.up), weights.down
    )
    return state, x


def forward(
    config: LlamaConfig, params: Params, state: State, tokens: Array, attention: Attention = cached
) -> tuple[State, Array]:
    """Runs tokens [B, T], which follow what the cache holds, and returns the state and hidden [B,
    T, D]."""
    start = 0 if state is None else state.end[0][:, None]  # layers agree between calls
    angles = rotary_angles(config, start + jnp.arange(tokens.shape[1])[None])

    def step(carry: Attended, layer: tuple[Index, Layer]) -> tuple[Attended, None]:
        (state, x), (index, weights) = carry, layer
        return run_layer(config, weights, state, x, angles, partial(attention, layer=index)), None

    carry = state, params.embedding[tokens]
    if isinstance(params.layers, Layer):
        carry, _ = jax.lax.scan(step, carry, (jnp.arange(config.num_layers), params.layers))
    else:
        for layer in enumerate(params.layers):
            carry, _ = step(carry, layer)
    state, x = carry
    return state, rms_norm(x, params.norm, config.norm_eps)


def logits(params: Params, hidden: Array) -> Array:
    """hidden [..., D] -> logits [..., V]"""
    return project(hidden, params.embedding)


def stack_layers(params: Params) -> Params:
    """The same weights for a scan over layers: quick to compile, but XLA:CPU copies each layer it
    reads."""
    if isinstance(params.layers, Layer):
        return params
    return params._replace(layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers))


def sample(key: Array, scores: Array, temperature: Array) -> Array:
    """scores [B, V] -> tokens [B]; a temperature of zero takes the likeliest."""
    likeliest = jnp.argmax(scores, axis=-1)
    drawn = jax.random.categorical(key, scores / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, likeliest).astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "attention"), donate_argnames="state")
def prefill(
    config: LlamaConfig,
    params: Params,
    state: State,
    tokens: Array,
    attention: Attention = prefilled,
) -> tuple[State, Array]:
    """Takes a prompt [B, T] into the cache and returns the state and the next token's logits [B,
    V]."""
    state, hidden = forward(config, params, state, tokens, attention)
    return state, logits(params, hidden[:, -1])


@partial(jax.jit, static_argnames=("config", "length", "attention"), donate_argnames="state")
def decode(
    config: LlamaConfig,
    params: Params,
    state: State,
    token: Array,
    key: Array,
    temperature: Array,
    *,
    length: int,
    attention: Attention = cached,
) -> tuple[State, Array]:
    """Decodes `length` tokens after token [B] in one loop, and returns the state and tokens [B,
    length]."""

    def step(carry: Attended, step_key: Array) -> tuple[Attended, Array]:
        state, token = carry
        state, hidden = forward(config, params, state, token[:, None], attention)
        token = sample(step_key, logits(params, hidden[:, 0]), temperature)
        return (state, token), token

    (state, _), tokens = jax.lax.scan(step, (state, token), jax.random.split(key, length))
    return state, tokens.T
