"""The reference against examples worked out by hand, since nothing else checks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jaxkv import reference
from jaxkv.config import KvCacheConfig, Migration
from jaxkv.formats import Precision, QuantSpec
from jaxkv.reference import ReferenceState

FP32, FP16, Q8, Q4 = Precision.FP32, Precision.FP16, Precision.Q8, Precision.Q4
Array = NDArray[Any]


def config(tail: int, room: int, **rest: Any) -> KvCacheConfig:
    rest = {"tail_precision": FP32, "store_precision": Q8, **rest}
    return KvCacheConfig(tail_length=tail, max_tokens=room, num_kv_heads=1, head_dim=8, **rest)


def numbered(first: int, count: int) -> Array:
    """Tokens [1, count, 1, 8] whose elements are all their position."""
    return np.broadcast_to(
        np.arange(first, first + count, dtype=np.float32)[:, None, None], (1, count, 1, 8)
    )


def filled(settings: KvCacheConfig, count: int) -> ReferenceState:
    tokens = numbered(0, count)
    return reference.append(reference.init(settings), tokens, -tokens)


def represent(x: Array, fmt: Precision | QuantSpec) -> Array:
    return reference.represent(x, fmt, np.zeros_like(x[0]))


def positions(state: ReferenceState) -> list[int]:
    found: list[int] = reference.gather(state)[2][0].tolist()
    return [position for position in found if position >= 0]


def layout(state: ReferenceState) -> dict[str, int]:
    names = ("sinks", "hot", "warm", "cold")
    return {
        name: int(reference.counts(state, name)[0])
        for name in names
        if reference.counts(state, name)[0]
    }


def test_asymmetric_codes() -> None:
    """The smallest element is code 0 and the largest the highest code; the rest are rounded to even
    at ties."""
    groups = np.array([[-1.0, -0.5, 0.0, 2.0]], np.float32)
    codes, scale, zero_point = reference.quantize_groups(groups, bits=2, symmetric=False)
    np.testing.assert_array_equal(scale, [[1.0]])
    np.testing.assert_array_equal(zero_point, [[-1.0]])
    np.testing.assert_array_equal(codes, [[0, 0, 1, 3]])  # -0.5 lies halfway between codes 0 and 1


def test_codes_of_three_bits() -> None:
    """Eight levels: from -1 in steps of 0.5."""
    groups = np.array([[-1.0, -0.2, 0.3, 2.5]], np.float32)
    codes, scale, zero_point = reference.quantize_groups(groups, bits=3, symmetric=False)
    np.testing.assert_array_equal(scale, [[0.5]])
    np.testing.assert_array_equal(zero_point, [[-1.0]])
    np.testing.assert_array_equal(codes, [[0, 2, 3, 7]])


def test_symmetric_codes() -> None:
    """The largest magnitude is the highest code, and zero is code 0."""
    codes, scale, zero_point = reference.quantize_groups(
        np.array([[-3.5, 0, 1.2]], np.float32), 4, True
    )
    np.testing.assert_array_equal(scale, [[0.5]])
    np.testing.assert_array_equal(zero_point, [[0.0]])
    np.testing.assert_array_equal(codes, [[-7, 0, 2]])


def test_scale_is_rounded_before_the_codes() -> None:
    """Codes are taken with the scale of 9 bits: 2.901 / 0.2002 rounds to 14, whereas 2.901 / 0.2
    would to 15."""
    codes, scale, _ = reference.quantize_groups(
        np.array([[0, 2.901, 3]], np.float32), 4, symmetric=False
    )
    assert 0.2 < scale[0, 0] == 410 / 2**11
    np.testing.assert_array_equal(codes, [[0, 14, 15]])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_group_is_exact(symmetric: bool, value: float) -> None:
    """A group without extent is kept exactly; a symmetric one to what its scale is rounded up."""
    spec = QuantSpec(4, 8, symmetric=symmetric)
    x = np.full((1, 1, 8), value, np.float32)
    tolerance = 0.5 * 2**-8 if symmetric else 0
    np.testing.assert_allclose(represent(x, spec), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "spec",
    [
        {"group_size": 8},
        {"group_size": 48},
        {"group_size": 4, "axis": "channel"},
        {"group_size": 24, "rotate": True},
        {"group_size": 12, "symmetric": True},
    ],
    ids=str,
)
def test_error_is_at_most_half_a_step(
    bits: int, spec: dict[str, Any], rng: np.random.Generator
) -> None:
    """Every element, in the space of the codes, is within half a scale and what the 16-bit rounding
    adds."""
    full = QuantSpec(bits, **spec)
    x = (3 * rng.normal(size=(8, 2, 24)) + 1).astype(np.float32)
    none = np.zeros_like(x[0])
    groups = reference.to_groups(x, full, none)
    _, scale, _ = reference.quantize_groups(groups, bits, full.symmetric)
    error = np.abs(reference.to_groups(represent(x, full), full, none) - groups)
    assert (error <= scale / 2 + 2.0**-10 * np.abs(groups).max(-1, keepdims=True)).all()
    assert error.max() > scale.min() / 4  # it is quantized at all


def test_groups_of_a_token_run_along_the_head() -> None:
    """With groups of 8, a huge element spoils only the 8 elements around it."""
    x = np.tile(np.linspace(0, 1, 8, dtype=np.float32), (1, 2, 3)).reshape(1, 2, 24)
    x[0, 1, 8] = 1e4
    same = represent(x, QuantSpec(8, 8))
    spoiled = np.abs(same - x) > 0.01
    assert spoiled[0, 1, 8:16].sum() >= 6
    assert spoiled.sum() == spoiled[0, 1, 8:16].sum()


def test_groups_of_a_channel_run_along_the_tokens() -> None:
    """With groups of 4 tokens, a huge element spoils only its channel, in those 4 tokens."""
    x = np.broadcast_to(np.linspace(0, 1, 8, dtype=np.float32)[:, None, None], (8, 2, 8)).copy()
    x[5, 1, 3] = 1e4
    spoiled = np.abs(represent(x, QuantSpec(8, 4, axis="channel")) - x) > 0.01
    assert spoiled[4:, 1, 3].sum() >= 3
    assert spoiled.sum() == spoiled[4:, 1, 3].sum()


def test_rotation_by_hand() -> None:
    """Sylvester's order: row 1 alternates its signs."""
    unit = np.zeros((1, 1, 24), np.float32)
    unit[0, 0, 17] = 4
    expected = np.zeros(24)
    expected[16:] = [1, -1, 1, -1, 1, -1, 1, -1]  # 24 = 3 blocks of 8; 4 times the factor 2 ** -2
    np.testing.assert_array_equal(reference.rotate(unit)[0, 0], expected)


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96])
def test_rotation_and_inverse(head_dim: int, rng: np.random.Generator) -> None:
    """The inverse undoes the rotation, and scores of a query turned by the inverse are
    unchanged."""
    x, query = rng.normal(size=(2, 1, 1, head_dim)).astype(np.float32)
    np.testing.assert_allclose(reference.rotate(reference.rotate(x), inverse=True), x, atol=1e-6)
    turned = np.sum(reference.rotate(x) * reference.rotate(query, inverse=True))
    np.testing.assert_allclose(turned, np.sum(x * query), atol=1e-5)


