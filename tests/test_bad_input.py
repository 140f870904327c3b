"""Bad input is refused with a ValueError that says what was given, what was wanted and what to
do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheState, KvCacheConfig, Migration, Precision, QuantSpec, Status

SMALL = {"tail_length": 4, "max_tokens": 16, "num_kv_heads": 2, "head_dim": 16}
CONFIG = KvCacheConfig(**SMALL)
BATCH = 3


@pytest.fixture(scope="module")
def state() -> CacheState:
    """Three rows that hold 5, 0 and 2 tokens."""
    ones = jnp.ones((BATCH, 5, 2, 16))
    return jax.jit(jaxkv.append)(jaxkv.init(CONFIG, BATCH), ones, ones, np.array([5, 0, 2]))


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


# The configuration.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: must be an int of at least 1"),
        ({"head_dim": 10**30}, "must be at most 2147483647, as int32 counts"),
        ({"num_kv_heads": 0}, "num_kv_heads=0: must be an int of at least 1"),
        ({"head_dim": -8}, "head_dim=-8: must be an int of at least 1"),
        ({"head_dim": 16.0}, r"head_dim=16.0: must be an int"),
        ({"migration_batch": 0}, "migration_batch=0: must be an int of at least 1"),
        ({"tail_length": -1}, "tail_length=-1: must be an int of at least 0"),
        ({"tail_length": True}, "tail_length=True: must be an int"),
        ({"sink_tokens": -1}, "sink_tokens=-1: must be an int of at least 0"),
        ({"warm_length": -2}, "warm_length=-2: must be an int of at least 0"),
        ({"rewind_length": -1}, "rewind_length=-1: must be an int of at least 0"),
        ({"window": 0}, "window=0: must be an int of at least 1"),
        ({"max_tokens": 3}, "max_tokens=3 cannot hold tail_length=4 .* raise it to 4"),
        (
            {"warm_length": 9, "sink_tokens": 4},
            "max_tokens=16 cannot hold .* warm_length=9 .* sink_tokens=4: raise it to 17",
        ),
        ({"tail_length": 0, "sink_tokens": 16}, "max_tokens=16 are all sinks: leave room"),
        ({"tail_precision": "fp12"}, "tail_precision='fp12': must be one of .*'fp16'"),
        ({"store_precision": "q5"}, "store_precision='q5': must be one of .*'q4'"),
        ({"warm_precision": None}, "warm_precision=None: must be one of"),
        ({"migration": "lazy"}, "migration='lazy': must be one of .*'batched'"),
        (
            {"key_quant": QuantSpec(4, 5)},
            "group_size=5 for the cold keys: must divide head_dim=16, or be .* = 32",
        ),
        (
            {"value_quant": QuantSpec(4, 24)},
            "group_size=24 for the cold values: must divide head_dim=16",
        ),
        (
            {"key_quant": QuantSpec(4, 8, axis="channel")},
            "axis='channel' .* cold keys: .* set migration='batched'",
        ),
        (
            {
                "key_quant": QuantSpec(4, 12, axis="channel"),
                "migration": "batched",
                "migration_batch": 16,
            },
            r"group_size=12 for the cold keys: .* migration_batch \(now 16\) to a multiple of 12",
        ),
        (
            {
                "key_quant": QuantSpec(4, 8, axis="channel"),
                "migration": "batched",
                "migration_batch": 8,
                "tail_length": 0,
            },
            "axis='channel' for the cold keys: .* set tail_length >= 1",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config(fields: dict[str, Any], message: str) -> None:
    """Every field is checked when the configuration is made."""
    with refused(message):
        KvCacheConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits=5: 2, 3, 4 or 8 are supported"),
        ({"bits": 16}, "bits=16: 2, 3, 4 or 8 are supported"),
        ({"bits": 4, "axis": "head"}, "axis='head': must be 'token' or 'channel'"),
        ({"bits": 4, "group_size": 0}, "group_size=0: must be positive, or None"),
        (
            {"bits": 4, "align": True, "symmetric": True},
            "align=True needs a zero point per token: leave symmetric=False",
        ),
        ({"bits": 4, "align": True, "axis": "channel"}, "align=True needs a zero point per token"),
    ],
    ids=str,
)
def test_quant_spec(fields: dict[str, Any], message: str) -> None:
    """A recipe that cannot be carried out is refused when it is written down."""
    with refused(message):
        QuantSpec(**fields)


def test_legal_corners() -> None:
    """A tail of 0, a chain that ends with the warm tier, strings for enums, one group for a whole
    token."""
    assert [tier.name for tier in KvCacheConfig(**{**SMALL, "tail_length": 0}).chain] == ["cold"]
    assert [tier.name for tier in KvCacheConfig(**SMALL, warm_length=10, sink_tokens=2).chain] == [
        "hot",
        "warm",
    ]
    assert KvCacheConfig(**SMALL, store_precision="q8", migration="batched") == KvCacheConfig(
        **SMALL, store_precision=Precision.Q8, migration=Migration.BATCHED
    )
    assert KvCacheConfig(**SMALL, key_quant=QuantSpec(4, 32)).chain[-1].key == QuantSpec(4, 32)
    assert hash(KvCacheConfig(**SMALL)) == hash(CONFIG)
    with pytest.raises(ValueError, match="quantized and has no float dtype"):
        _ = Precision.Q4.dtype_name


@pytest.mark.parametrize("size", [0, -1, 2.0, None], ids=str)
def test_init(size: Any) -> None:
    """A state needs at least one row, and at least one layer if it has layers."""
    with refused(f"batch_size={size!r}: must be an int of at least 1"):
        jaxkv.init(CONFIG, size)
    if size is not None:
        with refused(f"num_layers={size!r}: must be an int of at least 1"):
            jaxkv.init(CONFIG, 1, num_layers=size)


# Keys, values and queries.


GOOD = (BATCH, 2, 2, 16)
BAD_TOKENS = [
    ((BATCH, 2, 16), r"shape=\(3, 2, 16\): must be \[B, T, K, H\]"),
    ((1, *GOOD), r"shape=\(1, 3, 2, 2, 16\): must be \[B, T, K, H\]"),
    ((2, 2, 2, 16), r"shape=\(2, 2, 2, 16\): must be .* = \[3, "),
    ((BATCH, 2, 3, 16), r"shape=\(3, 2, 3, 16\): must be .* 2, 16\]"),
    ((BATCH, 2, 2, 8), r"shape=\(3, 2, 2, 8\): must be .* 2, 16\]"),
]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("shape", "message"), BAD_TOKENS, ids=str)
def test_shapes_of_new_tokens(
    state: CacheState, shape: tuple[int, ...], message: str, traced: bool
) -> None:
    """append and prefill refuse keys and values that do not fit the cache, also while they are
    traced."""
    append, prefill = (jax.jit(f) if traced else f for f in (jaxkv.append, jaxkv.prefill))
    query = array(BATCH, 2, 4, 16)
    with refused("keys." + message):
        append(state, array(*shape), array(*GOOD))
    with refused("values." + message.replace("K, H", "K, V")):
        append(state, array(*GOOD), array(*shape))
    with refused("keys." + message):
        prefill(state, query, array(*shape), array(*GOOD))
    with refused("values." + message.replace("K, H", "K, V")):
        prefill(state, query, array(*GOOD), array(*shape))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.bool_, jnp.complex64], ids=str)
def test_dtypes(state: CacheState, dtype: Any) -> None:
    """Keys, values and queries are floats."""
    good, bad = array(*GOOD), array(*GOOD, dtype=dtype)
    name = jnp.dtype(dtype).name
    calls: dict[str, Callable[[], Any]] = {
        "keys": lambda: jaxkv.append(state, bad, good),
        "values": lambda: jaxkv.append(state, good, bad),
        "query": lambda: jaxkv.attend(state, bad),
    }
    for argument, call in calls.items():
        with refused(f"{argument}.dtype={name}: must be a float; cast it first"):
            call()


def test_different_lengths(state: CacheState) -> None:
    """Keys, values and the queries of a prompt come in equal numbers, at least one."""
    with refused(r"values.shape=\(3, 3, 2, 16\): must be .* = \[3, 2, 2, 16\]"):
        jaxkv.append(state, array(*GOOD), array(BATCH, 3, 2, 16))
    with refused(r"keys.shape=\(3, 2, 2, 16\): must be .* = \[3, 3, 2, 16\]"):
        jaxkv.prefill(state, array(BATCH, 3, 2, 16), array(*GOOD), array(*GOOD))
    with refused(r"keys.shape=\(3, 0, 2, 16\): T must be at least 1"):
        jaxkv.append(state, array(BATCH, 0, 2, 16), array(BATCH, 0, 2, 16))


@pytest.mark.parametrize("bad", [[[1.0]], 1.0, None], ids=["list", "float", "None"])
def test_not_an_array(state: CacheState, bad: Any) -> None:
    """Only arrays are taken."""
    with refused(f"keys is a {type(bad).__name__}: pass a JAX or NumPy array"):
        jaxkv.append(state, bad, array(*GOOD))
    with refused(f"query is a {type(bad).__name__}: pass a JAX or NumPy array"):
        jaxkv.attend(state, bad)


@pytest.mark.slow
def test_numpy_arrays_are_taken(state: CacheState) -> None:
    """NumPy keys, values and queries do as well as JAX's."""
    new, query = np.ones(GOOD, np.float32), np.ones((BATCH, 2, 4, 16), np.float32)

    @jax.jit  # one program to compile; the arrays, not being arguments, reach the cache as they are
    def steps() -> jax.Array:
        after, _ = jaxkv.prefill(jaxkv.append(state, new, new), query, new, new)
        return jaxkv.attend(after, query)

    np.testing.assert_allclose(steps(), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((BATCH, 4, 16), r"query.shape=\(3, 4, 16\): must be \[B, T, N, H\]"),
        ((2, 1, 4, 16), r"query.shape=\(2, 1, 4, 16\): must be .* = \[3, "),
        ((BATCH, 1, 4, 24), r"query.shape=\(3, 1, 4, 24\): must be .* 16\]"),
        ((BATCH, 1, 3, 16), "query has 3 heads: must be a multiple of num_kv_heads=2"),
        ((BATCH, 1, 0, 16), "query has 0 heads: must be a multiple of num_kv_heads=2"),
    ],
    ids=str,
)
def test_shapes_of_queries(state: CacheState, shape: tuple[int, ...], message: str) -> None:
    """attend and prefill refuse queries that do not fit the cache."""
    with refused(message):
        jaxkv.attend(state, array(*shape))
    with refused(message):
        jaxkv.prefill(state, array(*shape), array(*GOOD), array(*GOOD))


