"""Whatever numbers a model hands over: finite stays finite, what is hidden stays hidden, and sizes
do not matter. Over the table in `cases.py`; NumPy twin where it has an answer."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Array, Case, attention_bound, random_query, random_tokens
from laws import (
    append,
    assert_like_reference,
    assert_within,
    attend,
    exact_attention,
    extend,
    gather,
    held,
    over,
    prefill,
    run,
    start,
)

import jaxkv
from jaxkv import KvCacheConfig, Precision, QuantSpec, Status, reference, softmax
from jaxkv.chain import TierSpec
from jaxkv.formats import channel_group
from jaxkv.presets import PRESETS
from jaxkv.reference.formats import finite
from jaxkv.tiers import entry

WIDE = ("Q8", "Q4_SINKS", "Q4K", "K4V2", "KIVI2")  # with tails that hold tokens of any size


def small(name: str) -> Case:
    """A preset of a few slots, from which tokens migrate within 45."""
    fields = {"sink_tokens": 2} if "sink_tokens" in PRESETS[name][0] else {}
    fields |= {"tail_precision": Precision.BF16} if name in WIDE else {}
    config = jaxkv.preset(name, tail_length=4, max_tokens=72, num_kv_heads=2, head_dim=32, **fields)
    return Case(name, config, 4, (5,) * 9)


# One of each axis, the second in float32, so that sizes are free; and the presets.
OWN = {name: CASES[name] for name in ("fp16_q4", "channel_both")}
OWN |= {name: small(name) for name in PRESETS}
SOME = ("channel_both", "Q4_SINKS", "K4V2")  # what CI takes of them, but for the first law
LENGTH = 45
HOSTILE = np.float32([0, 1e-38, -7e4, 1.25e5, -1.25e5, 1e30, -3e38])
SIZED = {name: case for name, case in OWN.items() if case.config.largest > 1e30}
ALONE = {  # a token's codes depend on no other token
    name: case
    for name, case in OWN.items()
    if all(tier.group == 1 for tier in case.config.chain)
    and not any(
        isinstance(fmt, QuantSpec) and fmt.align
        for tier in case.config.chain
        for fmt in (tier.key, tier.value)
    )
}


look_at = jax.jit(lambda state, query, mask: jaxkv.attend(state, query, mask=mask, window=30))


def is_grouped(tier: TierSpec) -> bool:
    return tier.group > 1


def hostile_tokens(rng: np.random.Generator, case: Case, length: int) -> tuple[Array, Array]:
    """Tokens [B, length, K, H] of which one in four has an element that few formats can hold."""
    keys, values = random_tokens(rng, case, length)
    for x in (keys, values):
        for b, t in np.argwhere(rng.random(x.shape[:2]) < 0.25):
            x[b, t, rng.integers(x.shape[2]), rng.integers(x.shape[3])] = rng.choice(HOSTILE)
    return keys, values


@over(OWN, slow=OWN)
def test_finite_stays_finite(case: Case, rng: np.random.Generator) -> None:
    """Any finite tokens give finite outputs, are held as the twin holds them, and the status says
    where one was too large; NaN and infinities are held as finite numbers, and said."""
    keys, values = hostile_tokens(rng, case, LENGTH)
    state, query = start(case), random_query(rng, case)
    for first in range(0, LENGTH, 5):
        state = append(state, keys[:, first : first + 5], values[:, first : first + 5])
        assert np.isfinite(attend(state, query)).all()
    too_large = np.abs([keys, values]).max((0, 2, 3, 4)) > case.config.largest
    np.testing.assert_array_equal(state.status, np.where(too_large, Status.SATURATED, 0))
    if case.name != "Q4K":  # whose heads share a unit of scales, of which the bounds know nothing
        twin = reference.append(reference.init(case.config, case.batch_size), keys, values)
        assert_like_reference(state, twin)
    keys[0, 0, 0, :3], values[1, 4, 0, 0] = (np.nan, np.inf, -np.inf), np.nan
    state = append(state, keys[:, :5], values[:, :5], [5, 4, 5][: case.batch_size])
    assert np.isfinite(attend(state, query)).all()
    assert all(np.isfinite(x).all() for x in gather(state))
    assert state.status[0] & Status.NOT_FINITE and not state.status[1] & Status.NOT_FINITE


@over(OWN, slow=SOME)
def test_later_tokens_are_hidden(case: Case, rng: np.random.Generator) -> None:
    """Of five tokens appended at once the last may be anything: the queries before it do not see
    it."""
    keys, values = (x.copy() for x in random_tokens(rng, case, 5))
    query, outs = random_query(rng, case), []
    for bad in (1.0, np.nan, 6e4, -np.inf):
        keys[:, 4], values[:, 4] = bad, -bad
        outs.append(attend(append(start(case), keys, values), query)[:, :4])
    if case.name in ALONE or case.config.tail_length >= 5:
        chex.assert_trees_all_equal(*outs)
    assert np.isfinite(outs).all()


@over({name: case for name, case in OWN.items() if name != "channel_both"}, slow=SOME)
def test_raw_tokens_of_a_prompt_are_hidden(case: Case, rng: np.random.Generator) -> None:
    """In `prefill` neither what lies beyond a row's length nor what comes later reaches an output,
    and what is too large for the cache is not too large for the prompt's own attention."""
    keys, values = random_tokens(rng, case, 5)
    query, lengths = random_query(rng, case), np.array([5, 3, 4], np.int32)
    _, wanted = prefill(start(case), query, keys, values, lengths)
    for b, length in enumerate(lengths):
        keys[b, length:], values[b, length:], query[b, length:] = np.nan, np.inf, np.nan
    _, out = prefill(start(case), query, keys, values, lengths)
    chex.assert_trees_all_equal(out, wanted)
    values[:, 0] = 1.25e5
    state, out = prefill(start(case), query, keys, values, lengths)
    _, expected = reference.prefill(
        reference.init(case.config, 3), np.nan_to_num(query), keys, values, lengths
    )
    assert_within(np.abs(np.asarray(out) - expected), 2.0**-18 * 1.25e5)
    assert ((state.status == Status.SATURATED) == (case.config.largest < 1e5)).all()


