"""extend, padding, positions and keep: a model's attention in one verb."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, REWINDS, Case, attention_bound, random_query, random_tokens
from laws import (
    append,
    assert_like_reference,
    assert_same,
    attend,
    gather,
    held,
    over,
    prefill,
    start,
    stats,
)
from laws import (
    extend as appended,
)

import jaxkv
from jaxkv import Status, reference

pytestmark = pytest.mark.slow

extend = jax.jit(jaxkv.extend, static_argnames=("causal",))
keep = jax.jit(jaxkv.keep)

SIDES = {
    "left": np.arange(5)[None] >= np.array([[0], [2], [5]]),
    "right": np.arange(5)[None] < np.array([[5], [3], [0]]),
    "middle": np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1]], bool),
}


@over({name: CASES[name] for name in ("q8", "fp32_q8_q4")})
def test_one_token_is_appended_and_attends(case: Case, rng: np.random.Generator) -> None:
    """T = 1 is the same whichever way it is reached: extend, prefill, append and attend; and a
    prompt is what prefill gives."""
    state = appended(start(case), *random_tokens(rng, case, 20))
    new, query = random_tokens(rng, case, 1), random_query(rng, case, 1)
    after, out = extend(state, query, *new)
    assert_same(after, append(state, *new))
    np.testing.assert_allclose(out, attend(after, query), atol=1e-6)
    chex.assert_trees_all_equal(out, prefill(state, query, *new)[1])
    new, query = random_tokens(rng, case, 5), random_query(rng, case, 5)
    chex.assert_trees_all_equal(extend(state, query, *new)[1], prefill(state, query, *new)[1])


@pytest.mark.parametrize("side", SIDES)
@over({name: CASES[name] for name in ("bf16_sinks", "q4")}, slow=CASES)
def test_padding_never_enters(case: Case, side: str, rng: np.random.Generator) -> None:
    """Pads of NaN on either side or in the middle: state, outputs and what is learned of a row are
    those of the valid tokens alone, in the caller's order, zeros for pads."""
    valid = SIDES[side]
    state, twin = start(case), reference.init(case.config, 3)
    for _ in range(4):
        keys, values = random_tokens(rng, case, 5)
        query, window = random_query(rng, case), rng.integers(1, 9, (3, 5)).astype(np.int32)
        mask = rng.random((3, 1, 5, 12)) < 0.8
        dirty = [np.where(valid[..., None, None], x, np.nan) for x in (keys, values, query)]
        clean = [np.where(valid[..., None, None], x, 0) for x in (keys, values, query)]
        plain = append(state, *dirty[:2], lengths=None) if valid.all() else None
        assert plain is None
        only = jax.jit(jaxkv.append)(state, *dirty[:2], valid=valid)
        after, out = extend(
            state, clean[2], *dirty[:2], valid, mask=jnp.asarray(mask), window=window
        )
        assert_same(after, only)
        twin, expected = reference.extend(
            twin, clean[2], *clean[:2], valid, mask=mask, window=window
        )
        assert_like_reference(after, twin)
        if not state.end.any():  # later ones see tokens that ties may have rounded otherwise
            np.testing.assert_allclose(out, expected, atol=1e-4)
        assert not np.asarray(out)[~valid].any() and np.isfinite(out).all()
        state = after
    one = np.array([[True], [False], [True]])
    after, out = extend(state, query[:, :1], keys[:, :1], values[:, :1], one)
    np.testing.assert_array_equal(after.end - state.end, [1, 0, 1])
    assert not out[1].any()


def test_left_padding_leaves_the_sinks_to_tokens(rng: np.random.Generator) -> None:
    """A left-padded row is its tokens alone, bit for bit: sinks, and what `align` learns."""
    case = dataclasses.replace(
        CASES["fp32"], config=jaxkv.preset("Q4_SINKS", max_tokens=96, tail_length=8, num_kv_heads=2,
                                           head_dim=16, sink_tokens=4)
    )  # fmt: skip
    keys, values = random_tokens(rng, case, 40)
    valid = np.arange(40)[None] >= np.array([[0], [11], [38]])
    query = random_query(rng, case, 40)
    padded, out = extend(jaxkv.init(case.config, 3), query, keys, values, valid)
    for b, pads in enumerate((0, 11, 38)):
        one = [x[b : b + 1, pads:] for x in (query, keys, values)]
        alone, expected = extend(jaxkv.init(case.config, 1), *one)
        chex.assert_trees_all_equal(held(gather(padded), b), held(gather(alone), 0))
        np.testing.assert_allclose(out[b : b + 1, pads:], expected, atol=1e-5)


