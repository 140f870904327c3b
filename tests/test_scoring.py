"""The options of attention, alone and together: `attend` == exact attention over what the cache
holds, and over the raw tokens.

The oracle is dense: a softmax in float64 over one [N, T, S] array of scores, written out apart from
both the library and its reference.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CODE_UNIT, Array, attention_bound
from laws import as_of, marked

import jaxkv
from jaxkv import CacheState, KvCacheConfig, Precision, reference
from jaxkv.kernels import segments

B, T, N, K, H = 3, 3, 4, 2, 32
LENGTHS = np.array([3, 1, 2], np.int32)  # queries of each row
ENDS = (70, 45, 9)  # tokens that each row has been given; two of them have evicted some
QUICK = {"xla_backend_optimization_level": 0}  # each program runs only a few times
jit = functools.partial(jax.jit, compiler_options=QUICK)
append = jit(jaxkv.append)
gather = jit(jaxkv.gather)


def small(name: str) -> KvCacheConfig:
    """A preset whose store is all there is (but for the tail that groups of channels need): the
    other tiers are in "chain"."""
    tail = 32 if name in ("KIVI2", "Q4_BIAS") else 0
    return jaxkv.preset(
        name, tail_length=tail, sink_tokens=0, max_tokens=64, num_kv_heads=K, head_dim=H
    )


FP32 = KvCacheConfig(
    tail_length=36,
    tail_precision=Precision.FP32,
    max_tokens=40,
    num_kv_heads=K,
    head_dim=H,
    sink_tokens=4,
)
CHAIN = KvCacheConfig(
    tail_length=4, warm_length=8, max_tokens=40, num_kv_heads=K, head_dim=H, sink_tokens=4
)
CONFIGS = {"fp32": FP32, "chain": CHAIN} | {name: small(name) for name in jaxkv.PRESETS}


def options(name: str) -> dict[str, Any]:
    """The options of one name; of "all" together. Tables end within the positions held, and some
    positions are in no table."""
    rng = np.random.default_rng(3)
    every: dict[str, dict[str, Any]] = {
        "window": {"window": 6},
        "window_of_one": {"window": 1},
        "soft_cap": {"soft_cap": 2.0},
        "decay": {"decay": rng.uniform(0.01, 0.3, N).astype(np.float32)},
        "decay_of_all": {"decay": 0.1},
        "bias": {"bias": rng.normal(size=(B, N, T, 60)).astype(np.float32)},
        "bias_of_all": {"bias": rng.normal(size=(1, 1, T, 80)).astype(np.float32)},
        "mask": {"mask": rng.random((B, 1, T, 66)) < 0.5},
        "mask_per_head": {"mask": rng.random((1, N, T, 50)) < 0.5},
        "sink_logits": {"sink_logits": jnp.asarray(rng.normal(size=N) + 2, jnp.float32)},
        "not_causal": {"causal": False},
        "scale": {"scale": 0.5},
        "scale_per_head": {"scale": rng.uniform(0.1, 0.5, N).astype(np.float32)},
        "none": {},
    }
    combined = {
        "window_sink_logits": ("window", "sink_logits"),  # gpt-oss
        "window_soft_cap": ("window", "soft_cap", "scale"),  # Gemma 2
        "window_decay_mask": ("window", "decay", "mask"),
        "cross": ("not_causal", "bias", "mask_per_head", "soft_cap"),
        "all": ("window", "soft_cap", "decay", "bias", "mask", "sink_logits", "scale"),
    }
    if name not in combined:
        return every[name]
    return functools.reduce(lambda found, part: found | every[part], combined[name], {})


SINGLE = [
    "window",
    "window_of_one",
    "soft_cap",
    "decay",
    "decay_of_all",
    "bias",
    "bias_of_all",
    "mask",
    "mask_per_head",
    "sink_logits",
    "scale_per_head",
    "not_causal",
    "none",
]
COMBINED = ["window_sink_logits", "window_soft_cap", "window_decay_mask", "cross", "all"]


def dense(
    keys: Array,
    values: Array,
    positions: Array,
    query: Array,
    at: Array,
    sinks: int,
    given: dict[str, Any],
) -> tuple[Array, Array, Array]:
    """Attention in float64 of query [B, T, N, H] at positions [B, T] (-1: none) over tokens [B, S,
    K, H] at [B, S] (-1: none).

    Returns outputs, log-sum-exps [B, T, N] and how far outputs may be off by rounding, [B, T].
    """
    o = reference.Options(**{name: value for name, value in given.items() if name != "scale"})
    age = (at[:, :, None] - positions[:, None])[:, None]  # [B, 1, T, S]
    seen = np.broadcast_to(
        (positions >= 0)[:, None, None] & (at >= 0)[:, None, :, None], age.shape
    ).copy()
    seen &= (age >= 0) | (not o.causal)
    if o.window is not None:
        seen &= (age < o.window) | (positions < sinks)[:, None, None]
    grouped = [np.repeat(x.astype(np.float64), N // K, axis=2) for x in (keys, values)]
    scores = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), grouped[0])
    scale = np.broadcast_to(given.get("scale", H**-0.5), N).astype(np.float64)
    scores = scores * scale[:, None, None]
    scores = scores if o.soft_cap is None else o.soft_cap * np.tanh(scores / o.soft_cap)
    added = np.zeros((B, N, T, positions.shape[1]))
    added -= 0 if o.decay is None else np.broadcast_to(o.decay, N)[:, None, None] * age
    added += 0 if o.bias is None else at_positions(o.bias, positions, 0.0)
    if o.mask is not None:
        seen = seen & at_positions(o.mask, positions, True)
    scores = np.where(seen, scores + added, -np.inf)
    logits = (
        np.full((B, N, T, 1), -np.inf)
        if o.sink_logits is None
        else np.tile(np.asarray(o.sink_logits)[:, None, None], (B, 1, T, 1))
    )
    scores = np.concatenate([scores, logits], axis=-1)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum(
        "bnts,bsnh->btnh", (weights / np.where(total > 0, total, 1))[..., :-1], grouped[1]
    )
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0].swapaxes(1, 2)
    more = (
        8
        * CODE_UNIT
        * ((o.soft_cap or 0) + np.abs(np.where(seen, added, 0)).max())
        * np.abs(values).max()
    )
    bound = [
        [attention_bound(q, np.stack([k, v], 1), scale.max()) for q in row]
        for row, k, v in zip(query, keys, values, strict=True)
    ]
    return out, lse, np.array(bound) + more


def at_positions(table: Array, positions: Array, beyond: float | bool) -> Array:
    """A table [B or 1, N or 1, T, P] at positions [B, S] -> [B, N or 1, T, S]."""
    padded = np.concatenate([table, np.full((*table.shape[:3], 1), beyond)], axis=3)
    index = np.where((positions < 0) | (positions >= table.shape[3]), table.shape[3], positions)
    return np.stack([padded[b % len(padded)][..., index[b]] for b in range(B)])


@dataclasses.dataclass(frozen=True)
class Filled:
    """A cache after ragged appends, the raw tokens [B, S, K, H] that went in, and the twin of an
    fp32 cache."""

    state: CacheState
    keys: Array
    values: Array
    twin: reference.ReferenceState | None

    @property
    def queries_at(self) -> Array:
        """Positions [B, T] of the newest tokens' queries; -1 beyond LENGTHS."""
        index = np.arange(T)[None]
        return np.where(index < LENGTHS[:, None], (np.array(ENDS) - LENGTHS)[:, None] + index, -1)

    def raw(self, positions: Array) -> tuple[Array, Array]:
        """The raw tokens at positions [B, S]."""
        index = np.maximum(positions, 0)[..., None, None]
        return np.take_along_axis(self.keys, index, 1), np.take_along_axis(self.values, index, 1)