def test_mirror_turns_the_mean_into_a_constant(rng: np.random.Generator) -> None:
    """Tokens with a common component are turned so that the zero point absorbs it; lengths and
    products stay."""
    spec = QuantSpec(4, 16, align=True)
    common = 10 * rng.normal(size=(2, 16))
    x, query = (
        (common + rng.normal(size=(6, 2, 16))).astype(np.float32),
        rng.normal(size=(6, 2, 16)).astype(np.float32),
    )
    mirror = reference.mirror_of(x, spec)
    turned = reference.reflect(x.mean(0, keepdims=True), mirror)
    assert turned.std(-1).max() < 0.01 * np.abs(turned).mean()
    np.testing.assert_allclose(
        reference.reflect(reference.reflect(x, mirror), mirror), x, rtol=1e-5
    )
    products = (reference.reflect(x, mirror) * reference.reflect(query, mirror)).sum(-1)
    np.testing.assert_allclose(products, (x * query).sum(-1), atol=1e-3)
    error = np.abs(reference.represent(x, spec, mirror) - x).mean()
    assert error < 0.5 * np.abs(represent(x, spec) - x).mean()


def test_no_mirror_changes_nothing(rng: np.random.Generator) -> None:
    """A row whose first tokens are zero has no direction to align with."""
    x = rng.normal(size=(3, 2, 8)).astype(np.float32)
    mirror = reference.mirror_of(np.zeros((1, 2, 8), np.float32), QuantSpec(4, 8, align=True))
    np.testing.assert_array_equal(reference.reflect(x, mirror), x)


def test_rows_are_aligned_by_their_first_tokens() -> None:
    """The mirror comes from the tokens in the tail when the first of them leaves it (the very first
    four left out)."""
    settings = config(6, 16, store_precision=Q4)
    tokens = np.random.default_rng(0).normal(size=(1, 12, 1, 8)).astype(np.float32)
    state = reference.append(reference.init(settings), tokens, tokens)
    expected = reference.mirror_of(tokens[0, 4:6], settings.chain[1].key)
    np.testing.assert_array_equal(state.rows[0].mirrors[1][0], expected)
    np.testing.assert_array_equal(state.rows[0].mirrors[0], 0)


