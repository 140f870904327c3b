"""The one table of cases: configurations, batch sizes, step patterns; tolerances; random keys,
values and queries.

Sizes are small so that every ring wraps several times within a few dozen tokens. A new feature is a
new row here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxkv import KvCacheConfig, Migration, Precision, QuantSpec, Rotary, reference
from jaxkv.reference import Adapted, ReferenceState

FP32, FP16, BF16 = Precision.FP32, Precision.FP16, Precision.BF16
Q8, Q4, Q4K, Q3, Q2 = Precision.Q8, Precision.Q4, Precision.Q4K, Precision.Q3, Precision.Q2
EAGER, BATCHED = Migration.EAGER, Migration.BATCHED

Array = NDArray[Any]

# How many tokens come at a time. Few different lengths, since each is a program to compile.
SINGLES = (5, *[1] * 55)
MIXED = (5, 1, 1, 5) * 5
PROMPT = (40, 5, *[1] * 10)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    config: KvCacheConfig
    num_heads: int
    steps: tuple[int, ...] = MIXED
    batch_size: int = 3

    @property
    def num_tokens(self) -> int:
        return sum(self.steps)


def config(
    tail: int,
    tail_precision: Precision,
    store: Precision,
    room: int,
    heads: int,
    head_dim: int,
    **rest: Any,
) -> KvCacheConfig:
    rest.setdefault("migration_batch", 4)
    return KvCacheConfig(
        tail_length=tail,
        tail_precision=tail_precision,
        store_precision=store,
        max_tokens=room,
        num_kv_heads=heads,
        head_dim=head_dim,
        **rest,
    )


def channels(bits: int, group: int, **rest: Any) -> QuantSpec:
    return QuantSpec(bits, group, axis="channel", **rest)


def _one_tier() -> list[Case]:
    return [
        Case("fp32", config(12, FP32, Q4, 12, 2, 8), 2, SINGLES),
        Case("fp16_mqa", config(12, FP16, Q4, 12, 1, 16), 4, PROMPT),
        Case("bf16_sinks", config(9, BF16, Q4, 12, 2, 16, sink_tokens=3), 4),
        Case("q8", config(0, FP16, Q8, 12, 2, 16), 4),
        Case("q4", config(0, FP16, Q4, 12, 1, 64), 4, PROMPT),
        Case("q2_symmetric_sinks", config(0, FP32, Q2, 14, 2, 8, sink_tokens=2,
             key_quant=QuantSpec(2, 8, symmetric=True), value_quant=QuantSpec(4, 4)), 2),
    ]  # fmt: skip


def _two_tiers() -> list[Case]:
    token = QuantSpec(4, 48)  # one group per token over all 3 heads of 16, the original's
    return [
        Case("fp16_q4", config(4, FP16, Q4, 16, 2, 64), 4, PROMPT),
        Case("fp32_q8_symmetric_dim80", config(4, FP32, Q8, 14, 2, 80,
             key_quant=QuantSpec(8, 16, symmetric=True, rotate=True), value_quant=QuantSpec(8, 80)), 2),
        Case("bf16_q4_all_heads", config(5, BF16, Q4, 16, 3, 16, key_quant=token, value_quant=token), 3),
        Case("fp32_q4_groups32_dim96", config(3, FP32, Q4, 12, 1, 96,
             key_quant=QuantSpec(4, 32, rotate=True), value_quant=QuantSpec(4, 32, symmetric=True)), 2, SINGLES),
        Case("fp32_q4_batched_sinks", config(5, FP32, Q4, 22, 2, 16, sink_tokens=3, migration=BATCHED,
             value_quant=QuantSpec(4, 8, symmetric=True)), 4),
        Case("fp16_q2_batched", config(4, FP16, Q2, 20, 2, 32, migration=BATCHED, migration_batch=8), 2, PROMPT),
        Case("fp32_q4_dim4", config(4, FP32, Q4, 12, 2, 4), 2),
        Case("fp16_q2_dim3_sinks", config(3, FP16, Q2, 12, 1, 3, sink_tokens=2, value_quant=QuantSpec(4, 3)), 2),
        Case("fp16_q3", config(4, FP16, Q3, 16, 2, 64), 4, PROMPT),
        Case("fp32_q3_dim37_sinks", config(3, FP32, Q3, 14, 1, 37, sink_tokens=2, migration=BATCHED,
             key_quant=channels(3, 4), value_quant=QuantSpec(3, 37, symmetric=True)), 2),
        Case("channel_dim37", config(6, FP32, Q4, 24, 1, 37, migration=BATCHED, key_quant=channels(4, 4)), 2),
        Case("q8_fp32", config(4, Q8, Q4, 12, 2, 8, warm_length=8, warm_precision=FP32), 2),
        Case("channel_keys", config(6, FP32, Q4, 24, 2, 16, migration=BATCHED, key_quant=channels(4, 4)), 4),
        Case("channel_both", config(4, FP32, Q4, 28, 1, 32, migration=BATCHED, migration_batch=8,
             key_quant=channels(2, 8, symmetric=True), value_quant=channels(4, 4, rotate=True)), 4, PROMPT),
    ]  # fmt: skip


def _three_tiers() -> list[Case]:
    return [
        Case("fp32_q8_q4", config(3, FP32, Q4, 14, 2, 16, warm_length=4,
             value_quant=QuantSpec(4, 16, symmetric=True, rotate=True)), 4),
        Case("bf16_q8_q4_batched_sinks", config(5, BF16, Q4, 28, 2, 16, warm_length=6, sink_tokens=3,
             migration=BATCHED, value_quant=QuantSpec(8, 16, rotate=True)), 4),
        Case("fp32_q8_channel", config(4, FP32, Q4, 28, 2, 16, warm_length=8, migration=BATCHED,
             key_quant=channels(4, 4)), 2, PROMPT),
    ]  # fmt: skip


def _with_rotary() -> list[Case]:
    return [
        Case("rotary_q4", config(20, FP32, Q4, 36, 2, 16, rotary=Rotary(100.0)), 4, PROMPT),
        Case("rotary_warm_q2", config(4, FP16, Q2, 40, 3, 16, warm_length=17, sink_tokens=2,
             rotary=Rotary(1e4, "interleaved", dim=8)), 3),
        Case("rotary_channel", config(18, FP32, Q4, 40, 2, 16, migration=BATCHED, rotary=Rotary(100.0),
             key_quant=QuantSpec(4, 4, "channel", turned_mean=True, balance=True)), 2, PROMPT),
        Case("rotary_rewind", config(18, BF16, Q4, 30, 2, 16, rewind_length=3, rotary=Rotary(1e3, scaling=[0.5] * 8)), 2),
    ]  # fmt: skip


def _with_rewinds() -> list[Case]:
    return [
        Case("rewind_bf16", config(9, BF16, Q4, 12, 2, 8, sink_tokens=3, rewind_length=3), 2),
        Case("rewind_fp32_q8_q2_sinks", config(3, FP32, Q2, 16, 2, 16, warm_length=4, sink_tokens=2,
             rewind_length=5, value_quant=QuantSpec(2, 16, symmetric=True)), 4),
        Case("rewind_channel", config(5, FP32, Q4, 24, 2, 16, sink_tokens=1, migration=BATCHED,
             key_quant=channels(4, 4), rewind_length=6), 4),
    ]  # fmt: skip


def _values_apart() -> list[Case]:
    # Values of another size than keys, and values that are a part of them.
    return [
        Case("fp16_q4_values24", config(4, FP16, Q4, 16, 2, 32, value_dim=24), 4, PROMPT),
        Case("fp32_q8_channel_values36", config(4, FP32, Q4, 28, 1, 16, warm_length=8, migration=BATCHED,
             key_quant=channels(4, 4), value_dim=36, sink_tokens=2), 2),
        Case("latent_q4", config(3, FP16, Q4, 14, 1, 40, values_from_keys=32, sink_tokens=2), 4),
        Case("latent_bf16_q8", config(4, BF16, Q8, 14, 1, 24, values_from_keys=16, rewind_length=3), 4, PROMPT),
        Case("latent_channel", config(4, FP32, Q4, 20, 2, 16, values_from_keys=10, migration=BATCHED,
             key_quant=channels(4, 4)), 4),
    ]  # fmt: skip


def _long() -> list[Case]:
    # Rings of more slots than the attention's block, and no multiple of it.
    return [
        Case("long_fp16_q4", config(300, FP16, Q4, 600, 1, 16), 2, (700, 5, 1)),
        Case("long_channel", config(8, BF16, Q4, 600, 1, 16, migration=BATCHED, migration_batch=32, sink_tokens=4,
             key_quant=channels(4, 32), value_quant=QuantSpec(8, 16, symmetric=True)), 2, (700, 5, 1)),
    ]  # fmt: skip


CASES = {
    case.name: case
    for case in [
        *_one_tier(),
        *_two_tiers(),
        *_three_tiers(),
        *_with_rotary(),
        *_with_rewinds(),
        *_values_apart(),
    ]
}
LONG = {case.name: case for case in _long()}
REWINDS = {name: case for name, case in CASES.items() if case.config.rewind_length}
# A cross-section for the laws that need programs of their own: one to three tiers, sinks, eager and
# batched, both axes.
FEW = {
    name: CASES[name]
    for name in (
        "q8",
        "bf16_q4_all_heads",
        "channel_keys",
        "fp32_q8_q4",
        "bf16_q8_q4_batched_sinks",
    )
}

# Rounding of an output to its dtype, relative to the largest value: half a unit in the last place.
TOLERANCE = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def random_tokens(rng: np.random.Generator, case: Case, length: int) -> tuple[Array, Array]:
    """Keys [B, length, K, H] and values [B, length, K, V] (the keys' first where they are a part of
    these). Channels differ in size and offset, as those of real keys do."""
    config = case.config
    shape = (case.batch_size, length, config.num_kv_heads, config.head_dim)
    channel = np.exp(rng.normal(size=shape[2:]) / 2)
    offset = rng.normal(size=shape[2:])
    keys = (rng.normal(size=shape) + offset) * channel
    if case.config.rotary is not None:  # a model whose keys have a large bias and uneven channels
        keys = keys * np.exp(rng.normal(size=shape[2:]) * 2) + biased(rng, case, length)
    keys = keys.astype(np.float32)
    if config.values_from_keys is not None:
        return keys, keys[..., : config.values_from_keys]
    return keys, rng.normal(size=(*shape[:3], config.output_dim)).astype(np.float32)


def biased(rng: np.random.Generator, case: Case, length: int) -> Array:
    """What a key bias is after the rotary embedding, of all but the last kv head: [length, K,
    H]."""
    config = case.config
    bias = rng.normal(size=(config.num_kv_heads, config.head_dim)) * 200
    bias[config.num_kv_heads - 1 :] = 0
    assert config.rotary is not None
    return np.stack([reference.turned(bias, p, config.rotary) for p in range(length)])


def random_query(rng: np.random.Generator, case: Case, length: int = 5) -> Array:
    """Queries [B, length, N, H]."""
    shape = (case.batch_size, length, case.num_heads, case.config.head_dim)
    return rng.normal(size=shape).astype(np.float32)


# Bounds: sums of rounding errors, none found by trial.

CODE_UNIT = (
    2.0**-21
)  # queries and probabilities are counted in this fraction of their largest (kernels/digits.py)
TIE = 1e-3  # of a step: how near to a tie float32 arithmetic may fall to either side


def empty_outputs(query: Array, case: Case) -> Array:
    """Zeros like outputs of a query, [B, T, N, V]."""
    return np.zeros((*query.shape[:3], case.config.output_dim), query.dtype)


def norms(x: Array) -> Array:
    """The length of each vector on the last axis."""
    found: Array = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=-1))
    return found


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tokens x [T, K, H] that enter a tier of format `fmt` together, and the row's mirror [K, H]
    for it."""

    x: Array
    fmt: Precision | QuantSpec
    mirror: Array