@functools.cache
def filled(name: str) -> Filled:
    rng, config = np.random.default_rng(7), CONFIGS[name]
    shape = (B, max(ENDS), K, H)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    keys += rng.normal(size=(1, 1, K, H)).astype(np.float32)
    state, twin = jaxkv.init(config, B), reference.init(config, B)
    for start in range(0, max(ENDS), 10):
        new = keys[:, start : start + 10], values[:, start : start + 10]
        lengths = np.clip(np.array(ENDS) - start, 0, 10).astype(np.int32)
        state = append(state, *new, lengths)
        twin = reference.append(twin, *new, lengths) if name == "fp32" else twin
    return Filled(state, keys, values, twin if name == "fp32" else None)


def queries(size: int = T) -> Array:
    return np.random.default_rng(9).normal(size=(B, size, N, H)).astype(np.float32)


def dense_as_of(case: Filled, query: Array, given: dict[str, Any]) -> tuple[Array, Array, Array]:
    """`dense` over what the cache held as of each query's own token."""
    found = []
    for t in range(query.shape[1]):
        back = LENGTHS - 1 - t if given.get("causal", True) else 0
        contents = (np.asarray(x) for x in gather(as_of(case.state, back)))
        sinks = case.state.config.sink_tokens
        found.append(dense(*contents, query, case.queries_at, sinks, given))
    out, lse, bound = zip(*found, strict=True)
    every = range(query.shape[1])
    return tuple(  # type: ignore[return-value]
        np.stack([x[t].take(t, axis=axis) for t in every], axis=axis)
        for x, axis in ((out, 1), (lse, 1), (bound, 1))
    )


