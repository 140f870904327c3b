"""Many tokens at once are as many one by one: what each query sees, at capacity too."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, REWINDS, Array, Case, attention_bound, random_query, random_tokens
from laws import append, assert_within, attend, extend, gather, held, over, start

import jaxkv
from jaxkv import reference

pytestmark = pytest.mark.slow

FULL = CASES["fp32"].config.max_tokens  # of one exact tier: the right answer is exact attention


def singly(state: jaxkv.CacheState, query: Array, keys: Array, values: Array) -> Array:
    outs = []
    for t in range(query.shape[1]):
        state = append(state, keys[:, t : t + 1], values[:, t : t + 1])
        outs.append(attend(state, query[:, t : t + 1]))
    return np.concatenate(outs, axis=1)


@over(REWINDS, slow=REWINDS)
def test_attending_at_once_is_attending_singly(case: Case, rng: np.random.Generator) -> None:
    """Up to `rewind_length` + 1 tokens after one append see what they see one by one, in an empty,
    a growing and a full cache: drafts are checked as they would be decoded."""
    size = case.config.rewind_length + 1
    keys, values = random_tokens(rng, case, 60)
    for first in (0, 5, 45):
        state = extend(start(case), keys[:, :first], values[:, :first]) if first else start(case)
        new = keys[:, first : first + size], values[:, first : first + size]
        query = random_query(rng, case, size)
        together = append(state, *new)
        pairs = np.array(list(held(gather(together), 0).values()))
        bound = 4 * attention_bound(query[0, -1], pairs)
        assert_within(np.abs(attend(together, query) - singly(state, query, *new)), bound)


@pytest.mark.parametrize("option", ["none", "window", "config", "sinks", "hidden_sinks"])
def test_a_prompt_sees_what_its_tokens_see_singly(option: str, rng: np.random.Generator) -> None:
    """prefill of more tokens than there is room for, into a full cache, without and with a window
    as long as the cache: exact attention over what each token would have found."""
    sinks = 3 if "sinks" in option else 0
    case = dataclasses.replace(
        CASES["fp32"],
        config=dataclasses.replace(
            CASES["fp32"].config,
            tail_length=FULL - sinks,
            sink_tokens=sinks,
            window=FULL if option == "config" else None,
        ),
    )
    options: dict[str, Any] = {"window": 4} if option in ("window", "hidden_sinks") else {}
    options |= {"window_sinks": False} if option == "hidden_sinks" else {}
    keys, values = random_tokens(rng, case, 45)
    query = random_query(rng, case, 45)
    run = jax.jit(jaxkv.prefill, static_argnames=tuple(options))
    state, out = run(start(case), query, keys, values, **options)
    _, more = run(state, query[:, :20], keys[:, :20], values[:, :20], **options)
    twin, expected = reference.prefill(
        reference.init(case.config, 3), query, keys, values, **options
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)
    twin, expected = reference.prefill(twin, query[:, :20], keys[:, :20], values[:, :20], **options)
    np.testing.assert_allclose(more, expected, atol=1e-5)
    step = jax.jit(jaxkv.attend, static_argnames=tuple(options))
    state = start(case)
    for t in range(45):
        state = append(state, keys[:, t : t + 1], values[:, t : t + 1])
        one = step(state, query[:, t : t + 1], **options)
        np.testing.assert_allclose(out[:, t : t + 1], one, atol=1e-5)


def test_a_window_without_room_is_refused() -> None:
    """Queries whose window reaches what their own append has evicted: an error that says what to
    do, where a window as long as the cache says it; with `rewind_length` there is room."""
    config = dataclasses.replace(CASES["fp32"].config, window=FULL)
    query = jnp.zeros((1, 5, 2, 8))
    with pytest.raises(ValueError, match="needs 16 tokens, and the cache has room for 12: use"):
        jaxkv.attend(jaxkv.init(config), query)
    jaxkv.attend(jaxkv.init(dataclasses.replace(config, rewind_length=4)), query)


@pytest.mark.parametrize("shape", ["rows", "column", "queries"])
@pytest.mark.parametrize("verb", ["attend", "prefill"])
def test_windows_of_rows_and_queries(shape: str, verb: str, rng: np.random.Generator) -> None:
    """A window per row [B], [B, 1] or per query [B, T] is that of the twin, whatever B, N and K."""
    case = dataclasses.replace(CASES["fp16_mqa"], batch_size=2)
    keys, values = random_tokens(rng, case, 8)
    query = random_query(rng, case)
    window = rng.integers(1, 9, (2, 5) if shape == "queries" else 2).astype(np.int32)
    window = window[:, None] if shape == "column" else window
    state = extend(start(case), keys, values)
    twin = reference.append(reference.init(case.config, 2), keys, values)
    if verb == "attend":
        out = jax.jit(jaxkv.attend)(state, query, window=window)
        expected = reference.attend(twin, query, window=window)
    else:
        more = random_tokens(rng, case, 5)
        out = jax.jit(jaxkv.prefill)(state, query, *more, window=window)[1]
        expected = reference.prefill(twin, query, *more, window=window)[1]
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_a_traced_soft_cap(rng: np.random.Generator) -> None:
    """A cap may be traced, as layers that scan need it; 0 caps nothing."""
    case = CASES["fp32"]
    state = extend(start(case), *random_tokens(rng, case, 5))
    query = 10 * random_query(rng, case)
    capped = jax.jit(lambda cap: jaxkv.attend(state, query, soft_cap=cap))
    for cap, given in ((2.0, 2.0), (0.0, None), (np.inf, None)):
        expected = jaxkv.attend(state, query, soft_cap=given)
        np.testing.assert_allclose(capped(np.float32(cap)), expected, atol=1e-6)


def test_a_mask_without_an_axis_of_heads(rng: np.random.Generator) -> None:
    """[B, T, P] is [B, 1, T, P], for masks and biases."""
    case = CASES["fp32"]
    state = extend(start(case), *random_tokens(rng, case, 5))
    query, mask = random_query(rng, case), rng.random((3, 5, 5)) < 0.7
    bias = rng.normal(size=(3, 5, 5)).astype(np.float32)
    plain = jaxkv.attend(state, query, mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    wide = jaxkv.attend(
        state, query, mask=jnp.asarray(mask)[:, None], bias=jnp.asarray(bias)[:, None]
    )
    np.testing.assert_array_equal(plain, wide)