def quantization_bound(entry: Entry, before: Array) -> Array:
    """How far heads of tokens may be from what they were given as, once in the tier.

    `before` [T, K] is how far they may have been already. An element moves by half a step, plus
    what the zero point loses to 16 bits, 2**-11 of it; a search for a better
    scale makes the sum of squares no larger. Turning keeps lengths, to 11 bits where the basis is
    aligned.
    """
    if isinstance(entry.fmt, Precision):
        return before + TOLERANCE[entry.fmt.dtype_name] * norms(entry.x)
    groups, _, step = _grouped(entry, entry.fmt)
    most = np.abs(groups).max(-1, keepdims=True)
    turning = 2.0**-10 * norms(entry.x) if entry.fmt.align else 0
    return before + turning + _norms_of_groups(step / 2 + 2.0**-10 * most, entry, entry.fmt)


def searches_scales(fmt: Precision | QuantSpec) -> bool:
    """Whether a group's scale is searched for: 8 bits leave nothing to gain."""
    return isinstance(fmt, QuantSpec) and fmt.bits < 8 and fmt.axis == "token" and not fmt.symmetric


def is_searched(fmt: Precision | QuantSpec) -> bool:
    """Whether scales are searched for, or a basis is, so that codes depend on more than the rules
    of rounding."""
    return searches_scales(fmt) or (isinstance(fmt, QuantSpec) and fmt.align)


