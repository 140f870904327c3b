"""Attention over the chain of tiers: a partial result per tier, merged exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxkv import softmax
from jaxkv.chain import TierSpec
from jaxkv.checks import as_counts, as_int, as_layer, check_query, in_range
from jaxkv.config import KvCacheConfig
from jaxkv.formats import Precision
from jaxkv.kernels import dispatch, sparse
from jaxkv.kernels.queries import unfold
from jaxkv.kernels.segments import over_segments
from jaxkv.kernels.traced import once
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.state import CacheState, segments
from jaxkv.tiers.entry import finite
from jaxkv.tiers.place import Index
from jaxkv.tiers.segment import Segment, Tier
from jaxkv.tiers.tokens import Tokens, float_data


@once
def attend(
    state: CacheState,
    query: jax.Array,
    scale: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    layer: Index = None,
    return_lse: bool = False,
    return_mass: bool = False,
    top_pages: int | None = None,
    implementation: dispatch.Implementation = None,
    **options: Any,
) -> Any:
    """Attention of the newest tokens' queries over all tokens held, causal among the newest.

    A query looks at the cache as it was when its own token was the newest: at the tokens that were
    held then, each in the tier where it was. So T queries after one append of T tokens see what T
    steps of `append` and `attend` see, as far as the rings still have it: all of it where T - 1 <=
    `rewind_length`, as speculative decoding wants it. Beyond, the first queries see tokens
    quantized that they would have seen exactly, and where the cache is full they miss what their
    own append has evicted: a prompt belongs into `extend` (or `prefill`), which attends first.

    Args:
      query: [B, T, N, H] of the T tokens appended last (N a multiple of K); any float dtype,
        computed in float32.
      scale: of the scores, a scalar or [N]; default H**-0.5.
      lengths: [B], as given to the append: row b's queries are its first lengths[b]; the others'
        outputs are zeros.
      layer: required where the state has layers; int or traced. A traced layer that the state does
        not have gives zeros.
      return_lse: also return the log of the softmax's denominator.
      return_mass: of a pool, also return what share of their weight the queries gave to each page.
      top_pages: of a pool with summaries, read for each kv head only so many pages of the last
        tier, those that are likely to have most of its queries' weight, besides the sinks, the
        other tiers, pages that are not full, that of the row's first tokens and, where there is a
        window, all that it shows (after Quest; Tang et al. 2024). Exact, bit for bit, where that
        is all.
      implementation: "xla", "pallas" (NVIDIA GPUs; ValueError where it cannot run), or None:
        whatever suits the platform.
      **options: the fields of `Scoring`: causal, window, window_sinks, soft_cap, decay, bias, mask,
        sink_logits.

    Returns:
      [B, T, N, V] in the query's dtype. A query that sees no token gives zeros; T = 0 gives
      [B, 0, N, V]. With `return_lse`, also [B, T, N] float32, and where `top_pages` is given a
      bound of the share of the weight that was left out, [B, T, N] too. With `return_mass`, also
      [B, K, P] float32 by columns of the rows' tables, summed over the queries of a kv head.

    Raises:
      ValueError: shapes, options or a layer that do not fit the state; pages of a state without.
    """
    config = state.config
    query = check_query(query, state.batch_size, config.num_kv_heads, config.head_dim)
    scoring = scoring_of(config, query, scale, options)
    wanted = Wanted(return_lse, return_mass, top_pages).checked(state, implementation)
    return attention(state, query, lengths, scoring, layer, wanted, implementation)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What of a cache is read, and what is returned besides the output; see `attend`."""

    lse: bool = False
    mass: bool = False
    top_pages: int | None = None

    def checked(self, state: CacheState, implementation: dispatch.Implementation) -> Wanted:
        if not self.by_page:
            return self
        if state.pages is None:
            raise ValueError(
                "top_pages and return_mass read page by page, and the state has no pages: make a "
                "pool with jaxkv.paged.init, of one row if there is one"
            )
        if implementation == "pallas":
            raise ValueError("implementation='pallas': the kernel does not read single pages")
        if self.top_pages is None:
            return self
        if state.summaries is None:
            raise ValueError(
                f"top_pages={self.top_pages}: the pool's pages have no summaries; make it with "
                "jaxkv.paged.init(..., summaries=True)"
            )
        return dataclasses.replace(self, top_pages=as_int("top_pages", self.top_pages, 1))

    @property
    def by_page(self) -> bool:
        return self.mass or self.top_pages is not None