def test_eager_layout() -> None:
    """The tail is full before the store fills; the store evicts, the tail does not."""
    settings = config(3, 8, warm_length=2)
    expected = {
        2: {"hot": 2},
        3: {"hot": 3},
        4: {"hot": 3, "warm": 1},
        6: {"hot": 3, "warm": 2, "cold": 1},
        8: {"hot": 3, "warm": 2, "cold": 3},
        11: {"hot": 3, "warm": 2, "cold": 3},
    }
    assert {count: layout(filled(settings, count)) for count in expected} == expected
    assert positions(filled(settings, 11)) == list(range(3, 11))


def test_batched_layout() -> None:
    """Four tokens move at once, as soon as the tail can spare them."""
    settings = config(3, 12, migration=Migration.BATCHED, migration_batch=4)
    expected = {
        6: {"hot": 6},
        7: {"hot": 3, "cold": 4},
        10: {"hot": 6, "cold": 4},
        11: {"hot": 3, "cold": 8},
        13: {"hot": 5, "cold": 7},
        15: {"hot": 3, "cold": 9},
    }
    assert {count: layout(filled(settings, count)) for count in expected} == expected


def test_sinks_stay() -> None:
    """The first positions are never evicted, and boundaries are counted from their end."""
    settings = config(3, 10, sink_tokens=2, migration=Migration.BATCHED, migration_batch=4)
    assert layout(filled(settings, 2)) == {"sinks": 2}
    assert layout(filled(settings, 8)) == {"sinks": 2, "hot": 6}
    assert layout(filled(settings, 9)) == {"sinks": 2, "hot": 3, "cold": 4}
    state = filled(settings, 20)
    assert positions(state) == [0, 1, *range(12, 20)]
    np.testing.assert_array_equal(reference.gather(state)[0][0, :2, 0, 0], [0, 1])


def test_every_tier_rounds_what_it_gets() -> None:
    """A token passes through the formats of all tiers it has been in: float16, then 8 bits, then 2
    bits."""
    settings = config(
        1,
        6,
        tail_precision=FP16,
        warm_length=1,
        key_quant=QuantSpec(2, 8),
        value_quant=QuantSpec(8, 8),
    )
    x = np.linspace(0.1001, 0.9003, 8, dtype=np.float32).reshape(1, 1, 1, 8)
    state = reference.append(reference.init(settings), x, x)
    warm = settings.chain[1].key
    assert isinstance(warm, QuantSpec) and warm.bits == 8
    chain: list[Precision | QuantSpec] = [FP16, warm, QuantSpec(2, 8)]
    expected = x[0]
    for fmt in chain:
        expected = represent(expected, fmt)
        np.testing.assert_array_equal(reference.gather(state)[0][0, 0], expected[0])
        state = reference.append(state, 0 * x, 0 * x)
    values = represent(represent(represent(x[0], FP16), warm), QuantSpec(8, 8))
    np.testing.assert_array_equal(reference.gather(state)[1][0, 0], values[0])


def test_channel_groups_are_quantized_whole() -> None:
    """Four tokens that leave the tail together share a scale per channel: 4..7 are exact in 2
    bits."""
    spec = QuantSpec(2, 4, axis="channel")
    settings = config(
        2, 16, migration=Migration.BATCHED, migration_batch=4, key_quant=spec, value_quant=spec
    )
    state = filled(settings, 10)
    assert layout(state) == {"hot": 2, "cold": 8}
    np.testing.assert_array_equal(reference.gather(state)[0][0, :10, 0, 3], np.arange(10))


def test_ragged_append() -> None:
    """Each row takes its own number of tokens, and has its own positions."""
    state = reference.init(config(4, 8), batch_size=3)
    tokens = np.repeat(numbered(0, 5), 3, axis=0)
    state = reference.append(state, tokens, tokens, lengths=[0, 2, 5])
    np.testing.assert_array_equal(reference.counts(state, "total"), [0, 2, 5])
    np.testing.assert_array_equal(reference.gather(state)[2][:, :6].max(axis=1), [-1, 1, 4])


def test_evict_oldest_first() -> None:
    """Evicting empties the store, then the tail; evicted tokens do not come back, and positions go
    on."""
    state = reference.evict(filled(config(3, 8), 8), 6)
    assert positions(state) == [6, 7]
    assert layout(state) == {"hot": 2}
    state = reference.append(state, numbered(8, 2), numbered(8, 2))
    assert positions(state) == [6, 7, 8, 9]
    assert layout(state) == {"hot": 3, "cold": 1}
    with pytest.raises(ValueError, match="count=5: must be 0 to 4"):
        reference.evict(state, 5)