@over(OWN, slow=SOME)
def test_queries_that_see_nothing_give_zeros(case: Case, rng: np.random.Generator) -> None:
    """NaN in the queries of padding and of empty rows changes nothing."""
    keys, values = random_tokens(rng, case, 5)
    query, lengths = random_query(rng, case), np.array([0, 2, 5])
    state = append(start(case), keys, values, lengths)
    wanted = attend(state, query, lengths)
    for b, length in enumerate(lengths):
        query[b, length:] = np.nan if b else np.inf
    chex.assert_trees_all_equal(attend(state, query, lengths), wanted)
    assert not wanted[0].any() and not wanted[1, 2:].any()


@over(OWN, slow=SOME)
def test_what_mask_and_window_hide_is_not_seen(case: Case, rng: np.random.Generator) -> None:
    """Every fourth token is of a size that few formats hold, or is no number: attention over the
    others is exact. (Tokens in one channel group are made of numbers of the loudest's size.)"""
    keys, values = (x.copy() for x in random_tokens(rng, case, LENGTH))
    loud = [np.nan] if any(map(is_grouped, case.config.chain)) else [np.nan, 6e4, -np.inf, -1e30]
    hidden = np.arange(9, LENGTH, 4)
    for x in (keys, values):
        x[:, hidden] = np.resize(loud, len(hidden))[:, None, None]
    state, query = extend(start(case), keys, values), random_query(rng, case)
    mask = ~np.isin(np.arange(LENGTH), hidden)
    out = np.asarray(look_at(state, query, np.tile(mask, (1, 1, 5, 1))))[:, -1]
    for b in range(case.batch_size):
        pairs = np.array(
            [
                pair
                for p, pair in held(gather(state), b).items()
                if (p >= LENGTH - 30 or p < case.config.sink_tokens) and mask[p]
            ]
        )
        expected = reference.exact_attention(query[b, -1], pairs)
        assert_within(np.abs(out[b] - expected), attention_bound(query[b, -1], pairs))


