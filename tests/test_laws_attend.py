"""What attend computes, and what has no influence on it."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FEW,
    LONG,
    TOLERANCE,
    Case,
    Entry,
    accumulate,
    attention_bound,
    empty_outputs,
    is_searched,
    norms,
    quantization_bound,
    random_query,
    random_tokens,
    search_slack,
    searches_scales,
)
from laws import (
    append,
    assert_attends,
    assert_same,
    assert_within,
    attend,
    clear,
    evict,
    exact_attention,
    gather,
    held,
    over,
    poisoned,
    prefill,
    rewind,
    run,
    start,
    stats,
)
from laws import pair as pair_of

import jaxkv
from jaxkv import Precision, Status, reference
from jaxkv.kernels import xla

# 7. What is not held has no influence.


@pytest.mark.parametrize(("floating", "word"), [(np.nan, -1), (1e38, 0x55)], ids=["nan", "large"])
@over(CASES)
def test_empty_slots_never_reach_an_output(
    case: Case, floating: float, word: int, rng: np.random.Generator
) -> None:
    """With NaN or large numbers in every empty slot, the same bits come out as with zeros."""
    clean, query = start(case), random_query(rng, case)
    dirty = poisoned(clean, floating, word)
    chex.assert_trees_all_equal(attend(dirty, query), empty_outputs(query, case))
    keys, values = random_tokens(rng, case, 32)
    for first, size in ((0, 1), (1, 1), (2, 5), (7, 5), (12, 5), (17, 5), (22, 5), (27, 5)):
        new = keys[:, first : first + size], values[:, first : first + size]
        clean, dirty = append(clean, *new), append(dirty, *new)
        assert_same(dirty, clean)
        chex.assert_trees_all_equal(attend(dirty, query), attend(clean, query))


@over(
    {
        name: case
        for name, case in CASES.items()
        if all(tier.group == 1 for tier in case.config.chain)
    }
)
def test_dropped_tokens_never_reach_an_output(case: Case, rng: np.random.Generator) -> None:
    """Tokens of NaN that were evicted, rewound, or cleared leave no trace but in the status."""
    keys, values = random_tokens(rng, case, 10)
    bad = [np.full_like(side[:, :5], np.nan) for side in (keys, values)]
    query, lengths = random_query(rng, case), np.full(case.batch_size, 5, np.int32)
    state = append(start(case), *bad)
    assert (state.status == Status.NOT_FINITE).all() and not clear(state).status.any()
    states = [clear(state), rewind(state, lengths)]
    if not case.config.sink_tokens:
        states.append(evict(state, lengths))
    for state in states:
        assert not state.refused.any()
        chex.assert_trees_all_equal(attend(state, query), empty_outputs(query, case))
        for first in (0, 5):
            state = append(state, keys[:, first : first + 5], values[:, first : first + 5])
            assert_attends(state, query)


# 8, 10. What attend computes.


@over(CASES | LONG, slow=CASES | LONG)
def test_attend_is_exact_on_what_is_held(case: Case, rng: np.random.Generator) -> None:
    """attend == softmax attention in float64 over the dequantized tokens, to float32 rounding;
    causal, any T."""
    for state in run(case).states[:: max(1, len(case.steps) // 5)]:
        assert_attends(state, random_query(rng, case))
    for _ in range(3):
        assert_attends(
            run(case).states[-1], random_query(rng, case), rng.integers(0, 6, case.batch_size)
        )
    if case.name in FEW | LONG:
        assert_attends(run(case).states[-1], random_query(rng, case, 1))


@over({name: CASES[name] for name in ("fp32", "q4", *FEW, "fp16_q2_batched")})
def test_attend_block_by_block(
    case: Case, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where a tier is read in several blocks, also where the last one is not full."""
    monkeypatch.setattr(xla, "TILE_BYTES", 1)
    monkeypatch.setattr(
        xla, "SLOTS", (5 if all(tier.group == 1 for tier in case.config.chain) else 8, 1)
    )
    query, blockwise = (
        random_query(rng, case),
        jax.jit(lambda state, query: jaxkv.attend(state, query)),
    )
    for state in (*run(case).states[:4], run(case).states[-1]):
        expected, bound = exact_attention(state, query)
        assert_within(np.abs(np.asarray(blockwise(state, query)) - expected), bound)


@over(CASES | LONG)
def test_stored_tokens_are_near_the_raw_ones(case: Case) -> None:
    """A token read back is off by half a step of each tier that it has been in, and 16-bit
    rounding, at most."""
    contents, row = run(case).contents[-1], case.batch_size - 1
    bounds = accumulate(run(case).twins[-1], row, quantization_bound)
    for position, pair in held(contents, row).items():
        raw = pair_of(run(case).keys[row, position], run(case).values[row, position])
        assert_within(norms(pair - raw), bounds[position])