def search_slack(entry: Entry) -> Array:
    """What a search may lose against plain rounding: it counts errors in 64ths of a step, in a
    basis of 11 bits."""
    assert isinstance(entry.fmt, QuantSpec)
    turning = 2.0**-10 * norms(entry.x) if entry.fmt.align else 0
    return turning + _norms_of_groups(_grouped(entry, entry.fmt)[2] / 64, entry, entry.fmt)


def tie_bound(entry: Entry, before: Array) -> Array:
    """How far the reference and another implementation may be apart on entering a tier, their
    inputs being `before` apart.

    They differ by rounding; by a whole step in elements whose quotient lies too near to a tie; and
    in all elements of a group whose scale or zero point may have been rounded to another 16-bit
    number. Where scales are searched for, each is within its own quantization error.
    """
    fmt = entry.fmt
    if isinstance(fmt, Precision):
        return before + np.where(before > 0, 2 * TOLERANCE[fmt.dtype_name] * norms(entry.x), 0)
    if is_searched(fmt):
        return quantization_bound(entry, before) + norms(
            reference.represent(entry.x, fmt, entry.mirror) - entry.x
        )
    groups, codes, step = _grouped(entry, fmt)
    low, high, most = (
        x[..., None] for x in (groups.min(-1), groups.max(-1), np.abs(groups).max(-1))
    )
    inputs = dataclasses.replace(entry, x=np.broadcast_to(before[..., None], entry.x.shape))
    apart = _grouped(inputs, _plain(fmt))[0].max(-1, keepdims=True)
    exact_step, levels = (
        (most, 2 ** (fmt.bits - 1) - 1) if fmt.symmetric else (high - low, 2**fmt.bits - 1)
    )
    exact_step = np.maximum(exact_step / levels, 0 if fmt.symmetric else np.abs(low) * 2.0**-15)
    moved = _may_round_differently(exact_step, 2 * apart / levels, reference.as_scale)
    moved |= _may_round_differently(low / step, apart / step, np.float16)
    near_tie = np.abs(np.abs(codes - np.floor(codes)) - 0.5) < TIE + 3 * apart / step
    whole_step = np.where(near_tie | moved, 1.01 * step, 0) + np.where(moved, 2.0**-9 * most, 0)
    return _norms_of_groups(whole_step + 2.0**-19 * most + 3 * apart, entry, fmt)


