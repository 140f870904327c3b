"""`Layers`: every verb over a model's layers is the verbs over each layer alone; windows, shared
caches and states of other kinds included."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import LayerSpec, Status
from jaxkv.models.spec import Kind

pytestmark = pytest.mark.slow

B, N, K, H = 2, 4, 2, 16
WINDOW, FULL, CHUNK = 8, 48, 6
MODEL = {
    "model_type": "gemma3n_text",
    "num_hidden_layers": 5,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "layer_types": [
        f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")
    ],
    "query_pre_attn_scalar": 4,
    "attn_logit_softcapping": 5.0,
}
LAYERS, KEEPERS = range(5), range(3)
LIKE = (0, 1, 0, 0, 1)  # layer -> the first of its kind


def layers_of(preset: str = "q4", **fields: Any) -> tuple[LayerSpec, ...]:
    return jaxkv.layers_of(MODEL, preset, FULL, tail_length=4, **fields)


@functools.cache
def tokens(count: int) -> list[tuple[Any, Any, Any]]:
    """For each layer: queries [B, count, N, H], keys and values [B, count, K, H]."""
    rng = np.random.default_rng(0)
    return [
        tuple(rng.standard_normal((B, count, heads, H), np.float32) for heads in (N, K, K))
        for _ in LAYERS
    ]


TOTAL = 30


@functools.partial(jax.jit, static_argnames="like")
def append(state: Any, keys: Any, values: Any, like: int, number: Any) -> Any:
    return jaxkv.append(state, keys, values, layer=(like, number))


@functools.partial(jax.jit, static_argnames="like")
def attend(state: Any, query: Any, like: int, number: Any) -> Any:
    return jaxkv.attend(state, query, layer=(like, number))


@functools.partial(jax.jit, static_argnames="layer")
def prefill(state: Any, query: Any, keys: Any, values: Any, layer: int) -> Any:
    return jaxkv.prefill(state, query, keys, values, layer=layer)


def step(state: Any, news: list[tuple[Any, Any, Any]]) -> tuple[Any, list[Any]]:
    """One step of a model: appends where a layer keeps, attends in all."""
    outs = []
    for i, (query, keys, values) in enumerate(news):
        if i in KEEPERS:
            state = append(state, keys, values, LIKE[i], i)
        outs.append(attend(state, query, LIKE[i], i))
    return state, outs


def chunks(steps: tuple[int, ...] = (1,) * TOTAL) -> list[list[tuple[Any, Any, Any]]]:
    ends = np.cumsum(steps)
    return [
        [tuple(x[:, end - size : end] for x in layer) for layer in tokens(TOTAL)]
        for size, end in zip(steps, ends, strict=True)
    ]


def run(state: Any, steps: tuple[int, ...] = (1,) * TOTAL) -> tuple[Any, list[Any]]:
    """The state after all steps, and each layer's outputs [B, TOTAL, N, H]."""
    found = []
    for news in chunks(steps):
        state, outs = step(state, news)
        found.append(outs)
    return state, [jnp.concatenate(outs, axis=1) for outs in zip(*found, strict=True)]


@functools.cache
def filled(preset: str) -> tuple[Any, list[Any]]:
    return run(jaxkv.init_layers(layers_of(preset), B))