@over(OWN, slow=SOME)
def test_a_query_that_is_nan_is_heard(case: Case) -> None:
    """A NaN that is asked for is not answered with numbers; the other queries are."""
    query = random_query(np.random.default_rng(0), case)
    query[0, 1, 0, 0] = np.nan
    out = attend(run(case).states[-1], query)
    assert np.isnan(out[0, 1, 0]).all()
    assert np.isfinite(np.delete(out.reshape(-1, out.shape[-1]), case.num_heads, axis=0)).all()


@over(OWN, slow=SOME)
def test_scores_beyond_float32_are_numbers(case: Case, rng: np.random.Generator) -> None:
    """Also that of a key of zeros, with a query and a scale whose product is infinite."""
    keys, values = random_tokens(rng, case, 1)
    state = append(run(case).states[-1], np.zeros_like(keys), values)
    query = random_query(rng, case, 1) * np.float32(1e36)
    for scale in (3e38, -3e38):
        assert np.isfinite(attend(state, query, scale=scale)).all()


@over(OWN, slow=SOME)
def test_the_size_of_a_query_does_not_matter(case: Case, rng: np.random.Generator) -> None:
    """Queries of 1e-38 give the mean of what is seen, those of 1e30 and more the value of the best
    key: exact attention in float64, either way. (Scores end at 4e37, where all are alike.)"""
    state, query = run(case).states[-1], random_query(rng, case, 1)
    query = np.repeat(query, 5, axis=1)
    lengths = np.ones(case.batch_size, int)
    for size in (1e-38, 1e-36, 1e-33, 1e-20, 1e30, 1e36):
        sized = (query * np.float32(size)).astype(np.float32)
        out = attend(state, sized, lengths)
        contents = gather(state)
        for b in range(case.batch_size):
            pairs = np.array(list(held(contents, b).values()))
            expected = reference.exact_attention(sized[b, 0], pairs)
            bound = attention_bound(np.zeros_like(query[b, 0]), pairs)
            assert_within(np.abs(out[b, 0] - expected), bound)


@over(SIZED, slow=SOME)
def test_the_size_of_tokens_does_not_matter(case: Case, rng: np.random.Generator) -> None:
    """Tokens 2**-40 or 2**40 times as large are held 2**-40 or 2**40 times as large, bit for
    bit."""
    keys, values = random_tokens(rng, case, LENGTH)
    wanted = gather(extend(start(case), keys, values))
    for size in (2.0**-40, 2.0**40):
        found = gather(extend(start(case), keys * np.float32(size), values * np.float32(size)))
        chex.assert_trees_all_equal(found, (wanted[0] * size, wanted[1] * size, wanted[2]))


@over(
    {
        name: case
        for name, case in OWN.items()
        if all(channel_group(tier.value) == 1 for tier in case.config.chain)
    },
    slow=SOME,
)
def test_a_loud_token_deafens_none(case: Case, rng: np.random.Generator) -> None:
    """A value of 30,000 at a weight of 1e-27 or less leaves attention over the others as exact as
    it is without. (Tokens that share a loud one's scale are made of numbers of its size.)"""
    keys, values = random_tokens(rng, case, LENGTH)
    direction = np.zeros(case.config.head_dim, np.float32)
    direction[0] = np.sqrt(case.config.head_dim)
    keys, loud = keys / 16, 7
    keys[:, loud], values[:, loud] = -40 * direction, 3e4 * np.sign(values[:, loud])
    query = np.broadcast_to(direction * 2, (3, 5, case.num_heads, len(direction))).copy()
    state = extend(start(case), keys, values)
    expected, _ = exact_attention(state, query[:, :1], 1)
    out, contents = attend(state, query, np.ones(3, int))[:, :1], gather(state)
    for b in range(3):
        pairs = {p: pair for p, pair in held(contents, b).items() if p != loud}
        bound = attention_bound(query[b, 0], np.array(list(pairs.values())))
        assert_within(np.abs(out[b] - expected[b]), bound)


# Scores.