@over({name: case for name, case in CASES.items() if is_searched(case.config.chain[-1].key)})
def test_search_is_no_worse_than_the_whole_range(case: Case) -> None:
    """Where scales are searched for, the squared error of what shares one is at most that of plain
    rounding (see the reference)."""
    row, spec, twin = 0, case.config.chain[-1], run(case).twins[-1]
    shares = (
        (1, -1) if spec.key.group_size > case.config.head_dim else (case.config.num_kv_heads, -1)
    )  # all heads, or each for itself
    gains = []
    for position, pair in held(run(case).contents[-1], row).items():
        token = twin.rows[row].tokens[position]
        exact = all(isinstance(tier.key, Precision) for tier in case.config.chain[:-1])
        if (
            len(token) == len(case.config.chain) + 1
            and position >= case.config.sink_tokens
            and exact
        ):
            basis = twin.rows[row].adapted[-1]
            inner = basis.enter(token[-2][:1], [position])
            entry = Entry(inner, spec.key, twin.rows[row].mirrors[-1][0])
            plain, searched = (
                norms(((x[0] - token[-2][0]) * basis.factor).reshape(shares))
                for x in (token[-1], pair)
            )
            assert_within(searched, plain + norms(search_slack(entry)[0].reshape(shares)))
            gains.append(np.mean(searched / plain))
    assert not gains or not searches_scales(spec.key) or np.mean(gains) < 1


@over(CASES)
def test_attend_is_near_exact_attention(case: Case, rng: np.random.Generator) -> None:
    """attend is off from attention over the raw tokens by no more than their quantization explains.

    If scores move by at most e, weights change by a factor within exp(-2 e) .. exp(2 e). A head's
    output is then off by the largest error of a value, plus exp(2 e) - 1 times the largest value
    (all as lengths of vectors).
    """
    row, head_dim = case.batch_size - 1, case.config.head_dim
    bounds = accumulate(run(case).twins[-1], row, quantization_bound)
    positions = list(bounds)
    raw = pair_of(run(case).keys[row, positions], run(case).values[row, positions])
    key_error, value_error = np.max(list(bounds.values()), axis=0)  # [K]
    query = random_query(rng, case)
    moved = head_dim**-0.5 * norms(query[row, -1]).max() * max(key_error.max(), 1e-7)
    query *= min(1, 0.05 / moved)  # keeps the bound small enough to say something
    error = norms(
        attend(run(case).states[-1], query)[row, -1]
        - reference.exact_attention(query[row, -1], raw)[:, : case.config.output_dim]
    )
    from_scores = np.expm1(2 * min(moved, 0.05)) * norms(raw[:, 1]).max()
    assert_within(
        error,
        value_error.max() + from_scores + attention_bound(query[row, -1], raw) * head_dim**0.5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_output_has_the_dtype_of_the_query(dtype: Any, rng: np.random.Generator) -> None:
    """Attention is computed in float32 and rounded once; half-precision keys and values are taken
    as they are."""
    case = CASES["fp16_q4"]
    query = random_query(rng, case).astype(dtype)
    out = attend(run(case).states[-1], query)
    assert out.dtype == dtype
    expected, bound = exact_attention(run(case).states[-1], query.astype(np.float32))
    rounding = TOLERANCE[jnp.dtype(dtype).name] * np.abs(expected)
    assert_within(np.abs(out.astype(np.float64) - expected), bound + rounding)
    keys, values = (x.astype(dtype) for x in random_tokens(rng, case, 5))
    widened = keys.astype(np.float32), values.astype(np.float32)
    assert_same(append(start(case), keys, values), append(start(case), *widened))


@over(FEW)
def test_scale_of_the_scores(case: Case, rng: np.random.Generator) -> None:
    """scale=s is the default scale with a query s * sqrt(H) times as long, of whatever sign and
    size, for all heads or for each."""
    query, state = random_query(rng, case), run(case).states[-1]
    signs = np.where(np.arange(case.num_heads) % 2, -0.7, 0.5)
    for size in (1.0, 2.0**-100, 2.0**100):
        for scale in (0.5, signs):
            sized = np.asarray(scale * size, np.float32)
            longer = query * np.reshape(scale, (-1, 1)) * case.config.head_dim**0.5
            expected, bound = exact_attention(state, longer.astype(np.float32))
            out = attend(state, (query / size).astype(np.float32), scale=sized)
            assert_within(np.abs(out - expected), 2 * bound)


@over(FEW)
def test_prefill_attends_to_raw_tokens(case: Case, rng: np.random.Generator) -> None:
    """prefill == exact attention over what was held and the unrounded new tokens, then append."""
    query = random_query(rng, case)
    for state in (run(case).states[0], run(case).states[2], run(case).states[-1]):
        keys, values = random_tokens(rng, case, 5)
        lengths = rng.integers(0, 6, case.batch_size).astype(np.int32)
        raw = [
            {int(end) + t: pair_of(keys[b, t], values[b, t]) for t in range(lengths[b])}
            for b, end in enumerate(state.end)
        ]
        after, out = prefill(state, query, keys, values, lengths)
        expected, bound = exact_attention(state, query, lengths, raw)
        assert_within(np.abs(out - expected), bound)
        assert_same(after, append(state, keys, values, lengths))


@over(CASES)
def test_empty_attends_to_zeros(case: Case, rng: np.random.Generator) -> None:
    """An empty cache gives zeros, before any token and after `clear`."""
    query = random_query(rng, case)
    for state in (start(case), clear(run(case).states[-1])):
        chex.assert_trees_all_equal(attend(state, query), empty_outputs(query, case))
        assert (gather(state)[2] == -1).all()
        assert not stats(state).total_tokens.any()