def test_rewind_within_the_slack_is_exact() -> None:
    """Taking back as many tokens as `rewind_length` gives the state in which they were never
    appended."""
    settings = config(3, 8, warm_length=2, rewind_length=4)
    wanted = filled(settings, 17)
    state = reference.rewind(filled(settings, 21), 4)
    assert positions(state) == positions(wanted) == list(range(9, 17))
    np.testing.assert_array_equal(reference.gather(state)[0], reference.gather(wanted)[0])
    assert layout(state) == layout(wanted)


def test_deep_rewind_keeps_codes() -> None:
    """Beyond the slack the tail is shorter, and what was evicted stays so."""
    settings = config(3, 8)
    state = reference.rewind(filled(settings, 20), 5)
    assert positions(state) == [12, 13, 14]
    assert layout(state) == {"cold": 3}
    state = reference.append(state, numbered(15, 2), numbered(15, 2))
    assert layout(state) == {"hot": 2, "cold": 3}
    assert positions(state) == [12, 13, 14, 15, 16]


def test_rewind_into_the_sinks() -> None:
    """Allowed as long as nothing between the sinks and the end has been evicted."""
    settings = config(3, 8, sink_tokens=2)
    state = reference.rewind(filled(settings, 5), 4)
    assert positions(state) == [0]
    assert positions(reference.append(state, numbered(1, 3), numbered(1, 3))) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="count=7: must be 0 to 6"):
        reference.rewind(filled(settings, 9), 7)


def test_take_rows_copies() -> None:
    """Two copies of one row go their own ways."""
    state = reference.take_rows(filled(config(4, 8), 3), [0, 0])
    state = reference.append(state, *[np.repeat(numbered(3, 2), 2, axis=0)] * 2, lengths=[0, 2])
    np.testing.assert_array_equal(reference.counts(state, "total"), [3, 5])


def test_attention_by_hand() -> None:
    """Scores 0 and log 3 give weights 1/4 and 3/4."""
    keys = np.zeros((1, 2, 1, 8), np.float32)
    keys[0, 1, 0, 0] = np.log(3)
    values = np.zeros((1, 2, 1, 8), np.float32)
    values[0, :, 0, 0] = [4, 8]
    query = np.zeros((1, 1, 1, 8), np.float32)
    query[0, 0, 0, 0] = 2
    state = reference.append(reference.init(config(4, 4)), keys, values)
    np.testing.assert_allclose(reference.attend(state, query, scale=0.5)[0, 0, 0, 0], 7, rtol=1e-6)
    default = reference.attend(state, query * (8**0.5 / 2))[0, 0, 0, 0]  # scale is 1 / sqrt(8)
    np.testing.assert_allclose(default, 7, rtol=1e-6)


def test_heads_share_keys_in_order() -> None:
    """Query heads 0 and 1 read kv head 0, heads 2 and 3 kv head 1."""
    pairs = np.zeros((1, 2, 2, 8))
    pairs[0, 1] = [[5] * 8, [7] * 8]
    out = reference.exact_attention(np.ones((4, 8)), pairs)
    np.testing.assert_array_equal(out[:, 0], [5, 5, 7, 7])


def test_attend_is_causal_among_the_newest() -> None:
    """With equal scores, query t averages the tokens up to its own."""
    state = filled(config(4, 8), 4)
    out = reference.attend(state, np.zeros((1, 3, 1, 8)), lengths=[2])
    np.testing.assert_allclose(out[0, :, 0, 0], [-1, -1.5, 0])


def test_prefill_sees_the_raw_tokens() -> None:
    """The new tokens count exactly, as before any rounding, each query's with those that it would
    find had they come one by one: the newest two."""
    settings = config(1, 2, tail_precision=FP16)
    state = filled(settings, 1)
    new = numbered(0, 3) + 0.0001
    state, out = reference.prefill(state, np.zeros((1, 3, 1, 8)), new, new)
    np.testing.assert_allclose(out[0, :, 0, 0], [0.0001 / 2, 1.0002 / 2, 3.0002 / 2], rtol=1e-5)
    assert positions(state) == [2, 3]


def test_empty_attends_to_zeros() -> None:
    """No token, no output; also after everything has been evicted."""
    for state in (reference.init(config(4, 8)), reference.evict(filled(config(4, 8), 3), 3)):
        np.testing.assert_array_equal(
            reference.attend(state, np.ones((1, 2, 3, 8))), np.zeros((1, 2, 3, 8))
        )