def check(name: str, given: dict[str, Any], config: KvCacheConfig | None = None) -> None:
    """`attend` with options on a filled cache against the dense oracle, over what `gather`
    gives."""
    case, query = filled(name), queries()
    state = case.state if config is None else dataclasses.replace(case.state, config=config)
    static = {key: given[key] for key in ("causal", "window") if key in given}
    traced = {key: given[key] for key in given if key not in static}
    out, lse = (
        np.asarray(x)
        for x in jit(functools.partial(jaxkv.attend, **static, return_lse=True))(
            state, query, lengths=LENGTHS, **traced
        )
    )
    oracle = (
        given if config is None or config.window is None else {"window": config.window, **given}
    )
    expected, expected_lse, bound = dense_as_of(case, query, oracle)
    assert (np.abs(out - expected) <= bound[..., None, None]).all()
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(expected_lse))
    finite = np.isfinite(lse)
    assert np.abs(lse[finite] - expected_lse[finite]).max() < 1e-4


@pytest.mark.parametrize("option", SINGLE)
def test_each_option(option: str) -> None:
    check("fp32", options(option))


@pytest.mark.slow
@pytest.mark.parametrize("option", COMBINED)
def test_options_together(option: str) -> None:
    check("chain", options(option))


@pytest.mark.slow
@pytest.mark.parametrize("name", jaxkv.PRESETS)
def test_options_together_with_every_preset(name: str) -> None:
    check(name, options("all"))


@pytest.mark.parametrize("option", SINGLE)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=marked(n, (), ["chain"])) for n in ("chain", "KIVI2")]
)
def test_each_option_on_more_tiers(name: str, option: str) -> None:
    check(name, options(option))