def dense(layer: tuple[Any, Any, Any], source: tuple[Any, Any, Any], spec: LayerSpec) -> Any:
    """Attention of all tokens over all before them, written out in float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in (layer[0], source[1], source[2]))
    keys, values = (np.repeat(x, N // x.shape[2], axis=2) for x in (keys, values))
    scores = np.einsum("btnh,bsnh->bnts", query, keys) * (spec.scale or query.shape[-1] ** -0.5)
    if spec.soft_cap:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    t, s = np.mgrid[: scores.shape[2], : scores.shape[3]]
    first = {
        Kind.FULL: np.zeros_like(t),
        Kind.SLIDING: t - (spec.window or 0) + 1,
        Kind.CHUNKED: t // (spec.window or 1) * (spec.window or 1),
    }[spec.kind]
    weights = np.exp(np.where((s <= t) & (s >= first), scores, -np.inf))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), values)


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_equal_layers_are_stacked() -> None:
    state = jaxkv.init_layers(layers_of(), B)
    assert [held.num_layers for held in state.stacks] == [2, 1]
    assert [state.find(i)[1:] for i in LAYERS] == [(0, 0), (1, 0), (0, 1), (0, 1), (1, 0)]
    assert (state.num_layers, state.batch_size) == (5, B)
    assert repr(state).startswith(
        "Layers: 5, 2 of them share another's cache\nCacheState: 2 layers"
    )
    configs = [layer.config for layer in layers_of() if layer.config is not None]
    assert jaxkv.nbytes(state) == sum(jaxkv.nbytes(jaxkv.init(c, B)) for c in configs)


def test_exact_layers_are_dense_attention() -> None:
    """Windows, soft caps, scales and shared caches, to float32 rounding, over a whole wrap."""
    specs, (_, outs) = layers_of("fp32"), filled("fp32")
    for i, spec in enumerate(specs):
        source = tokens(TOTAL)[i if spec.shares is None else spec.shares]
        np.testing.assert_allclose(
            outs[i], dense(tokens(TOTAL)[i], source, spec), rtol=2e-5, atol=2e-6
        )


def test_layers_are_each_layer_alone() -> None:
    """The tokens bit for bit, the outputs to float32 rounding."""
    state, outs = filled("q4")
    write = jax.jit(jaxkv.append)
    for i in KEEPERS:
        spec = layers_of()[i]
        look = jax.jit(functools.partial(jaxkv.attend, **spec.options()))
        alone, found = jaxkv.init(spec.config, B), []
        for news in chunks():
            alone = write(alone, *news[i][1:])
            found.append(look(alone, news[i][0]))
        np.testing.assert_allclose(jnp.concatenate(found, axis=1), outs[i], rtol=2e-5, atol=2e-6)
        _, stack, rank = state.find(i)
        held = jax.tree.map(lambda leaf, rank=rank: leaf[rank], state.stacks[stack])
        assert_same(jax.tree.leaves(held), jax.tree.leaves(alone))
    assert state.end.tolist() == [TOTAL] * B


def test_a_scan_over_layers_is_the_loop() -> None:
    """Layers 0 and 2 of a stack, by a traced number with a layer of the same kind beside it."""
    state, _ = filled("q4")
    news = chunks()[1]

    def layer(state: Any, inputs: Any) -> Any:
        number, (query, keys, values) = inputs
        state = jaxkv.append(state, keys, values, layer=(0, number))
        return state, jaxkv.attend(state, query, layer=(0, number))

    inputs = jax.tree.map(lambda *x: jnp.stack(x), news[0], news[2])
    scanned, outs = jax.jit(lambda s, x: jax.lax.scan(layer, s, (jnp.arange(0, 4, 2), x)))(
        state, inputs
    )
    for i, out in zip((0, 2), outs, strict=True):
        state = append(state, *news[i][1:], 0, i)
        np.testing.assert_allclose(out, attend(state, news[i][0], 0, i), rtol=2e-5, atol=2e-6)
    assert_same(scanned, state)


def test_drafts_and_shared_layers() -> None:
    """Several tokens at once, in layers that only look, too: rewind_length leaves room for them."""
    specs = layers_of("fp32", rewind_length=4)
    _, outs = run(jaxkv.init_layers(specs, B), (5,) * 6)
    for i in (0, 3, 4):
        source = tokens(TOTAL)[i if specs[i].shares is None else specs[i].shares]
        wanted = dense(tokens(TOTAL)[i], source, specs[i])
        np.testing.assert_allclose(outs[i], wanted, rtol=2e-5, atol=2e-6)


def test_prefill_then_steps_is_dense_attention() -> None:
    """A prompt longer than the window, whose oldest tokens no sliding layer keeps."""
    state = jaxkv.init_layers(layers_of("fp32"), B)
    for i in (0, 1):
        state, out = prefill(state, *(x[:, :20] for x in tokens(TOTAL)[i]), i)
        query, keys, values = (x[:, 20:21] for x in tokens(TOTAL)[i])
        state = append(state, keys, values, i, i)
        out = jnp.concatenate([out, attend(state, query, i, i)], axis=1)
        whole = dense(tokens(TOTAL)[i], tokens(TOTAL)[i], layers_of("fp32")[i])
        np.testing.assert_allclose(out, whole[:, :21], rtol=2e-5, atol=2e-6)


def test_chunks_of_positions() -> None:
    """Llama 4's: a query looks at its own chunk, in a prompt across chunks, too."""
    spec = LayerSpec(kind=Kind.CHUNKED, num_kv_heads=K, head_dim=H, window=CHUNK)
    spec = spec.sized("fp32", FULL)
    assert spec.config is not None and spec.config.max_tokens == CHUNK
    layer = tokens(TOTAL)[0]
    wanted = dense(layer, layer, spec)
    state = jaxkv.init_layers([spec], B)
    query, keys, values = (x[:, :20] for x in layer)
    state, out = prefill(state, query, keys, values, 0)
    np.testing.assert_allclose(out, wanted[:, :20], rtol=2e-5, atol=2e-6)
    for at in range(20, 27):
        query, keys, values = (x[:, at : at + 1] for x in layer)
        state = append(state, keys, values, 0, 0)
        out = attend(state, query, 0, 0)
        np.testing.assert_allclose(out, wanted[:, at : at + 1], rtol=2e-5, atol=2e-6)


