"""What the compiler makes of a decode step: no copies of the cache, no temporaries that grow with
it, only portable operations."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mps
import pytest
from cases import CASES, LONG, channels
from jax import export, lax
from laws import marked
from lowering import H100

import jaxkv
from jaxkv import CacheState, KvCacheConfig, Migration, Precision, QuantSpec

HEADS, LAYERS = 4, 3
SLOTS = (
    5987,
    9001,
)  # of the store; primes, and more than two blocks: half of all words of 4 bits would pass for all of 2 bits

CONFIGS: dict[str, dict[str, Any]] = {
    "eager": {"migration": Migration.EAGER},
    "batched": {"migration": Migration.BATCHED},
    "three_tiers": {"migration": Migration.BATCHED, "warm_length": 70, "sink_tokens": 4},
    "all_quantized": {"tail_length": 0, "store_precision": Precision.Q8},
    "bf16": {
        "tail_length": 0,
        "tail_precision": Precision.FP32,
        "warm_length": 90,
        "warm_precision": Precision.BF16,
    },
    "channel": {
        "migration": Migration.BATCHED,
        "key_quant": channels(4, 32),
        "value_quant": QuantSpec(2, 32),
    },
    "float": {"tail_length": 0, "store_precision": Precision.FP32},
}


def config(name: str, slots: int) -> KvCacheConfig:
    """A cache whose last tier has `slots` slots, or up to 127 more."""
    fields = {"tail_length": 100, "num_kv_heads": 2, "head_dim": 64, **CONFIGS[name]}
    before = fields["tail_length"] + fields.get("warm_length", 0) + fields.get("sink_tokens", 0)
    return KvCacheConfig(max_tokens=slots + before, **fields)


Step = Callable[..., tuple[Any, Any]]
Program = tuple[
    Step, tuple[Any, ...]
]  # a decode step and the shapes of its arguments, the cache first


def new_shapes(
    batch: int, *lead: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    key = jax.ShapeDtypeStruct((*lead, batch, 1, 2, 64), jnp.float32)
    return key, key, jax.ShapeDtypeStruct((*lead, batch, 1, HEADS, 64), jnp.float32)


def decode(
    state: CacheState, key: jax.Array, value: jax.Array, query: jax.Array, **layer: Any
) -> tuple[CacheState, jax.Array]:
    state = jaxkv.append(state, key, value, **layer)
    return state, jaxkv.attend(state, query, **layer)


def one_state(settings: KvCacheConfig, batch: int) -> Program:
    return decode, (jax.eval_shape(lambda: jaxkv.init(settings, batch)), *new_shapes(batch))


def list_of_layers(settings: KvCacheConfig, batch: int) -> Program:
    def step(states: list[CacheState], *new: jax.Array) -> tuple[list[CacheState], list[jax.Array]]:
        layers = [decode(state, *(x[i] for x in new)) for i, state in enumerate(states)]
        return [state for state, _ in layers], [out for _, out in layers]

    states = [jax.eval_shape(lambda: jaxkv.init(settings, batch)) for _ in range(LAYERS)]
    return step, (states, *new_shapes(batch, LAYERS))


def scanned_stack(settings: KvCacheConfig, batch: int) -> Program:
    def step(stack: CacheState, *new: jax.Array) -> tuple[CacheState, jax.Array]:
        def layer(stack: CacheState, xs: tuple[jax.Array, ...]) -> tuple[CacheState, jax.Array]:
            return decode(stack, *xs[1:], layer=xs[0])

        return lax.scan(layer, stack, (jnp.arange(LAYERS), *new))

    return step, (
        jax.eval_shape(lambda: jaxkv.init(settings, batch, num_layers=LAYERS)),
        *new_shapes(batch, LAYERS),
    )


def loop_of_steps(settings: KvCacheConfig, batch: int) -> Program:
    """Several steps in one program, the state in the carry."""

    def steps(state: CacheState, *new: jax.Array) -> tuple[CacheState, jax.Array]:
        return lax.scan(lambda state, xs: decode(state, *xs), state, new)

    return steps, (jax.eval_shape(lambda: jaxkv.init(settings, batch)), *new_shapes(batch, 5))


def mapped_states(settings: KvCacheConfig, batch: int) -> Program:
    """Several states under `vmap`. (Batched migration's condition becomes a choice between two
    caches there, and is copied: README, limits.)"""
    states = jax.eval_shape(
        lambda: jax.vmap(lambda _: jaxkv.init(settings, batch))(jnp.arange(LAYERS))
    )
    return jax.vmap(decode), (states, *new_shapes(batch, LAYERS))


def prompt(
    state: CacheState, key: jax.Array, value: jax.Array, query: jax.Array, **layer: Any
) -> tuple[CacheState, jax.Array]:
    return jaxkv.prefill(state, query, key, value, **layer)


def chunk(settings: KvCacheConfig, batch: int, size: int = 3) -> Program:
    """Some tokens after those held, which are attended before the new ones are written."""
    new = [jax.ShapeDtypeStruct((batch, size, *x.shape[2:]), x.dtype) for x in new_shapes(batch)]
    return prompt, (jax.eval_shape(lambda: jaxkv.init(settings, batch)), *new)


def long_chunk(settings: KvCacheConfig, batch: int) -> Program:
    """More than enter at once."""
    return chunk(settings, batch, 700)


def chunk_of_layers(settings: KvCacheConfig, batch: int) -> Program:
    def step(stack: CacheState, *new: jax.Array) -> tuple[CacheState, jax.Array]:
        def layer(stack: CacheState, xs: tuple[jax.Array, ...]) -> tuple[CacheState, jax.Array]:
            return prompt(stack, *xs[1:], layer=xs[0])

        return lax.scan(layer, stack, (jnp.arange(LAYERS), *new))

    return step, scanned_stack(settings, batch)[1]


DECODING = (one_state, list_of_layers, scanned_stack, loop_of_steps)
PROMPTS = (chunk, long_chunk, chunk_of_layers)
SHAPES = {f.__name__: f for f in (*DECODING, *PROMPTS, mapped_states)}


@functools.cache
def compiled(shape: str, name: str, slots: int, donate: bool = True, batch: int = 2) -> Any:
    step, arguments = SHAPES[shape](config(name, slots), batch)
    return jax.jit(step, donate_argnums=0 if donate else ()).lower(*arguments).compile()


# Reading the compiled program.


_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def instructions(text: str) -> Iterator[tuple[str, str, str]]:
    """Result type, operation and the rest of the line of every instruction; a fusion counts as what
    its root does."""
    roots, computation = dict[str, str](), ""
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        computation = head[1] if head else computation
        if (found := _INSTRUCTION.match(line)) and found[1]:
            roots[computation] = found[3]
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            called = re.search(r"calls=%?([\w.\-]+)", found[4])
            yield (
                found[2],
                roots[called[1]] if found[3] == "fusion" and called else found[3],
                found[4],
            )


# A cache-sized array may be handed on, or written in place.
HARMLESS = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "opt-barrier",
}
IN_PLACE = {"scatter", "dynamic-update-slice"}


def sized_like_the_cache(text: str, settings: KvCacheConfig) -> set[tuple[str, str]]:
    """Operations, with their result, that make an array with an axis of the store's slots, or of
    all their words, and not in place."""
    slots = settings.chain[-1].capacity
    found = set()
    for result, operation, _ in instructions(text):
        for shape in re.findall(r"\w+\[([\d,]+)\]", result):
            if (
                any(int(axis) % slots == 0 for axis in shape.split(","))
                and operation not in HARMLESS | IN_PLACE
            ):
                found.add((operation, result))
    return found


# All configurations as one state and as a stack; the two modes of migration in the other shapes,
# too.
DECODED = [
    (shape, name)
    for shape in SHAPES
    for name in (
        CONFIGS if shape in ("one_state", "scanned_stack", "chunk") else ("eager", "batched")
    )
    if (shape, name) != ("mapped_states", "batched")
]
# CI takes all configurations as one state, and the other shapes with one each.
COPIED = [
    (shape, name, 2)
    for shape, name in DECODED
    if shape == "one_state" or name == ("eager" if shape == "mapped_states" else "batched")
]


@pytest.mark.parametrize(
    ("shape", "name", "batch"),
    [
        pytest.param(*which, batch, marks=marked((*which, batch), (), COPIED))
        for which in DECODED
        for batch in (1, 2)
    ],
)
def test_nothing_of_the_cache_is_copied(shape: str, name: str, batch: int) -> None:
    """With the state donated, a step writes in place: no operation makes a second array of the
    cache's size."""
    program = compiled(shape, name, SLOTS[0], batch=batch)
    assert not sized_like_the_cache(program.as_text(), config(name, SLOTS[0]))
    memory, state = program.memory_analysis(), SHAPES[shape](config(name, SLOTS[0]), batch)[1][0]
    assert memory.alias_size_in_bytes >= sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=marked(n, (), ("batched", "three_tiers", "channel"))) for n in CONFIGS],
)
def test_temporaries_do_not_grow_with_the_cache(name: str) -> None:
    """A step needs the same working memory for 5,987 and for 9,001 slots: attention goes block by
    block."""
    small, large = (
        compiled("one_state", name, slots).memory_analysis().temp_size_in_bytes for slots in SLOTS
    )
    assert large <= small * 1.01


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["one_state", "scanned_stack"])
def test_copies_are_seen(shape: str) -> None:
    """Without donation the cache is copied, and the census above sees it."""
    found = sized_like_the_cache(
        compiled(shape, "eager", SLOTS[0], donate=False).as_text(), config("eager", SLOTS[0])
    )
    assert {operation for operation, _ in found} & {"copy", "copy-start"}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tail"), [("q8", 256), ("q4", 256), ("q2", 256), ("q4", 0)])
