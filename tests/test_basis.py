"""What a tier learns of a row's keys: their mean before the rotary embedding and the balance of
their channels, where these pay, and nothing where they do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import attend, norms

import jaxkv
from jaxkv import QuantSpec, Rotary, reference
from jaxkv.codec import balance, turning
from jaxkv.tiers.turned import TurnedMean

HEADS, DIM, LENGTH = 2, 32, 160
ROTARY = Rotary(1e4)


def config(rotary: Rotary | None = ROTARY, **fields: object) -> jaxkv.KvCacheConfig:
    given = {"tail_length": 40, "max_tokens": LENGTH, "num_kv_heads": HEADS, "head_dim": DIM}
    return jaxkv.KvCacheConfig(**{**given, "rotary": rotary, **fields})


def keys_of(rng: np.random.Generator, bias: float, spread: float = 0.0) -> np.ndarray:
    """Keys [1, LENGTH, K, H] of unit deviation around a bias of this norm before the rotary
    embedding, in the first head only; `spread` makes channels uneven."""
    direction = rng.normal(size=(HEADS, DIM))
    direction *= bias / np.linalg.norm(direction, axis=-1, keepdims=True)
    direction[1:] = 0
    noise = rng.normal(size=(LENGTH, HEADS, DIM)) * np.exp(spread * rng.normal(size=DIM))
    turned = [reference.turned(direction, p, ROTARY) for p in range(LENGTH)]
    return (noise + np.stack(turned))[None].astype(np.float32)


def stored(settings: jaxkv.KvCacheConfig, keys: np.ndarray) -> jaxkv.CacheState:
    return jax.jit(jaxkv.append)(jaxkv.init(settings), keys, keys)


def error(state: jaxkv.CacheState, keys: np.ndarray) -> np.ndarray:
    """The mean error of the stored keys of each head, [K]."""
    held = np.asarray(jaxkv.gather(state)[0])
    return norms(held - keys)[0, : LENGTH - 40].mean(0)


@pytest.mark.parametrize("first", [[0, 7], [4097, 100_003]])
@pytest.mark.parametrize("rotary", [Rotary(1e4), Rotary(1e6, "interleaved", dim=16)])
def test_the_score_of_a_mean_depends_on_the_position(
    rotary: Rotary, first: list[int], rng: np.random.Generator
) -> None:
    """Where positions follow one another, where a ring's seam lies between them, and where there is
    no mean."""
    mean, query = (rng.normal(size=(2, HEADS, n, DIM)).astype(np.float32) for n in (1, 3))
    run = np.array(first)[:, None] + np.arange(8)
    turns = jnp.asarray(rotary.turns(DIM))
    for position in (run, np.where(np.arange(8) < 5, run, run - 5 + 900), run[:, ::-1]):
        for size in (1.0, 0.0):
            held = TurnedMean(rotary, turns, jnp.asarray(size * mean[:, :, 0]))
            scores = rng.normal(size=(2, HEADS, 3, 8)).astype(np.float32)
            at = jnp.asarray(position, jnp.int32)
            found = held.add(scores, held.operand(query), at, held.steps(8))
            turned = np.stack(
                [
                    [reference.turned(size * mean[b, :, 0], int(p), rotary) for p in position[b]]
                    for b in range(2)
                ]
            )
            expected = scores + np.einsum("bkrh,bskh->bkrs", query, turned)
            angle = 2.0**-21 + position.max() * np.pi * 2.0**-31
            np.testing.assert_allclose(found, expected, atol=4 * DIM * (angle + 2.0**-22))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(1e4),
        Rotary(1e6, "interleaved"),
        Rotary(1e4, scaling=(0.5,) * 16),
        Rotary(5e5, "interleaved", dim=16),
    ],
)
def test_turns_like_complex_numbers(rotary: Rotary, rng: np.random.Generator) -> None:
    x = rng.normal(size=(6, DIM)).astype(np.float32)
    positions = np.array([0, 1, 17, 999, 4097, 131_071], np.int32)
    cos, sin = turning.cos_sin(jnp.asarray(positions), jnp.asarray(rotary.turns(DIM)))
    expected = [reference.turned(row, p, rotary) for row, p in zip(x, positions, strict=True)]
    found = turning.turn(x, cos, sin, rotary)
    # An angle is off by half a 2**-32 of a turn for each position.
    np.testing.assert_allclose(found, expected, atol=2e-6 + 131_071 * np.pi * 2.0**-32 * 4)
    np.testing.assert_allclose(turning.turn(found, cos, -sin, rotary), x, atol=4e-6)


@pytest.mark.slow
def test_a_bias_before_the_embedding_is_taken_out(rng: np.random.Generator) -> None:
    """The biased head's keys are held as well as the other's, and the scores are theirs."""
    keys = keys_of(rng, bias=100.0)
    without, with_it = (stored(config(rotary), keys) for rotary in (None, ROTARY))
    assert error(without, keys)[0] > 5 * error(with_it, keys)[0]
    assert error(with_it, keys)[0] < 1.3 * error(with_it, keys)[1]
    query = rng.normal(size=(1, 5, 4, DIM)).astype(np.float32)
    held = np.stack([np.asarray(x)[0] for x in jaxkv.gather(with_it)[:2]], axis=1)
    expected = reference.exact_attention(query[0, -1], held)
    np.testing.assert_allclose(attend(with_it, query)[0, -1], expected, atol=1e-3)


@pytest.mark.slow
def test_nothing_is_taken_out_where_it_does_not_pay(rng: np.random.Generator) -> None:
    """Bit for bit what there is without a rotary embedding."""
    keys = keys_of(rng, bias=0.0)
    without, with_it = (stored(config(rotary), keys) for rotary in (None, ROTARY))
    np.testing.assert_array_equal(with_it.tiers[-1].keys.turned_mean, 0)
    np.testing.assert_array_equal(with_it.tiers[-1].keys.balance, 0)
    for one, other in zip(jaxkv.gather(without), jaxkv.gather(with_it), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_uneven_channels_are_balanced(rng: np.random.Generator) -> None:
    """The error of scores of even queries falls; values are left alone."""
    keys = keys_of(rng, bias=0.0, spread=1.5)
    even, balanced = (
        stored(config(None, key_quant=QuantSpec(4, 32, rotate=True, balance=on)), keys)
        for on in (False, True)
    )
    assert (np.asarray(balanced.tiers[-1].keys.balance) != 0).all((0, 2)).all()
    assert balanced.tiers[-1].values.balance is None
    missed = [np.asarray(jaxkv.gather(state)[0]) - keys for state in (even, balanced)]
    query = rng.normal(size=(100, DIM))
    before, after = (np.square(x[0, :120, 0] @ query.T).mean() for x in missed)
    assert after < 0.7 * before


@pytest.mark.slow
def test_factors_are_fourth_roots(rng: np.random.Generator) -> None:
    variance = np.exp(rng.uniform(-6, 6, (3, DIM))).astype(np.float32)
    found = np.asarray(balance.factor(balance.balance_of(jnp.asarray(variance))), np.float64)
    relative = found * variance**0.25
    # A float's bits as a logarithm are off by 0.09 at most, there and back; 3 bits are kept.
    assert (relative.max(-1) / relative.min(-1) < 2 ** (0.09 / 4 + 0.09) * (1 + 2.0**-3)).all()
    np.testing.assert_array_equal(balance.factor(balance.balance_of(jnp.ones((1, DIM)))), 1)
    np.testing.assert_array_equal(balance.factor(balance.balance_of(jnp.zeros((1, DIM)))), 1)


@pytest.mark.slow
def test_a_layer_turns_by_its_own_base(rng: np.random.Generator) -> None:
    """Layers of one state whose bases differ are those of states of their own."""
    keys = np.stack([keys_of(rng, bias=100.0), keys_of(rng, bias=100.0)])
    both = Rotary(1e4, layer_bases=(1e4, 1e6))
    state = jaxkv.init(config(both), num_layers=2)
    append = jax.jit(jaxkv.append)
    for layer in range(2):
        state = append(state, keys[layer], keys[layer], layer=jnp.int32(layer))
    for layer, base in enumerate((1e4, 1e6)):
        alone = stored(config(Rotary(base)), keys[layer])
        for one, other in zip(jaxkv.gather(state), jaxkv.gather(alone), strict=True):
            np.testing.assert_array_equal(one[layer], other)


@pytest.mark.slow
def test_layer_bases_are_those_of_the_layers() -> None:
    with pytest.raises(ValueError, match="2 layer_bases, one for each layer"):
        jaxkv.init(config(Rotary(layer_bases=(1e4, 1e6))), num_layers=3)


@pytest.mark.slow
def test_a_short_tail_teaches_nothing() -> None:
    key = config(tail_length=8).chain[-1].key
    assert isinstance(key, QuantSpec)
    assert (key.balance, key.turned_mean, key.align) == (False, False, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairing": "thirds"}, "must be one of halves, interleaved"),
        ({"base": 0.0}, "must be positive"),
    ],
)
def test_bad_embeddings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotary(**fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rotary", "message"),
    [
        (Rotary(dim=7), "must be even"),
        (Rotary(dim=64), "at most head_dim=32"),
        (Rotary(scaling=(1.0,)), "must be dim // 2 = 16"),
        (1e4, "must be a jaxkv.Rotary"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(rotary: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(rotary)