def attention(
    state: CacheState,
    query: jax.Array,
    lengths: ArrayLike | None,
    scoring: Scoring,
    layer: Index,
    wanted: Wanted,
    implementation: dispatch.Implementation,
) -> Any:
    """`attend` with its options checked."""
    config = state.config
    layer, exists = as_layer(layer, state.num_layers)
    if query.shape[1] == 0:
        return _of_none(state, query, wanted)
    count = in_range(
        as_counts("lengths", lengths, state.batch_size, query.shape[1]), query.shape[1], exists
    )
    end = state.end if layer is None else state.end[layer]
    index = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    position = (end - count)[:, None] + index
    if not scoring.causal:
        position = jnp.maximum(position, 0)  # more queries than tokens: they, too, see all
    position = jnp.where(index < count[:, None], position, -1)
    check_room(config, scoring, query.shape[1])
    sinks = config.sink_tokens if scoring.window_sinks else 0

    def held(position: jax.Array) -> list[Segment]:
        each_its_own = scoring.causal and query.shape[1] > 1
        return segments(state, layer, position + 1 if each_its_own else None)

    if wanted.by_page:
        reading = sparse.Reading(state.summaries, wanted.top_pages, wanted.mass)
        return _by_page(held, query, position, scoring, sinks, reading, wanted.lse, implementation)
    partial = over_segments(held, query, position, scoring, sinks, implementation)
    return finish([partial], scoring, query, wanted.lse)


def _of_none(state: CacheState, query: jax.Array, wanted: Wanted) -> Any:
    """`attention` of no queries [B, 0, N, H]."""
    out = jnp.zeros((*query.shape[:3], state.config.output_dim), query.dtype)
    found = [out, *[jnp.zeros(query.shape[:3], jnp.float32)] * wanted.lse]
    found += found[1:] if wanted.top_pages is not None else []
    if wanted.mass and state.pages is not None:
        shape = state.batch_size, state.config.num_kv_heads, state.pages.table.shape[1]
        found.append(jnp.zeros(shape, jnp.float32))
    return tuple(found) if len(found) > 1 else out


def _by_page(
    held: Callable[[jax.Array], list[Segment]],
    query: jax.Array,
    position: jax.Array,
    scoring: Scoring,
    sinks: int,
    reading: sparse.Reading,
    return_lse: bool,
    implementation: dispatch.Implementation,
) -> Any:
    """`attention` over a pool whose pages are chosen, or weighed."""
    *others, last = held(position)

    def over(parts: Callable[[jax.Array], list[Segment]]) -> Partial:
        return over_segments(parts, query, position, scoring, sinks, implementation)

    def whole() -> sparse.Paged:
        return sparse.nothing_left(over(held), last)

    def some() -> sparse.Paged:
        found = sparse.over_pages(last, query, position, scoring, sinks, reading)
        return found.beside(over(lambda at: held(at)[:-1])) if others else found

    if reading.mass or reading.top_pages is None:
        found = some()
    else:
        newest = scoring.reach(position, sinks)[1]
        all_read = sparse.covers(last, scoring, newest, reading.top_pages)
        found = lax.switch(all_read.astype(jnp.int32), [some, whole])
    out, lse = finish([found.partial], scoring, query, True)
    results = [out]
    if return_lse:
        results.append(lse)
        if reading.top_pages is not None:
            left = unfold(found.left[..., None], query)[..., 0]
            share = jax.nn.sigmoid(left - jnp.maximum(lse, softmax.FLOOR))
            results.append(jnp.where(jnp.isneginf(left), 0.0, share))
    if reading.mass:
        results.append(found.shares(scoring.sink_partial(found.partial.out.shape)))
    return tuple(results) if len(results) > 1 else out


