"""The whole cache in NumPy, slow and obvious at sight: what the fast code is tested against.

A row is a Python list of all its tokens since the last `clear` (a token's index is its position), each as it
was given and as every tier that it has entered gives it back, plus one number per tier: the first position
whose data is still there. All the rest is derived from these by the rules in `_starts`: which tier holds a
token, what is evicted. One layer, no jit. Verbs take a state first and return a new one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxkv.config import KvCacheConfig, Precision, QuantSpec

Array = NDArray[Any]
FLOATS = {Precision.FP32: np.float32, Precision.FP16: np.float16, Precision.BF16: jnp.bfloat16}


# Quantization.


def rotate(x: Array, inverse: bool = False) -> Array:
    """Hadamard transform of the last axis, in blocks of the largest power of two that divides it.

    Sylvester's matrix times itself is `block` times the identity; the two directions share that factor as
    powers of two.
    """
    block = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    halvings = math.log2(block) / 2
    factor = 2.0 ** -(math.floor(halvings) if inverse else math.ceil(halvings))
    blocks = x.reshape(*x.shape[:-1], -1, block) @ matrix * factor
    return blocks.reshape(x.shape).astype(np.float32)


def quantize_groups(groups: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes, scale and zero point of groups [..., size] float32; scale and zero point are rounded first."""
    if symmetric:
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        zero_point = np.zeros_like(groups[..., :1])
        scale = np.abs(groups).max(-1, keepdims=True) / np.float32(highest)
    else:
        lowest, highest = 0, 2**bits - 1
        zero_point = groups.min(-1, keepdims=True)
        scale = (groups.max(-1, keepdims=True) - zero_point) / np.float32(highest)
    scale, zero_point = (x.astype(np.float16).astype(np.float32) for x in (scale, zero_point))
    scale = np.where(scale == 0, np.float32(2.0**-14), scale)
    codes = np.clip(np.rint((groups - zero_point) / scale), lowest, highest)
    return codes, scale, zero_point


def mirror_of(first: Array, fmt: Precision | QuantSpec) -> Array:
    """The mirror [K, H] of a row whose first tokens are `first` [n, K, H]; zeros, which mirror nothing, unless `fmt` aligns.

    The reflection at it turns the mean, rounded to 8 bits, into a constant vector.
    """
    if isinstance(fmt, Precision) or not fmt.align:
        return np.zeros_like(first[0])
    mean = (rotate(first) if fmt.rotate else first).sum(0)
    most = np.abs(mean).max(-1, keepdims=True)
    whole = np.rint(mean * (127 / np.where(most > 0, most, 1)))
    norm = np.sqrt((whole * whole).sum(-1, keepdims=True))
    unit = np.where(whole.sum(-1, keepdims=True) < 0, -whole, whole) / np.maximum(norm, 1)
    mirror = (unit - first.shape[-1] ** -0.5).astype(np.float16).astype(np.float32)
    return np.where(norm > 0, mirror, np.float32(0))


def reflect(x: Array, mirror: Array) -> Array:
    """Householder reflection of x [T, K, H] at the plane orthogonal to mirror [K, H]; its own inverse."""
    square = (mirror * mirror).sum(-1, keepdims=True)
    along = (x * mirror).sum(-1, keepdims=True) / np.where(square > 0, square, 1)
    return x - 2 * along * mirror


def to_groups(x: Array, spec: QuantSpec, mirror: Array) -> Array:
    """The elements of x [T, K, H] in the basis of `spec`, those that share a scale on the last axis."""
    x = rotate(x) if spec.rotate else x
    x = reflect(x, mirror)
    x = np.moveaxis(x, 0, -1) if spec.axis == "channel" else x  # a channel's group: consecutive tokens
    return x.reshape(-1, spec.group_size or x.shape[-1])