# Lengths and counts.


BAD_COUNTS = [
    (np.array([1, 1]), r"shape \(2,\) and dtype int64: must be an int or ints \[3\], one per row"),
    (np.array([[1, 1, 1]]), r"shape \(1, 3\)"),
    (np.array([1.0, 1, 1]), "dtype float64: must be an int"),
    (True, "dtype bool: must be an int"),
    (1.5, "dtype float64: must be an int"),
    (-1, r"=-1: must {least}"),
    (np.array([0, -2, 0]), r"=\[0, -2, 0\]: must {least}"),
]


@pytest.mark.parametrize(("count", "message"), BAD_COUNTS, ids=str)
def test_counts(state: CacheState, count: Any, message: str) -> None:
    """Lengths and counts are whole, not negative, and one for all rows or one for each."""
    good, query = array(*GOOD), array(BATCH, 2, 4, 16)
    calls: dict[str, list[Callable[[], Any]]] = {
        "lengths": [
            lambda: jaxkv.append(state, good, good, count),
            lambda: jaxkv.attend(state, query, lengths=count),
            lambda: jaxkv.prefill(state, query, good, good, count),
        ],
        "count": [lambda: jaxkv.evict(state, count), lambda: jaxkv.rewind(state, count)],
    }
    least = {"lengths": r"lie in 0 \.\. \d+", "count": "be at least 0"}
    for name, callables in calls.items():
        for call in callables:
            with refused(f"{name}.*{message.replace('{least}', least[name])}"):
                call()