@pytest.mark.parametrize("option", ["none", "window", "all"])
def test_fp32_attends_to_the_raw_tokens(option: str) -> None:
    """What an fp32 cache holds are the raw tokens, so attention over it is exact attention over
    those."""
    case = filled("fp32")
    keys, values, positions = (np.asarray(x) for x in gather(case.state))
    raw = case.raw(positions)
    held = (positions >= 0)[..., None, None]
    np.testing.assert_array_equal(keys, np.where(held, raw[0], 0))
    np.testing.assert_array_equal(values, np.where(held, raw[1], 0))
    given = options(option)
    out = jit(lambda state: jaxkv.attend(state, queries(), lengths=LENGTHS, **given))(case.state)
    expected, _, bound = dense(*raw, positions, queries(), case.queries_at, FP32.sink_tokens, given)
    assert (np.abs(out - expected) <= bound[..., None, None]).all()


@pytest.mark.parametrize(("name", "most"), [("FP16", 2e-3), ("Q8", 0.03), ("Q4", 0.3), ("Q2", 1.0)])
def test_quantized_caches_attend_near_the_raw_tokens(name: str, most: float) -> None:
    """With all options, outputs differ from those of raw tokens by about the error of the stored
    ones (unit variance here)."""
    case, given = filled(name), options("window_soft_cap") | options("sink_logits")
    positions = np.asarray(gather(case.state)[2])
    out = np.asarray(
        jit(lambda state: jaxkv.attend(state, queries(), lengths=LENGTHS, **given))(case.state)
    )
    expected, _, _ = dense(
        *case.raw(positions),
        positions,
        queries(),
        case.queries_at,
        case.state.config.sink_tokens,
        given,
    )
    error = np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2))
    assert error < most


@pytest.mark.parametrize("option", SINGLE + COMBINED)
def test_reference_has_every_option(option: str) -> None:
    """The NumPy twin of an fp32 cache == the dense oracle, to float64 rounding."""
    case, given = filled("fp32"), options(option)
    assert case.twin is not None
    keys, values, positions = reference.gather(case.twin)
    out, lse = reference.attend(case.twin, queries(), lengths=LENGTHS, return_lse=True, **given)
    expected, expected_lse, _ = dense(
        keys, values, positions, queries(), case.queries_at, FP32.sink_tokens, given
    )
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-12)


@pytest.mark.slow
def test_window_of_the_config() -> None:
    """A config's window is every call's; a call's own replaces it."""
    config = dataclasses.replace(CHAIN, window=6)
    check("chain", {}, config)
    check("chain", {"window": 3}, config)


def test_window_keeps_the_sinks() -> None:
    """StreamingLLM: a query sees the sinks and the newest `window` positions, nothing between."""
    case, rows = filled("fp32"), np.arange(B)
    mask = np.zeros((B, 1, 1, max(ENDS)), bool)
    mask[..., : FP32.sink_tokens] = True
    for row in rows:
        mask[row, ..., ENDS[row] - 6 : ENDS[row]] = True
    by_mask = jit(jaxkv.attend)(case.state, queries(1), mask=mask)
    np.testing.assert_allclose(
        jit(functools.partial(jaxkv.attend, window=6))(case.state, queries(1)), by_mask, atol=1e-6
    )


def test_window_may_be_traced() -> None:
    """One program serves layers of different windows."""
    traces = []

    @jit
    def step(window: jax.Array) -> jax.Array:
        traces.append(window)
        return jaxkv.attend(filled("fp32").state, queries(), lengths=LENGTHS, window=window)

    twin = filled("fp32").twin
    assert twin is not None
    for window in (1, 6, 100):
        expected = reference.attend(twin, queries(), lengths=LENGTHS, window=window)
        np.testing.assert_allclose(step(jnp.int32(window)), expected, atol=2e-5)
    assert len(traces) == 1