# All layers at once.


def positions_of(state: Any, layer: int) -> list[list[int]]:
    return [
        sorted(p for p in row if p >= 0) for row in jaxkv.gather(state, layer=layer)[2].tolist()
    ]


def test_evict_drops_the_same_positions_everywhere() -> None:
    state, _ = filled("q4")
    count = jnp.asarray([0, TOTAL - 5])
    for after in (jaxkv.evict(state, count), jax.jit(jaxkv.evict)(state, count)):
        for layer in LAYERS:
            kept = positions_of(state, layer)
            assert positions_of(after, layer) == [kept[0], [p for p in kept[1] if p >= TOTAL - 5]]
    refused = jax.jit(jaxkv.evict)(state, jnp.asarray([3, TOTAL + 1]))
    assert positions_of(refused, 0)[1] == positions_of(state, 0)[1]
    assert refused.status.tolist() == [0, Status.EVICT_TOO_MANY]
    with pytest.raises(ValueError, match="rows hold"):
        jaxkv.evict(state, TOTAL + 1)


def test_rewind_leaves_no_trace() -> None:
    """Within rewind_length the model goes on as if the draft had never been, in every layer."""
    start = jaxkv.init_layers(layers_of("q4", rewind_length=4), B)
    state, _ = run(start, (1,) * 20)
    drafted = state
    for news in chunks()[20:24]:
        drafted, _ = step(drafted, news)
    back = jax.jit(jaxkv.rewind)(drafted, jnp.asarray([4, 4]))
    look = jax.jit(lambda held, like: jaxkv.gather(held, layer=like), static_argnames="like")
    for like in (0, 1):
        assert_same(look(back, like), look(state, like))
    assert_same(step(back, chunks()[20])[1], step(state, chunks()[20])[1])


def test_a_rewind_is_done_in_all_layers_or_in_none() -> None:
    """A sliding layer holds fewer tokens than the others, and refuses for all of them."""
    state, _ = filled("q4")
    count = jnp.asarray([1, TOTAL - 1])
    after = jax.jit(jaxkv.rewind)(state, count)
    assert [held.end.tolist() for held in after.stacks] == [
        [[TOTAL - 1, TOTAL]] * held.num_layers for held in state.stacks
    ]
    assert after.status.tolist() == [0, Status.REWIND_TOO_MANY]
    with pytest.raises(ValueError, match="rows hold"):
        jaxkv.rewind(state, count)


def test_rows() -> None:
    """Taking, joining and replacing rows, with states of other kinds."""
    state, _ = filled("q4")
    own = {"wkv": jnp.arange(B * 3.0).reshape(B, 3), "steps": jnp.arange(B)}
    state = state.with_own(1, own)
    turned = jaxkv.take_rows(state, [1, 0, 1])
    assert turned.own[1]["steps"].tolist() == [1, 0, 1] and turned.batch_size == 3
    halves = [jaxkv.take_rows(state, [row]) for row in range(B)]
    assert_same(jaxkv.concatenate(halves), state)
    replaced = jax.jit(jaxkv.replace_rows)(state, jnp.asarray([0]), halves[1])
    assert_same(replaced, jaxkv.take_rows(state, [1, 1]))
    with pytest.raises(ValueError, match="of different layers"):
        jaxkv.concatenate([state, filled("q4")[0]])
    with pytest.raises(ValueError, match="of different layers"):
        jaxkv.replace_rows(state, 0, filled("fp32")[0])