def test_attention_stays_on_one_core(precision: str, tail: int) -> None:
    """No operation on a block is split between XLA:CPU's threads (by its cost model), and none is
    computed twice."""
    state = jax.eval_shape(
        lambda: jaxkv.init(KvCacheConfig(tail, store_precision=precision, max_tokens=16384))
    )
    text = (
        jax.jit(jaxkv.attend)
        .lower(state, jax.ShapeDtypeStruct((1, 1, 32, 128), jnp.float32))
        .compile()
        .as_text()
    )
    bodies = {name for line in text.splitlines() for name in re.findall(r"body=%?([\w.\-]+)", line)}
    assert bodies
    split, once, computation = list[str](), 0, ""
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        computation = head[1] if head else computation
        if computation in bodies:
            split += [line] if re.search(r'"outer_dimension_partitions":\["', line) else []
            once += " conditional(" in line
    assert not split
    assert (
        once >= 5
    )  # the conditionals of `computed_once`, if the compiler has not seen through them


@pytest.mark.slow
def test_unpacked_stores_are_seen() -> None:
    """Dequantizing the whole store, as `gather` does, is seen by the census, too."""
    settings = config("eager", SLOTS[0])
    text = (
        jax.jit(jaxkv.gather)
        .lower(jax.eval_shape(lambda: jaxkv.init(settings, 2)))
        .compile()
        .as_text()
    )
    assert any("f32" in result for _, result in sized_like_the_cache(text, settings))