def _plain(spec: QuantSpec) -> QuantSpec:
    return dataclasses.replace(spec, rotate=False, align=False)


def _grouped(entry: Entry, spec: QuantSpec) -> tuple[Array, Array, Array]:
    """Groups as they are quantized, their quotients, and their steps."""
    mirror = entry.mirror if spec.align else np.zeros_like(entry.mirror)
    groups = reference.to_groups(entry.x.astype(np.float32), spec, mirror)
    _, scale, zero_point = reference.quantize_groups(groups, spec.bits, spec.symmetric)
    return groups, (groups - zero_point) / scale, scale


def _norms_of_groups(elements: Array, entry: Entry, spec: QuantSpec) -> Array:
    """The heads' norms [T, K], back among raw tokens, where `elements` are given by group."""
    shape = _grouped(entry, _plain(spec))[0].shape
    back = reference.from_groups(
        np.broadcast_to(elements, shape), _plain(spec), np.zeros_like(entry.mirror), entry.x.shape
    )
    halvings = np.log2(back.shape[-1] & -back.shape[-1]) / 2
    return norms(back) * (2 ** (halvings % 1) if spec.rotate else 1)


def _may_round_differently(
    x: Array, apart: Array | float, rounded: Callable[[Array], Array]
) -> Array:
    """Whether `rounded` may make something else of an x that is `apart`, or otherwise rounded in
    float32."""
    size = 1e-6 * np.abs(x) + apart
    found: Array = rounded((x + size).astype(np.float32)) != rounded((x - size).astype(np.float32))
    return found