def test_layers_that_only_look(rng: np.random.Generator) -> None:
    """keys=None: the queries of the newest tokens, as `attend`; nothing is appended."""
    case = CASES["fp16_q4"]
    state = appended(start(case), *random_tokens(rng, case, 20))
    query = random_query(rng, case)
    after, out = jaxkv.extend(state, query, None, None)
    chex.assert_trees_all_equal(after, state)
    pairs = np.stack([np.asarray(side[0]) for side in gather(state)[:2]], axis=1)
    bound = attention_bound(query[0, 0], pairs)
    np.testing.assert_allclose(out, attend(state, query), rtol=0, atol=bound)
    with pytest.raises(ValueError, match="keys is a NoneType: pass a JAX or NumPy array"):
        jaxkv.extend(state, query, None, random_tokens(rng, case, 5)[0])


def test_no_tokens_at_all(rng: np.random.Generator) -> None:
    """A query of no tokens, as after a prefix that covers the whole prompt, gives [B, 0, N, H]."""
    case = CASES["fp16_q4"]
    state = appended(start(case), *random_tokens(rng, case, 5))
    query, (keys, values) = random_query(rng, case, 0), random_tokens(rng, case, 0)
    after, (out, lse) = jaxkv.extend(state, query, keys, values, return_lse=True)
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    chex.assert_trees_all_equal(after, state)
    assert jaxkv.attend(state, query).shape == query.shape


def test_positions(rng: np.random.Generator) -> None:
    """The positions of the next tokens, pads not counted; of a stack those of the layers that keep
    something."""
    case = CASES["fp16_q4"]
    lengths = np.array([2, 0, 5], np.int32)
    state = append(start(case), *random_tokens(rng, case, 5), lengths)
    np.testing.assert_array_equal(jaxkv.positions(state, 2), [[2, 3], [0, 1], [5, 6]])
    expected = {"left": [[2, 3, 4, 5, 6], [0, 0, 0, 1, 2], [5] * 5],
                "right": [[2, 3, 4, 5, 6], [0, 1, 2, 2, 2], [5] * 5],
                "middle": [[2, 2, 3, 4, 4], [0, 0, 0, 0, 1], [5, 6, 7, 8, 9]]}  # fmt: skip
    for side, valid in SIDES.items():
        np.testing.assert_array_equal(jaxkv.positions(state, 5, valid), expected[side])
    stack = jaxkv.init(case.config, 3, num_layers=2)
    stack = jaxkv.append(stack, *random_tokens(rng, case, 5), lengths, layer=1)
    np.testing.assert_array_equal(jaxkv.positions(stack, 1), [[2], [0], [5]])
    np.testing.assert_array_equal(jaxkv.positions(stack, 1, layer=0), [[0]] * 3)