def test_states_of_other_kinds_go_back_only_to_what_is_given() -> None:
    specs = [LayerSpec(kind=Kind.OWN), *layers_of()[:2], LayerSpec(kind=Kind.NONE)]
    before = jnp.zeros((B, 3))
    state = jaxkv.init_layers(specs, B, own={0: before})
    for i in (1, 2):
        state = jaxkv.append(state, *tokens(TOTAL)[i][1:], layer=i)
    state = state.with_own(0, jnp.ones((B, 3)))
    for verb in (lambda own: jaxkv.rewind(state, 1, own), lambda own: jaxkv.clear(state, own=own)):
        with pytest.raises(ValueError, match=r"layers \[0\] have states of their own kind"):
            verb(None)
        assert_same(verb({0: before}).own[0], before)
    assert_same(jaxkv.evict(state, 1).own, state.own)
    row = jaxkv.clear(state, 1, own={0: before})
    assert row.own[0].tolist() == [[1, 1, 1], [0, 0, 0]] and row.end.tolist() == [TOTAL, 0]
    with pytest.raises(ValueError, match=r"own\[0\] has an array \(3,\)"):
        jaxkv.clear(state, own={0: jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"own\[9\]: the model has layers 0 .. 3"):
        jaxkv.init_layers(specs, B, own={9: before})


def test_clear_is_a_fresh_start() -> None:
    state, _ = filled("q4")
    assert_same(
        run(jaxkv.clear(state), (1,) * 4)[1], run(jaxkv.init_layers(layers_of(), B), (1,) * 4)[1]
    )


def test_stats_count_each_layer_that_keeps() -> None:
    found = jaxkv.stats(filled("q4")[0])
    wanted = [WINDOW, TOTAL, WINDOW]
    assert found.total_tokens.tolist() == [[held] * B for held in wanted]
    configs = [layer.config for layer in layers_of() if layer.config is not None]
    each = [jaxkv.stats(run_alone(config)) for config in configs]
    assert float(found.tail_bytes) == sum(float(one.tail_bytes) for one in each)
    assert float(found.store_bytes) == sum(float(one.store_bytes) for one in each)
    held = 2 * 2 * K * H * B * sum(wanted)
    ratio = held / float(found.tail_bytes + found.store_bytes)
    assert float(found.compression_ratio) == pytest.approx(ratio)
    assert float(jaxkv.stats(jaxkv.init_layers(layers_of(), B)).compression_ratio) == 1


def run_alone(config: jaxkv.KvCacheConfig) -> jaxkv.CacheState:
    return jaxkv.append(jaxkv.init(config, B), *tokens(TOTAL)[0][1:])


def test_configs_instead_of_specs() -> None:
    """Exact first and last layers, as `exact_ends` makes them."""
    config = jaxkv.preset("q4", max_tokens=FULL, num_kv_heads=K, head_dim=H, tail_length=4)
    state = jaxkv.init_layers(jaxkv.exact_ends(config, 4))
    assert [held.num_layers for held in state.stacks] == [2, 2]
    alone = jaxkv.init_layers([config] * 3)

    def end_of(state: Any, layer: Any) -> Any:
        keys = jnp.zeros((1, 2, K, H))
        return jaxkv.append(state, keys, keys, layer=layer).stacks[0].end

    assert jax.jit(end_of)(alone, 1).tolist() == [[0], [2], [0]]  # of one kind: a traced number


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (5, "has layers 0 .. 4"),
        (-1, "has layers 0 .. 4"),
        (None, "must be 0 .. 4"),
        ("0", "must be 0 .. 4"),
        (3, "looks at the cache of layer 2 and keeps none"),
    ],
)
def test_layers_that_cannot_be_appended_to(layer: Any, message: str) -> None:
    state = jaxkv.init_layers(layers_of(), B)
    keys = jnp.zeros((B, 1, K, H))
    for verb in (
        jaxkv.append,
        lambda *args, **named: jaxkv.prefill(args[0], keys.repeat(2, 2), *args[1:], **named),
    ):
        with pytest.raises(ValueError, match=message):
            verb(state, keys, keys, layer=layer)


def test_refusals() -> None:
    state = jaxkv.init_layers(layers_of(), B)
    with pytest.raises(ValueError, match="a pair"):
        jax.jit(lambda s, i: jaxkv.attend(s, jnp.zeros((B, 1, N, H)), layer=i))(state, 0)
    with pytest.raises(ValueError, match="layer 0 has no config"):
        jaxkv.init_layers([LayerSpec(num_kv_heads=K, head_dim=H)])
    with pytest.raises(ValueError, match="no layer keeps tokens"):
        jaxkv.init_layers([LayerSpec(kind=Kind.OWN)])
    with pytest.raises(ValueError, match="is of kind own"):
        jaxkv.init_layers([LayerSpec(kind=Kind.OWN), *layers_of()[:1]]).find(0)


def test_a_decode_step_writes_in_place() -> None:
    """Donated, a step over all layers needs less memory than one layer's store."""
    specs = jaxkv.layers_of(MODEL, "q4", 65536)
    state = jax.eval_shape(lambda: jaxkv.init_layers(specs, B))
    news = [tuple(jax.ShapeDtypeStruct((B, 1, h, H), jnp.float32) for h in (N, K, K))] * 5
    compiled = jax.jit(step, donate_argnums=0).lower(state, news).compile()
    memory = compiled.memory_analysis()
    store = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) // 2
    assert memory.temp_size_in_bytes < store
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held