# Portability.

DEVICES = {
    "cpu": None,
    "cuda": H100,
    "rocm": jax.sharding.AbstractDevice("gfx942", 304, "rocm"),
    "tpu": jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
    "mps": jax.sharding.AbstractDevice("Apple M3 Max", 40, "mps"),
}

# What the portable programs consist of. All of it is in StableHLO's stable core and known to every
# PJRT plugin that we know of.
OPERATIONS = {
    *(
        "abs",
        "add",
        "divide",
        "exponential",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "remainder",
        "sign",
        "sqrt",
        "subtract",
    ),
    *(
        "and",
        "not",
        "or",
        "xor",
        "shift_left",
        "shift_right_arithmetic",
        "compare",
        "select",
        "clamp",
        "round_nearest_even",
    ),
    *(
        "bitcast_convert",
        "broadcast_in_dim",
        "concatenate",
        "constant",
        "convert",
        "iota",
        "pad",
        "reshape",
        "slice",
        "transpose",
    ),
    *("dynamic_slice", "dynamic_update_slice", "gather", "scatter"),
    *("dot_general", "reduce", "case", "while", "return", "optimization_barrier", "log"),
}
TYPES = {"i1", "i8", "i16", "i32", "ui8", "ui16", "f16", "bf16", "f32"}
Q4K = dataclasses.replace(
    CASES["fp32_q8_q4"], config=jaxkv.preset("Q4K", max_tokens=300, num_kv_heads=2, head_dim=32)
)
EXPORTED = {"q4k": Q4K} | {
    name: {**CASES, **LONG}[name]
    for name in ("channel_both", "fp32_q8_q4", "long_channel", "q2_symmetric_sinks")
}


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        pytest.param(
            name, device, marks=marked((name, device), (), [("q4k", device), (name, "cuda")])
        )
        for name in EXPORTED
        for device in DEVICES
    ],
)
def test_exports_are_portable(name: str, platform: str) -> None:
    """Every verb, traced as for a device of the platform, can be exported for it, without custom
    calls (our own kernels aside), in common types and operations."""
    case, xla = EXPORTED[name], {"implementation": "xla"}

    def every_verb(state: CacheState, new: jax.Array, query: jax.Array, rows: jax.Array) -> Any:
        state, out = jaxkv.prefill(state, query, new, new, rows, **xla)
        state = jaxkv.evict(jaxkv.append(state, new, new, **xla), rows)
        state = jaxkv.take_rows(jaxkv.rewind(state, rows), rows)
        return (
            state,
            out,
            jaxkv.attend(state, query, **xla),
            jaxkv.gather(state),
            jaxkv.stats(state),
            jaxkv.clear(state),
            jaxkv.replace_rows(state, rows, state),
        )

    state = jax.eval_shape(lambda: jaxkv.init(case.config, 2))
    new, query = (
        jax.ShapeDtypeStruct((2, 2, heads, case.config.head_dim), jnp.float32)
        for heads in (case.config.num_kv_heads, case.num_heads)
    )
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(jax.jit(every_verb), platforms=[platform])
        text = str(exported(state, new, query, rows).mlir_module())
    assert "custom_call" not in text
    operations = set(re.findall(r"\b(?:stablehlo|chlo|mhlo)\.([a-z_]+)\b(?= |\()", text)) | set(
        re.findall(r'"stablehlo\.(\w+)"', text)
    )
    own = {"reduce_precision"} if platform == "cpu" else set()
    assert operations <= OPERATIONS | {"num_partitions", "num_replicas"} | own
    assert len(operations) > 20  # they were found
    integer_or = re.compile(r"applies stablehlo.(and|or|xor) .*\(tensor<[\dx]*i(8|16|32)>")
    assert not integer_or.search(text)  # of a reduction, which jax-mps refuses
    assert set(re.findall(r"tensor<(?:[\dx?]+x)?(\w+)>", text)) <= TYPES


@pytest.mark.slow
def test_metal_knows_what_we_use() -> None:
    """The portable operations and types are among those that the Metal backend handles."""
    assert OPERATIONS <= mps.OPERATIONS
    assert TYPES <= mps.TYPES