def test_valid_from_a_mask(rng: np.random.Generator) -> None:
    """Masks over the slots of a padded cache say which tokens are none: in a prompt, in a later
    chunk, in a step where one row has ended."""
    case = CASES["fp16_q4"]
    for side, valid in SIDES.items():
        slots = np.zeros((3, 16), bool)
        slots[:, :5] = valid
        causal = np.arange(16)[None] <= np.arange(5)[:, None]
        mask = causal[None] & slots[:, None]
        state = start(case)
        np.testing.assert_array_equal(jaxkv.valid_from_mask(mask, state), valid, side)
        found = jaxkv.valid_from_mask(mask[:, None], state, first=0)
        np.testing.assert_array_equal(found, valid, side)
        state = jaxkv.append(state, *random_tokens(rng, case, 5), valid=valid)
        slots[:, 5:8] = [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
        later = (np.arange(16)[None] <= 5 + np.arange(3)[:, None])[None] & slots[:, None]
        np.testing.assert_array_equal(jaxkv.valid_from_mask(later, state), slots[:, 5:8], side)
        state = jaxkv.append(state, *random_tokens(rng, case, 3), valid=slots[:, 5:8])
        step = slots[:, None].copy()
        step[:, 0, 8] = [True, True, False]
        np.testing.assert_array_equal(
            jaxkv.valid_from_mask(step, state)[:, 0], [True, True, False], side
        )
    with pytest.raises(ValueError, match=r"must be bool \[B, T, S\]"):
        jaxkv.valid_from_mask(mask[0], state)


@pytest.mark.parametrize("chunk", [16, 8])
def test_an_image_in_a_prompt(chunk: int, rng: np.random.Generator) -> None:
    """Tokens 4 .. 7 see each other both ways, the others are causal: causal=False and a mask that
    says all, also where the prompt comes in two chunks."""
    case = dataclasses.replace(CASES["fp32"], config=dataclasses.replace(
        CASES["fp32"].config, tail_length=24, max_tokens=24))  # fmt: skip
    keys, values = random_tokens(rng, case, 16)
    query, at = random_query(rng, case, 16), np.arange(16)
    image = (at >= 4) & (at < 8)
    mask = (at[None] <= at[:, None]) | (image[None] & image[:, None])
    state, outs = start(case), []
    for first in range(0, 16, chunk):
        part = slice(first, first + chunk)
        table = np.broadcast_to(mask[part], (1, chunk, 16))
        state, out = extend(
            state, query[:, part], keys[:, part], values[:, part],
            mask=jnp.asarray(table), causal=False,
        )  # fmt: skip
        outs.append(out)
    found = np.concatenate(outs, axis=1)
    for b, t in ((0, 2), (1, 4), (2, 6), (0, 7), (1, 12)):
        seen = mask[t]
        pairs = np.stack([keys[b, seen], values[b, seen]], axis=1)
        expected = reference.exact_attention(query[b, t], pairs)
        np.testing.assert_allclose(found[b, t], expected, atol=1e-5)


@over(REWINDS, slow=REWINDS)
def test_keep_is_as_if_only_these_had_been_appended(case: Case, rng: np.random.Generator) -> None:
    """Of a draft tree the accepted path stays, bit for bit as if it had been appended alone, in
    every row its own; and the cache goes on."""
    of = case.config.rewind_length
    keys, values = random_tokens(rng, case, 70)
    for end in (1, 9, 40):
        plain = drafted = appended(start(case), keys[:, :end], values[:, :end])
        tree = random_tokens(rng, case, of)
        indices = np.full((3, 3), -1, np.int32)
        for b, count in enumerate((0, 1, 3)):
            indices[b, rng.permutation(3)[:count]] = np.sort(rng.permutation(of)[:count])
            order = np.argsort(indices[b] < 0, kind="stable")
            chosen = np.sort(indices[b][order][:count])
            indices[b, indices[b] >= 0] = chosen
        drafted = keep(append(drafted, *tree), indices, of)
        for t in range(3):
            index = np.maximum(indices[:, t], 0)[:, None, None, None]
            one = [np.take_along_axis(x, index, 1) for x in tree]
            plain = append(plain, *one, (indices[:, t] >= 0).astype(np.int32))
        assert_same(drafted, plain)
        more = keys[:, 60:65], values[:, 60:65]
        assert_same(append(drafted, *more), append(plain, *more))
        assert not drafted.status.any()


def test_keep_in_a_stack(rng: np.random.Generator) -> None:
    """Every layer keeps its own tokens; a layer that holds nothing stays so."""
    case = REWINDS["rewind_fp32_q8_q2_sinks"]
    stack = jaxkv.init(case.config, 3, num_layers=3)
    singles = [start(case), start(case)]
    indices, of = np.array([[0, 2], [1, -1], [-1, 4]], np.int32), np.array([5, 4, 5], np.int32)
    add = jax.jit(jaxkv.append)
    for _ in range(4):
        for layer in range(2):
            new = random_tokens(rng, case, 5)
            stack = add(stack, *new, layer=layer)
            singles[layer] = append(singles[layer], *new)
    stack = keep(stack, indices, of)
    for layer in range(2):
        chex.assert_trees_all_equal(
            gather(stack, layer=layer), gather(keep(singles[layer], indices, of))
        )
    assert not stack.status.any() and not stack.end[2].any()


def test_keep_refuses(rng: np.random.Generator) -> None:
    """More than rewind_length, indices out of order or range: an error, or a status bit and a row
    that stays as it was."""
    case = REWINDS["rewind_bf16"]
    state = appended(start(case), *random_tokens(rng, case, 10))
    with pytest.raises(ValueError, match="must be at most rewind_length=3, and in order"):
        jaxkv.keep(state, np.array([[0]] * 3), 4)
    for wrong in ([[1, 0]], [[0, 3]], [[1, 1]], [[-2, 0]]):
        with pytest.raises(ValueError, match="in order within"):
            jaxkv.keep(state, np.array(wrong * 3), 3)
    with pytest.raises(ValueError, match=r"must be ints \[B, n\]"):
        jaxkv.keep(state, np.array([0, 1, 2]), 3)
    after = keep(state, np.array([[1, 0], [0, 1], [0, 1]]), np.array([3, 5, 3]))
    np.testing.assert_array_equal(
        after.status, [Status.OUT_OF_RANGE, Status.REWIND_TOO_MANY, Status.OK]
    )
    for row in range(2):
        chex.assert_trees_all_equal(held(gather(after), row), held(gather(state), row))
    quantized = CASES["q4"]
    with pytest.raises(ValueError, match="keep needs newest tokens in a float precision"):
        jaxkv.keep(start(quantized), np.array([[0]] * 3), 1)


def test_bad_padding(rng: np.random.Generator) -> None:
    case = CASES["fp16_q4"]
    new: Any = random_tokens(rng, case, 5)
    with pytest.raises(ValueError, match=r"valid has shape \(3, 4\)"):
        jaxkv.append(start(case), *new, valid=np.ones((3, 4), bool))
    with pytest.raises(ValueError, match="dtype int"):
        jaxkv.append(start(case), *new, valid=np.ones((3, 5), int))
    with pytest.raises(ValueError, match="lengths and valid are both given"):
        jaxkv.append(start(case), *new, 3, valid=np.ones((3, 5), bool))
    assert stats(start(case)).total_tokens.shape == (3,)