def test_lengths_beyond_the_tokens_given(state: CacheState) -> None:
    """No row may take more tokens than there are."""
    good, lengths = array(*GOOD), np.array([0, 3, 1])
    for call in (
        lambda: jaxkv.append(state, good, good, lengths),
        lambda: jaxkv.attend(state, good, lengths=lengths),
        lambda: jaxkv.prefill(state, good, good, good, lengths),
    ):
        with refused(r"lengths=\[0, 3, 1\]: must lie in 0 .. 2"):
            call()


@pytest.mark.parametrize(
    ("verb", "bit"), [(jaxkv.evict, Status.EVICT_TOO_MANY), (jaxkv.rewind, Status.REWIND_TOO_MANY)]
)
def test_more_than_is_held(state: CacheState, verb: Callable[..., CacheState], bit: Status) -> None:
    """Outside jit an error; inside, the row stays as it is and says so in its status."""
    with refused(r"count=\[5, 1, 2\]: rows hold \[5, 0, 2\] such tokens; ask for fewer"):
        verb(state, np.array([5, 1, 2]))
    after = jax.jit(verb)(state, np.array([5, 1, 2]))
    np.testing.assert_array_equal(after.status, [0, bit, 0])
    np.testing.assert_array_equal(jaxkv.stats(after).total_tokens, [0, 0, 0])
    np.testing.assert_array_equal(
        jaxkv.stats(verb(state, np.array([5, 0, 2]))).total_tokens, [0, 0, 0]
    )