@pytest.mark.slow
def test_any_finite_score_counts() -> None:
    """Scores of -1e31 everywhere weigh alike; an infinite bias shows one token alone, minus
    infinity hides one; nothing is NaN."""
    config = KvCacheConfig(tail_length=4, max_tokens=16, num_kv_heads=1, head_dim=8)
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(1, 12, 1, 8)).astype(np.float32) for _ in range(2))
    query = rng.normal(size=(1, 1, 2, 8)).astype(np.float32)
    state = jaxkv.append(jaxkv.init(config), keys, values)
    look = jax.jit(lambda query, bias: jaxkv.attend(state, query, bias=bias, return_lse=True))
    seen = np.asarray(gather(state)[1])[0, :12, 0]
    for low in (-1e31, -3e38):
        out, lse = look(0 * query, np.full((1, 1, 1, 12), low, np.float32))
        np.testing.assert_allclose(out[0, 0], [seen.mean(0)] * 2, atol=1e-6)
        assert np.isfinite(lse).all()
    bias = np.zeros((1, 1, 1, 12), np.float32)
    bias[..., 3], bias[..., 5] = np.inf, -np.inf
    np.testing.assert_allclose(look(query, bias)[0][0, 0], [seen[3]] * 2, atol=1e-5)
    out, lse = look(query, np.full_like(bias, -np.inf))
    assert not out.any() and (lse == -np.inf).all()


def test_partials_merge_without_nan() -> None:
    """Nothing, and scores as low and as high as they come, in any order."""
    top = jnp.array([softmax.FLOOR, -softmax.MOST_SCORE, 0.0, 3 * softmax.MOST_SCORE], jnp.float32)
    some = softmax.Partial(jnp.ones((4, 2)), top, jnp.ones(4))
    nothing = softmax.empty((4,), 2)
    for parts in ([nothing, some], [some, nothing], [some, nothing, some]):
        merged = softmax.merge(parts)
        np.testing.assert_array_equal(softmax.normalize(merged), np.ones((4, 2)))
    assert (softmax.log_sum_exp(softmax.merge([nothing, nothing])) == -np.inf).all()


@pytest.mark.slow
def test_outputs_in_float16_are_finite() -> None:
    """Values beyond float16, which a bfloat16 tail holds, saturate in outputs of that dtype."""
    config = KvCacheConfig(
        tail_precision=Precision.BF16, num_kv_heads=1, head_dim=8, max_tokens=256
    )
    new = np.full((1, 1, 1, 8), 1.25e5, np.float32)
    state = jaxkv.append(jaxkv.init(config), new, new)
    assert (jaxkv.attend(state, new.astype(jnp.bfloat16)) == jnp.bfloat16(1.25e5)).all()
    assert (jaxkv.attend(state, np.ones_like(new, np.float16)) == np.float16(65504)).all()
    assert not state.status.any()


def test_stats_count_beyond_int32() -> None:
    """64 layers of 48 rows of 2**20 tokens: more than 2**31 tokens."""
    config = KvCacheConfig(max_tokens=2**20)
    state = jax.eval_shape(lambda: jaxkv.init(config, 48, num_layers=64))
    end, lost = jnp.full((64, 48), 2**20, jnp.int32), jnp.zeros(state.lost.shape, jnp.int32)
    found = jaxkv.stats(dataclasses.replace(state, end=end, lost=lost))
    assert float(found.store_bytes) > 2.0**40 and 3 < found.compression_ratio < 4


@pytest.mark.parametrize("largest", [65504.0, 2.0**100])
def test_what_enters_is_finite(largest: float) -> None:
    """The twin's rule, and ours: NaN is 0, the rest within the range."""
    x = np.float32([0, 1e-38, 2e-38, 65504, 65505, -1e38, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(entry.finite(jnp.asarray(x), largest), finite(x, largest))
    x = x.reshape(3, 1, 1, 3)
    bits = entry.changes(jnp.asarray(x), largest, jnp.array([1, 1, 0], jnp.int32))
    loud = np.abs(x[1]).max() > largest
    np.testing.assert_array_equal(bits[:, 0], [0, Status.SATURATED if loud else 0, 0])
    bits = entry.changes(jnp.asarray(x), largest, jnp.ones(3, jnp.int32))
    assert bits[2, 0] == Status.NOT_FINITE