def from_groups(groups: Array, spec: QuantSpec, mirror: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_groups`; `shape` is that of x."""
    if spec.axis == "channel":
        x = np.moveaxis(groups.reshape(*shape[1:], shape[0]), -1, 0)
    else:
        x = groups.reshape(shape)
    x = reflect(x, mirror)
    return rotate(x, inverse=True) if spec.rotate else x


def represent(x: Array, fmt: Precision | QuantSpec, mirror: Array) -> Array:
    """What a tier of format `fmt` gives back, in float32, for tokens x [T, K, H] that enter it together."""
    if isinstance(fmt, Precision):
        return x.astype(FLOATS[fmt]).astype(np.float32)
    codes, scale, zero_point = quantize_groups(to_groups(x, fmt, mirror), fmt.bits, fmt.symmetric)
    return from_groups(scale * codes + zero_point, fmt, mirror, x.shape)


# The state.


@dataclasses.dataclass
class Row:
    """One sequence of tokens, and where their data is."""

    tokens: list[list[Array]]  # [position][0]: key and value [2, K, H] as given; [1 + tier]: as read back
    kept: list[int]  # [tier]: the first position whose data is still there
    mirrors: list[Array]  # [tier]: of keys and values [2, K, H]; zeros where nothing is aligned

    @property
    def end(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class ReferenceState:
    """The rows of a batch and the configuration they share."""

    config: KvCacheConfig
    rows: tuple[Row, ...]


def init(config: KvCacheConfig, batch_size: int = 1) -> ReferenceState:
    """An empty cache."""
    kept = [config.sink_tokens] * len(config.chain)
    mirrors = [np.zeros((2, config.num_kv_heads, config.head_dim), np.float32)] * len(config.chain)
    return ReferenceState(config, tuple(Row([], list(kept), list(mirrors)) for _ in range(batch_size)))


def _starts(config: KvCacheConfig, row: Row) -> list[int]:
    """Each tier's first position: tier i holds [starts[i], starts[i - 1]), the first tier up to the end."""
    last = len(config.chain) - 1
    above = max(row.end, config.sink_tokens)
    begin = min(above, max(above - config.room, row.kept[last]))  # what comes before it is evicted
    starts = []
    for i, tier in enumerate(config.chain):
        due = _batch_start(config, above - tier.length)  # what comes before it has to leave this tier
        above = begin if i == last else min(above, max(due, row.kept[i], begin))
        starts.append(above)
    return starts


def _batch_start(config: KvCacheConfig, position: int) -> int:
    """The first position of the batch of tokens, moved together, that contains `position`."""
    return position - (position - config.sink_tokens) % config.step


def _settle(config: KvCacheConfig, row: Row) -> None:
    """Lets every token that is due enter the tiers below, and forgets what the rings have overwritten."""
    starts = _starts(config, row)
    tops = [row.end, *starts[:-1]]
    for i, (tier, start, top) in enumerate(zip(config.chain, starts, tops, strict=True)):
        for first in range(_batch_start(config, start), top - tier.group + 1, tier.group):
            group = range(first, first + tier.group)
            if top > row.kept[i] and any(len(row.tokens[p]) == i + 1 for p in group):
                if i == len(config.chain) - 1 and not any(len(token) > i + 1 for token in row.tokens[row.kept[i] :]):
                    row.mirrors[i] = _mirrors(config, row, i)
                for p in group:
                    if i and p < row.kept[i - 1]:  # evicted and gone: the oldest token that is there takes its place
                        row.tokens[p] = row.tokens[row.kept[i - 1]][: i + 1]
                _enter([row.tokens[p] for p in group], i, (tier.key, tier.value), row.mirrors[i])
        row.kept[i] = max(row.kept[i], top - tier.capacity)


def _enter(group: list[list[Array]], tier: int, formats: Sequence[Precision | QuantSpec], mirror: Array) -> None:
    """Adds to tokens what a tier gives back for them; `formats` of keys and values, `mirror` [2, K, H]."""
    given = np.stack([token[tier] for token in group])
    sides = [represent(given[:, side], fmt, mirror[side]) for side, fmt in enumerate(formats)]
    for token, pair in zip(group, np.stack(sides, axis=1), strict=True):
        token[tier + 1 :] = [pair]


def _mirrors(config: KvCacheConfig, row: Row, tier: int) -> Array:
    given, spec = np.stack([row.tokens[p][tier] for p in first_positions(config, row, tier)]), config.chain[tier]
    return np.stack([mirror_of(given[:, 0], spec.key), mirror_of(given[:, 1], spec.value)])


def first_positions(config: KvCacheConfig, row: Row, tier: int) -> range:
    """The tokens that an empty tier is aligned by: those in the tier above when the first of them leaves it.

    Four are left out: attention heads dump their weight on the first of a row, and these look like no other.
    """
    size = min(128, config.chain[tier - 1].length) if tier else 1
    skip = min(max(4 - config.sink_tokens, 0), size - 1)
    return range(row.kept[tier] + skip, row.kept[tier] + size)


def held(state: ReferenceState, row: int) -> dict[int, Array]:
    """Key and value [2, K, H] of every token that a row holds, by position, oldest first."""
    tokens, starts = state.rows[row].tokens, _starts(state.config, state.rows[row])
    found = {position: tokens[position][1] for position in range(min(len(tokens), state.config.sink_tokens))}
    for position in range(starts[-1], len(tokens)):
        tier = next(i for i, start in enumerate(starts) if position >= start)
        found[position] = tokens[position][1 + tier]
    return found


# The verbs.


def append(state: ReferenceState, keys: Array, values: Array, lengths: ArrayLike | None = None) -> ReferenceState:
    """Adds the first `lengths[b]` tokens of keys and values [B, T, K, H] to row b, one after the other."""
    config = state.config
    pairs = np.stack([keys, values], axis=2).astype(np.float32)  # [B, T, 2, K, H]
    state = _copy(state)
    for row, new, length in zip(state.rows, pairs, _per_row(state, lengths, keys.shape[1]), strict=True):
        for t in range(length):
            row.tokens.append([new[t]])
            if row.end <= config.sink_tokens:
                _enter(row.tokens[-1:], 0, [config.sink_precision] * 2, new[t])
            _settle(config, row)
    return state


def migrate(state: ReferenceState) -> ReferenceState:
    """Moves what is due: nothing, since `append` leaves nothing due."""
    return _copy(state)


def evict(state: ReferenceState, count: ArrayLike) -> ReferenceState:
    """Drops the `count` oldest tokens of each row's chain."""
    state = _copy(state)
    for row, number in zip(state.rows, _per_row(state, count), strict=True):
        begin = _starts(state.config, row)[-1]
        _check_count(number, most=max(0, row.end - begin))
        if number:
            row.kept[-1] = max(row.kept[-1], begin + number)
    return state


def rewind(state: ReferenceState, count: ArrayLike) -> ReferenceState:
    """Drops the `count` newest tokens of each row.

    What a ring still holds is back in its tier; the rest of the tokens stay where they are.
    """
    config, state = state.config, _copy(state)
    for row, number in zip(state.rows, _per_row(state, count), strict=True):
        begin = _starts(config, row)[-1]
        _check_count(number, most=row.end - (begin if begin > config.sink_tokens else 0))
        del row.tokens[row.end - number :]
        for i in range(len(row.kept)):
            top = _starts(config, row)[i - 1] if i else max(row.end, config.sink_tokens)
            row.kept[i] = min(row.kept[i], top)
        _check_groups(config, row)
        for i, start in enumerate(_starts(config, row)):
            for token in row.tokens[start:]:
                del token[i + 2 :]  # it is in tier i again and will enter the next one anew
    return state


def clear(state: ReferenceState) -> ReferenceState:
    """Empties every row."""
    return init(state.config, len(state.rows))


def take_rows(state: ReferenceState, rows: Sequence[int]) -> ReferenceState:
    """The given rows in the given order; one may be taken several times."""
    taken = [state.rows[i] for i in rows]
    copies = (Row([list(token) for token in row.tokens], list(row.kept), list(row.mirrors)) for row in taken)
    return ReferenceState(state.config, tuple(copies))


def _copy(state: ReferenceState) -> ReferenceState:
    return take_rows(state, range(len(state.rows)))


def _per_row(state: ReferenceState, number: ArrayLike | None, default: int = 0) -> list[int]:
    return [int(n) for n in np.broadcast_to(default if number is None else number, len(state.rows))]


def _check_groups(config: KvCacheConfig, row: Row) -> None:
    """A group of tokens that enters a tier anew needs all of its tokens in the tier before."""
    starts = _starts(config, row)
    for start, kept, tier in zip(starts[:-1], row.kept[:-1], config.chain[1:], strict=True):
        first = _batch_start(config, start)
        if tier.group > 1 and start > max(first, starts[-1]) and kept > first:
            raise ValueError(f"position {start} lies inside a group of codes whose tokens are gone from {first} on")


def _check_count(count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"count={count}: must be 0 to {most}, the tokens that may be dropped")


# Reading.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of attention, as in `jaxkv.Scoring`; of T queries that stand at known positions."""

    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    decay: ArrayLike | None = None  # scalar or [N]
    bias: Array | None = None  # [B or 1, N or 1, T, P]
    mask: Array | None = None  # the same
    sink_logits: ArrayLike | None = None  # [N]

    def sees(self, query: int, key: int, sink_tokens: int) -> bool:
        """Whether a query at position `query` may look at position `key`."""
        is_new_enough = self.window is None or key > query - self.window or key < sink_tokens
        return (key <= query or not self.causal) and is_new_enough

    def added(self, row: int, t: int, query: int, keys: Sequence[int], num_heads: int) -> Array:
        """What is added to the scores [N, S] of query t of a row, at position `query`, with the positions `keys`."""
        added = np.zeros((num_heads, len(keys)))
        for s, key in enumerate(keys):
            if self.decay is not None:
                added[:, s] -= np.asarray(self.decay, np.float64) * (query - key)
            if self.bias is not None and key < self.bias.shape[3]:
                added[:, s] += self.bias[min(row, len(self.bias) - 1), :, t, key]
            if self.mask is not None and key < self.mask.shape[3]:
                added[~np.broadcast_to(self.mask[min(row, len(self.mask) - 1), :, t, key], num_heads), s] = -np.inf
        return added


def exact_attention(query: Array, pairs: Array, scale: float | None = None) -> Array:
    """Softmax attention of query [N, H] over pairs [S, 2, K, H], head by head in float64; zeros if S is 0."""
    return attention_and_lse(query, pairs, scale, np.zeros((len(query), len(pairs))), Options())[0]


def attention_and_lse(query: Array, pairs: Array, scale: float | None, added: Array, options: Options) -> tuple[Array, Array]:
    """Attention of query [N, H] over pairs [S, 2, K, H] with `added` [N, S] to the scores; its log-sum-exps [N], -inf of nothing."""
    out, lse = np.zeros(query.shape), np.full(len(query), -np.inf)
    scale = query.shape[1] ** -0.5 if scale is None else scale
    for head in range(len(query)):
        scores, values = np.zeros(0), np.zeros((0, query.shape[1]))
        if len(pairs):
            kv_head = head * pairs.shape[2] // len(query)
            keys, values = pairs[:, 0, kv_head].astype(np.float64), pairs[:, 1, kv_head].astype(np.float64)
            scores = scale * (keys @ query[head].astype(np.float64))
            scores = scores if options.soft_cap is None else options.soft_cap * np.tanh(scores / options.soft_cap)
            scores = scores + added[head]
        if options.sink_logits is not None:  # a token whose value is zero
            scores = np.append(scores, np.asarray(options.sink_logits)[head])
            values = np.append(values, np.zeros((1, query.shape[1])), axis=0)
        if (scores > -np.inf).any():
            lse[head] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[head] = np.exp(scores - lse[head]) @ values
    return out, lse


def attend(
    state: ReferenceState,
    query: Array,
    scale: float | None = None,
    lengths: ArrayLike | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Query t [B, T, N, H] of row b stands at position `end - lengths[b] + t` and sees what is held there; as `jaxkv.attend`."""
    found = _attend(state, query, [{}] * len(state.rows), scale, lengths, options)
    return found if return_lse else found[0]


def prefill(
    state: ReferenceState,
    query: Array,
    keys: Array,
    values: Array,
    lengths: ArrayLike | None = None,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> tuple[ReferenceState, Any]:
    """Attends over what was held and the raw new keys and values, causally; then appends these."""
    raw = [
        dict(enumerate(np.stack([k, v], axis=1)[:length], row.end))
        for row, k, v, length in zip(state.rows, keys, values, _per_row(state, lengths, keys.shape[1]), strict=True)
    ]
    found = _attend(state, query, raw, scale, lengths, options)
    return append(state, keys, values, lengths), found if return_lse else found[0]


def _attend(
    state: ReferenceState,
    query: Array,
    raw: Sequence[dict[int, Array]],
    scale: float | None,
    lengths: ArrayLike | None,
    given: dict[str, Any],
) -> tuple[Array, Array]:
    config, out, lse = state.config, np.zeros(query.shape), np.zeros(query.shape[:3])
    options = Options(**{**given, "window": given.get("window") or config.window})
    for b, (row, length) in enumerate(zip(state.rows, _per_row(state, lengths, query.shape[1]), strict=True)):
        visible = held(state, b) | raw[b]
        for t in range(query.shape[1]):
            position = row.end + len(raw[b]) - length + t
            seen = [p for p in visible if t < length and options.sees(position, p, config.sink_tokens)]
            added = options.added(b, t, position, seen, query.shape[2])
            out[b, t], lse[b, t] = attention_and_lse(query[b, t], np.array([visible[p] for p in seen]), scale, added, options)
    return out, lse


def gather(state: ReferenceState) -> tuple[Array, Array, Array]:
    """Keys and values [B, max_tokens, K, H] and positions [B, max_tokens], oldest first, -1 where empty."""
    config = state.config
    shape = (len(state.rows), config.max_tokens)
    pairs = np.zeros((*shape, 2, config.num_kv_heads, config.head_dim), np.float32)
    positions = np.full(shape, -1, np.int32)
    for b in range(len(state.rows)):
        for slot, (position, pair) in enumerate(held(state, b).items()):
            pairs[b, slot], positions[b, slot] = pair, position
    return pairs[:, :, 0], pairs[:, :, 1], positions


def counts(state: ReferenceState, name: str) -> Array:
    """Tokens of each row [B] int32 in a tier ("hot", "warm", "cold"), in "sinks", or in "total"."""
    config, found = state.config, []
    for row in state.rows:
        starts = _starts(config, row)
        tops = [max(row.end, config.sink_tokens), *starts]
        here = {tier.name: tops[i] - starts[i] for i, tier in enumerate(config.chain)}
        here["sinks"] = min(row.end, config.sink_tokens)
        found.append(sum(here.values()) if name == "total" else here.get(name, 0))
    return np.array(found, np.int32)