def test_options_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts are attended block by block; every option follows its queries."""
    given = options("window_soft_cap") | options("decay") | options("sink_logits")
    rng = np.random.default_rng(5)
    given |= {
        "bias": rng.normal(size=(B, N, 7, 50)).astype(np.float32),
        "mask": rng.random((1, N, 7, 66)) < 0.7,
    }
    lengths = np.array([7, 4, 6], np.int32)
    case = filled("fp32")
    assert case.twin is not None
    monkeypatch.setattr(segments, "QUERY_BLOCK", 3)
    out = jit(lambda query: jaxkv.attend(case.state, query, lengths=lengths, **given))(queries(7))
    np.testing.assert_allclose(
        out, reference.attend(case.twin, queries(7), lengths=lengths, **given), atol=2e-5
    )


@pytest.mark.parametrize("option", ["all", "none"])
def test_prefill_has_the_options(option: str) -> None:
    """`prefill` attends with options over what was held and the raw prompt, as the twin does; then
    appends the same."""
    case, given, rng = filled("fp32"), options(option), np.random.default_rng(4)
    assert case.twin is not None
    keys, values = (rng.normal(size=(B, T, K, H)).astype(np.float32) for _ in range(2))
    prefill = jit(
        lambda state, keys, values: jaxkv.prefill(
            state, queries(), keys, values, LENGTHS, return_lse=True, **given
        )
    )
    state, (out, lse) = prefill(case.state, keys, values)
    twin, (expected, expected_lse) = reference.prefill(
        case.twin, queries(), keys, values, LENGTHS, return_lse=True, **given
    )
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    np.testing.assert_array_equal(gather(state)[0], reference.gather(twin)[0])


def test_cross_attention_of_one_append_and_many_queries() -> None:
    """An encoder's tokens are appended once; any number of decoder queries see all of them, more
    queries than tokens too."""
    rng = np.random.default_rng(2)
    keys, values = (rng.normal(size=(B, 5, K, H)).astype(np.float32) for _ in range(2))
    lengths = np.array([5, 3, 0], np.int32)
    state = append(jaxkv.init(FP32, B), keys, values, lengths)
    twin = reference.append(reference.init(FP32, B), keys, values, lengths)
    look = jit(functools.partial(jaxkv.attend, causal=False))
    many = look(state, queries(9))
    for t in range(9):
        one = queries(9)[:, t : t + 1]
        np.testing.assert_allclose(
            many[:, t : t + 1], reference.attend(twin, one, causal=False), atol=2e-5
        )
        np.testing.assert_allclose(look(state, one), many[:, t : t + 1], atol=1e-6)
    assert not np.asarray(many[2]).any()


def test_parts_merge_by_their_log_sum_exps() -> None:
    """What `return_lse` is for: attention over two caches merged into that over both."""
    rng = np.random.default_rng(1)
    keys, values = (rng.normal(size=(B, 12, K, H)).astype(np.float32) for _ in range(2))
    parts = [
        append(jaxkv.init(FP32, B), keys[:, part], values[:, part])
        for part in (slice(7), slice(7, 12))
    ]
    both = append(jaxkv.init(FP32, B), keys, values)
    look = jit(functools.partial(jaxkv.attend, causal=False, return_lse=True))
    (a, lse_a), (b, lse_b) = (look(part, queries()) for part in parts)
    weight = jax.nn.sigmoid(lse_a - lse_b)[..., None]
    expected, lse = look(both, queries())
    np.testing.assert_allclose(a * weight + b * (1 - weight), expected, atol=1e-6)
    np.testing.assert_allclose(jnp.logaddexp(lse_a, lse_b), lse, atol=1e-5)


def test_empty_cache_with_every_option() -> None:
    """Nothing held: zeros, never NaN; the log-sum-exp is -inf, or that of the learned sinks."""
    state = jaxkv.init(CONFIGS["Q4"], B)
    out, lse = jit(lambda state: jaxkv.attend(state, queries(), return_lse=True, **options("all")))(
        state
    )
    assert not np.asarray(out).any()
    np.testing.assert_allclose(
        lse, np.broadcast_to(options("all")["sink_logits"], lse.shape), rtol=1e-6
    )
    assert np.isneginf(
        jit(functools.partial(jaxkv.attend, return_lse=True))(state, queries())[1]
    ).all()
