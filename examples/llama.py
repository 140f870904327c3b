"""A Llama, Qwen or Gemma in pure JAX whose attention is a parameter: through a jaxkv cache, or
without any.

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
    rope_halves: bool = False  # turns the pairs (i, i + H / 2), not (2 i, 2 i + 1)
    rope_factors: tuple[float, ...] | None = None  # [H / 2], by which frequencies are divided
    embedding_scale: float = 1.0
    gelu: bool = False  # in place of SiLU
    window: int | None = None  # of all layers but every `global_every`th
    window_rope_base: float = 1e4  # of those layers
    global_every: int = 6

    @property
    def rotary(self) -> jaxkv.Rotary:
        """The rotary embedding, as a cache is told of it."""
        bases = [
            self.rope_base if (i + 1) % self.global_every == 0 else self.window_rope_base
            for i in range(self.num_layers)
        ]
        factors = self.rope_factors
        return jaxkv.Rotary(
            self.rope_base,
            "halves" if self.rope_halves else "interleaved",
            None if factors is None else tuple(1 / factor for factor in factors),
            layer_bases=None if self.window is None else tuple(bases),
        )


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
    query_bias: Array | None = None  # [N * H], Qwen 2
    key_bias: Array | None = None  # [K * H]
    value_bias: Array | None = None
    query_norm: Array | None = None  # [H], Qwen 3 and Gemma 3
    key_norm: Array | None = None
    attention_post_norm: Array | None = None  # [D], Gemma 3
    ffn_post_norm: Array | None = None


class Params(NamedTuple):
    embedding: Array  # [V, D], also the output projection unless there is a head
    layers: Layer | tuple[Layer, ...]  # stacked: a scan over layers; a tuple: unrolled
    norm: Array  # [D]
    head: Array | None = None  # [V, D]


# attention(state, query [B, T, N, H], keys [B, T, K, H], values [B, T, K, H], layer=i)
# returns the state and the output [B, T, N, H]. The state is the cache of all layers, or None. A model
# whose layers have windows gives `window=` besides, a traced int32.
State = Any
Index = int | Array
Attended = tuple[State, Array]
Attention = Callable[..., Attended]


def cached(
    state: State, query: Array, keys: Array, values: Array, *, layer: Index, **options: Any
) -> Attended:
    """The tokens enter the cache, and the queries attend over what it then holds: decoding."""
    state = jaxkv.append(state, keys, values, layer=layer)
    return state, jaxkv.attend(state, query, layer=layer, **options)


def prefilled(
    state: State, query: Array, keys: Array, values: Array, *, layer: Index, **options: Any
) -> Attended:
    """The queries attend exactly, then the tokens enter the cache: a prompt."""
    return jaxkv.prefill(state, query, keys, values, layer=layer, **options)


def uncached(
    state: State,
    query: Array,
    keys: Array,
    values: Array,
    *,
    layer: Index,
    window: Index | None = None,
    window_sinks: bool = True,
) -> Attended:
    """The whole sequence attends to itself, without any cache."""
    age = jnp.arange(query.shape[1])[:, None] - jnp.arange(query.shape[1])
    mask = None if window is None else (age < window)[None, None]
    return state, jax.nn.dot_product_attention(query, keys, values, mask=mask, is_causal=True)


def skipped(
    state: State, query: Array, keys: Array, values: Array, *, layer: Index, **options: Any
) -> Attended:
    """No attention at all, to time a step without its cache; the sum keeps all three projections in
    use."""
    return state, query + jnp.repeat(keys + values, query.shape[2] // keys.shape[2], axis=2)


def caches_of(config: LlamaConfig, preset: str, max_tokens: int, **fields: Any) -> Any:
    """What each layer caches, as `jaxkv.layers_of` reads it from the fields of a config."""
    has_windows = config.window is not None
    return jaxkv.layers_of(
        {
            "model_type": "gemma3_text" if has_windows else "llama",
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "query_pre_attn_scalar": config.head_dim,
            "sliding_window": config.window,
            "sliding_window_pattern": config.global_every if has_windows else None,
        },
        preset,
        max_tokens,
        **fields,
    )


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def project(x: Array, weight: Array) -> Array:
    """x [..., in], weight [out, in] -> [..., out]; XLA:CPU copies the weight for `x @ weight.T`."""
    return jnp.einsum("...i,oi->...o", x, weight)


def rotary_angles(config: LlamaConfig, positions: Array, base: float | None = None) -> Array:
    """positions [B, T] -> angles [B, T, 1, H / 2]"""
    exponents = jnp.arange(0, config.head_dim, 2) / config.head_dim
    factors = 1.0 if config.rope_factors is None else jnp.array(config.rope_factors)
    return positions[..., None, None] * (base or config.rope_base) ** -exponents / factors


def rotate(x: Array, angles: Array, halves: bool = False) -> Array:
    """Rotates pairs of the last axis: x [B, T, heads, H]; (0, 1), (2, 3), ..., or those of two
    `halves`."""
    first, second = jnp.split(x, 2, axis=-1) if halves else (x[..., ::2], x[..., 1::2])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = first * cos - second * sin, first * sin + second * cos
    if halves:
        return jnp.concatenate(turned, axis=-1)
    return jnp.stack(turned, axis=-1).reshape(x.shape)


def run_layer(
    config: LlamaConfig, weights: Layer, state: State, x: Array, angles: Array, attend: Attention
) -> tuple[State, Array]:
    """One transformer layer: x [B, T, D] -> state, x [B, T, D]."""

    def norm(x: Array, weight: Array | None) -> Array:
        return x if weight is None else rms_norm(x, weight, config.norm_eps)

    def heads(weight: Array, bias: Array | None) -> Array:  # [out, D] -> [B, T, out / H, H]
        x = project(normed, weight)
        x = x if bias is None else x + bias
        return x.reshape(*x.shape[:2], -1, config.head_dim)

    normed = norm(x, weights.attention_norm)
    query = norm(heads(weights.query, weights.query_bias), weights.query_norm)
    keys = norm(heads(weights.key, weights.key_bias), weights.key_norm)
    query, keys = (rotate(side, angles, config.rope_halves) for side in (query, keys))
    state, attended = attend(state, query, keys, heads(weights.value, weights.value_bias))
    added = project(attended.reshape(*x.shape[:2], -1), weights.output)
    x = x + norm(added, weights.attention_post_norm)
    normed = norm(x, weights.ffn_norm)
    gate = project(normed, weights.gate)
    gate = jax.nn.gelu(gate) if config.gelu else jax.nn.silu(gate)
    added = project(gate * project(normed, weights.up), weights.down)
    return state, x + norm(added, weights.ffn_post_norm)


def forward(
    config: LlamaConfig,
    params: Params,
    state: State,
    tokens: Array,
    attention: Attention = cached,
    positions: Array | None = None,
) -> tuple[State, Array]:
    """Runs tokens [B, T], which follow what the cache holds (or stand at `positions` [B, T]), and
    returns the state and hidden [B, T, D]."""
    size = tokens.shape[1]
    if positions is None:
        positions = jnp.arange(size)[None] if state is None else jaxkv.positions(state, size)
    angles = rotary_angles(config, positions)
    by_layer = isinstance(state, jaxkv.Layers)  # each with its own window

    def of_layer(index: Index, like: int) -> tuple[Array, Attention]:
        if config.window is None:
            return angles, partial(attention, layer=(like, index) if by_layer else index)
        local = rotary_angles(config, positions, config.window_rope_base)
        if by_layer:
            is_global = (like + 1) % config.global_every == 0
            return angles if is_global else local, partial(attention, layer=(like, index))
        is_global = (index + 1) % config.global_every == 0
        window = jnp.where(is_global, jnp.iinfo(jnp.int32).max, config.window)
        options = dict(layer=index, window=window, window_sinks=False)
        return jnp.where(is_global, angles, local), partial(attention, **options)

    def step(carry: Attended, index: Index, like: int, weights: Layer) -> Attended:
        return run_layer(config, weights, *carry, *of_layer(index, like))

    # A scan needs layers that are alike: with windows by layer, whole periods of them.
    period = config.global_every if by_layer and config.window is not None else 1

    def block(carry: Attended, inputs: tuple[Array, Layer]) -> tuple[Attended, None]:
        first, weights = inputs

        def local(carry: Attended, inputs: tuple[Array, Layer]) -> tuple[Attended, None]:
            return step(carry, first + inputs[0], 0, inputs[1]), None

        if period > 1:
            those = jax.tree.map(lambda leaf: leaf[:-1], weights)
            carry, _ = jax.lax.scan(local, carry, (jnp.arange(period - 1), those))
        last = jax.tree.map(lambda leaf: leaf[-1], weights)
        return step(carry, first + period - 1, period - 1, last), None

    carry = state, params.embedding[tokens] * config.embedding_scale
    layers = params.layers
    scanned = config.num_layers - config.num_layers % period if isinstance(layers, Layer) else 0
    if isinstance(layers, Layer):
        blocks = jax.tree.map(
            lambda leaf: leaf[:scanned].reshape(-1, period, *leaf.shape[1:]), layers
        )
        carry, _ = jax.lax.scan(block, carry, (jnp.arange(0, scanned, period), blocks))
        rest = range(scanned, config.num_layers)
        layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in rest)
    for index, weights in enumerate(layers, scanned):
        carry = step(carry, index, index, weights)
    state, x = carry
    return state, rms_norm(x, params.norm, config.norm_eps)


def logits(params: Params, hidden: Array) -> Array:
    """hidden [..., D] -> logits [..., V]"""
    return project(hidden, params.embedding if params.head is None else params.head)


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