@pytest.mark.parametrize("verb", [jaxkv.evict, jaxkv.rewind])
def test_negative_counts_inside_jit(state: CacheState, verb: Callable[..., CacheState]) -> None:
    """A negative count that only shows inside jit neither brings tokens back nor goes unnoticed."""
    after = jax.jit(verb)(verb(state, np.array([3, 0, 0])), np.array([-2, -1, 0]))
    np.testing.assert_array_equal(jaxkv.stats(after).total_tokens, [2, 0, 2])
    np.testing.assert_array_equal(after.status, [Status.OUT_OF_RANGE, Status.OUT_OF_RANGE, 0])


@pytest.mark.slow
def test_lengths_out_of_range_inside_jit(state: CacheState) -> None:
    """Where lengths are seen to be out of range only inside jit, the row stays as it is and says
    so; its queries get zeros."""
    good, lengths = array(*GOOD) + 1, np.array([7, -3, 1])
    for verb in (
        jaxkv.append,
        lambda state, x, y, lengths: jaxkv.prefill(state, x, x, y, lengths)[0],
    ):
        after = jax.jit(verb)(state, good, good, lengths)
        np.testing.assert_array_equal(after.end, [5, 0, 3])
        np.testing.assert_array_equal(after.status, [Status.OUT_OF_RANGE, Status.OUT_OF_RANGE, 0])
    out = jax.jit(jaxkv.attend)(state, good, lengths=lengths)
    np.testing.assert_array_equal(
        np.any(out, axis=(2, 3)), [[False, False], [False, False], [True, False]]
    )


def test_rewind_that_cuts_a_group() -> None:
    """Codes that share a scale with tokens that are gone cannot be taken apart; rewind_length makes
    room for it."""
    spec = QuantSpec(4, 4, axis="channel")
    config = KvCacheConfig(
        **SMALL, key_quant=spec, value_quant=spec, migration=Migration.BATCHED, migration_batch=4
    )
    state = jax.jit(jaxkv.append)(jaxkv.init(config), array(1, 16, 2, 16), array(1, 16, 2, 16))
    with refused(r"count=\[?10\]?: .* cut a frozen group .* rewind_length \(now 0\)"):
        jaxkv.rewind(state, 10)
    after = jax.jit(jaxkv.rewind)(state, 10)
    assert after.status[0] == Status.REWIND_CUTS_GROUP
    assert after.end[0] == 16


# Rows and layers.


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([0, 3]), r"rows=\[0, 3\]: the state has rows 0 .. 2"),
        (np.array([-1]), r"rows=\[-1\]: the state has rows 0 .. 2"),
        (np.array([[0]]), r"rows has shape \(1, 1\) .* must be a vector of row numbers"),
        (np.array([], np.int32), r"rows has shape \(0,\)"),
        (np.array([0.0]), "dtype float64: must be a vector of row numbers"),
        (1, r"rows has shape \(\)"),
    ],
    ids=str,
)
def test_take_rows(state: CacheState, rows: Any, message: str) -> None:
    """Only rows that exist, in a vector."""
    with refused(message):
        jaxkv.take_rows(state, rows)


def test_layers(state: CacheState) -> None:
    """`layer` goes with states that have layers, and only there."""
    stack, good = jaxkv.init(CONFIG, BATCH, num_layers=2), array(*GOOD)
    calls: list[Callable[..., Any]] = [
        lambda state, **layer: jaxkv.append(state, good, good, **layer),
        lambda state, **layer: jaxkv.attend(state, good, **layer),
        lambda state, **layer: jaxkv.prefill(state, good, good, good, **layer),
    ]
    for call in calls:
        with refused("layer=None, but the state has 2 layers: pass layer=0 .. 1"):
            call(stack)
    for call in [*calls, lambda state, **layer: jaxkv.gather(state, **layer)]:
        for layer in (2, -1):
            with refused(f"layer={layer}: the state has layers 0 .. 1"):
                call(stack, layer=layer)
        with refused("the state has no layer axis: leave it out, or pass num_layers to init"):
            call(state, layer=0)


def test_unknown_option(state: CacheState) -> None:
    """A misspelt option of attention names the ones there are."""
    with refused(r"unknown options \['windw'\]: attention knows .*'window'"):
        jaxkv.attend(state, array(*GOOD), windw=3)