Bound = Callable[[Entry, Array], Array]


def adapted_bound(
    bound: Bound, entry: Entry, before: Array, basis: Adapted, positions: Sequence[int]
) -> Array:
    """`bound` for keys that enter without their turned mean, their channels multiplied.

    Float32 knows the mean, its angles and what is left to some 2**-19 of its size.
    """
    taken = norms(basis.taken_out(positions)) * 2.0**-18
    most, least = basis.factor.max(-1), basis.factor.min(-1)
    inner = dataclasses.replace(entry, x=basis.enter(entry.x, positions))
    return bound(inner, (before + taken) * most) / least + taken


def accumulate(state: ReferenceState, row: int, bound: Bound) -> dict[int, Array]:
    """`bound` added up over the tiers that each token held has been in: [2, K] for key and value,
    by position."""
    config, data, sinks = state.config, state.rows[row], state.config.sink_tokens
    nothing, dims = np.zeros((2, config.num_kv_heads)), (config.head_dim, config.output_dim)

    def enter(
        positions: Sequence[int],
        before: Array,
        tier: int,
        formats: Sequence[Precision | QuantSpec],
        basis: Adapted,
    ) -> Array:
        x, sides = np.stack([data.tokens[position][tier] for position in positions]), []
        for side, fmt in enumerate(formats):
            cut = (..., slice(dims[side]))
            entry = Entry(x[:, side][cut], fmt, data.mirrors[tier][side][cut])
            was = before[:, side]
            sides.append(
                adapted_bound(bound, entry, was, basis, positions)
                if side == 0
                else bound(entry, was)
            )
        # Values that are a part of the keys are no further off than these.
        return np.stack([sides[0], sides[-1]], axis=1)

    @functools.cache
    def entered(first: int, tier: int) -> Array:
        spec = config.chain[tier]
        group = range(first, first + spec.group)
        before = np.stack([after(position, tier - 1) for position in group])
        return enter(group, before, tier, spec.formats, data.adapted[tier])

    def after(position: int, tier: int) -> Array:
        if tier < 0:
            return nothing
        offset = (position - sinks) % config.chain[tier].group
        found: Array = entered(position - offset, tier)[offset]
        return found

    bounds = {}
    for position, pair in reference.held(state, row).items():
        if position < sinks:
            formats, none = (
                config.sink_spec.formats,
                reference.neutral(config.num_kv_heads, config.head_dim),
            )
            bounds[position] = enter([position], nothing[None], 0, formats, none)[0]
        else:
            tier = next(i for i in range(len(config.chain)) if data.tokens[position][i + 1] is pair)
            bounds[position] = after(position, tier)
    return bounds


def attention_bound(query: Array, pairs: Array, scale: float | None = None) -> float:
    """How far an element of attention of query [N, H] over pairs [S, 2, K, H] may be off by
    rounding.

    A score is a sum of H products, each off by a unit of the largest; such errors add up like a
    random walk. An error e in all scores changes the weights by a factor of exp(2 e) at most, so an
    output by 2 e times the largest value; the weighted sum adds a unit of it. The factor 4 is for
    the sums that form scores and outputs from their parts.
    """
    if not len(pairs):
        return 0.0
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    largest_key, largest_value = np.abs(pairs).max((0, 2, 3))
    score = CODE_UNIT * scale * np.sqrt(head_dim) * np.abs(query).max() * largest_key
    return float(4 * (2 * score + CODE_UNIT) * largest_value)