def check_room(config: KvCacheConfig, scoring: Scoring, size: int, parts: int = 1) -> None:
    """Refuses queries whose window reaches tokens that an append of so many has evicted; `config`
    is that of one of `parts` devices."""
    last, window = config.chain[-1], scoring.window
    most = (config.room + last.capacity - last.length) * parts
    if not scoring.causal or not isinstance(window, int) or window > config.max_tokens * parts:
        return
    if size > 1 and window + size - 1 > most:
        raise ValueError(
            f"window={window} for {size} queries at once needs {window + size - 1} tokens, and the "
            f"cache has room for {most}: use `extend` (or `prefill`), which attends before it "
            f"evicts, or set rewind_length (now {config.rewind_length}) to {size - 1}"
        )


def scoring_of(
    config: KvCacheConfig, query: jax.Array, scale: ArrayLike | None, options: dict[str, Any]
) -> Scoring:
    """The options of one call, checked; the config's window where none is given."""
    unknown = set(options) - {field.name for field in dataclasses.fields(Scoring)}
    if unknown:
        raise ValueError(
            f"unknown options {sorted(unknown)}: attention knows "
            f"{[f.name for f in dataclasses.fields(Scoring)]}"
        )
    defaults = {"window": config.window, "window_sinks": config.window_sinks}
    given = {name: option for name, option in options.items() if option is not None}
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scoring = Scoring(scale=scale, **{**defaults, **given})
    return scoring.checked(query.shape[0], query.shape[2], query.shape[1])


def finish(partials: list[Partial], scoring: Scoring, query: jax.Array, return_lse: bool) -> Any:
    """Merges partials [B, K, G * T] with the learned sinks into outputs like `query` [B, T, N, H]
    (and their log-sum-exp [B, T, N])."""
    merged = softmax.merge(
        [*partials, scoring.sink_partial(partials[0].out.shape)]
        if scoring.sink_logits is not None
        else partials
    )
    most = float(jnp.finfo(query.dtype).max)  # values may be larger than float16
    out = jnp.clip(unfold(softmax.normalize(merged), query), -most, most).astype(query.dtype)
    return (
        (out, unfold(softmax.log_sum_exp(merged)[..., None], query)[..., 0]) if return_lse else out
    )


def raw_segments(
    config: KvCacheConfig, sides: tuple[jax.Array, ...], count: jax.Array, base: jax.Array
) -> list[Segment]:
    """The first `count` [B] of tokens (`sides`: keys [B, T, K, H], and values) that no tier holds
    yet, at positions base[b], base[b] + 1, ...; where they are more than the chain holds, those
    that become sinks apart."""
    most, none = sides[0].shape[1], jnp.zeros_like(count)
    known = {jnp.dtype(x.dtype_name): x for x in (Precision.FP16, Precision.BF16)}
    precision = known.get(jnp.result_type(*sides), Precision.FP32)

    def raw(name: str, size: int, low: jax.Array, high: jax.Array) -> Segment:
        value = None if len(sides) == 1 else precision
        spec = TierSpec(name, size, size, 0, precision, value, value_dim=config.output_dim)
        new = (jnp.swapaxes(finite(side[:, :size]), 1, 2) for side in sides)
        held = (Tokens(float_data(side, precision)) for side in new)
        return Segment(Tier(*held), spec, low, high, base)

    if not config.sink_tokens or most <= config.room:
        return [raw("raw", most, none, count)]
    few = jnp.clip(config.sink_tokens - base, 0, count)
    return [raw("sinks", min(config.sink_tokens, most), none, few), raw("raw", most, few, count)]


def seen_singly(config: KvCacheConfig, part: Segment, ends: jax.Array) -> Segment:
    """A segment as queries of tokens not yet appended see it had they come one by one, each making
    the row end at `ends` [B, T]: without what had been evicted by then."""
    if part.spec.name == "sinks" or (part.base is not None and part.spec.length <= config.room):
        return part
    first = ends - config.room
    if part.base is not None:
        first = first - part.base[:, None]
    low = jnp.maximum(part.low[:, None], first)
    return part.seen((low, jnp.broadcast_to(part.high[:, None], low.shape)))
