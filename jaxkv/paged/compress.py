"""Which pages of a row are worth keeping, and the rows without the others.

Compression drops whole pages and moves nothing: what stays has the positions that it had, so
windows, decay and rotary embeddings keep their meaning.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkv.checks import as_counts
from jaxkv.paged.rows import last_positions, pool_of, positions
from jaxkv.state import CacheState
from jaxkv.status import Status, flagged
from jaxkv.tiers import allocation
from jaxkv.tiers.summaries import Summaries
from jaxkv.trees import node

By = Literal["recency", "random", "norm", "key_diversity", "attention", "expected"]
BY_SUMMARY = ("norm", "key_diversity", "expected")


@node
@dataclasses.dataclass(frozen=True)
class Protect:
    """Tokens, ints or [R], whose pages stay whatever their scores: the first `sinks` positions of a
    row, its newest `recent`, and the first `prompt`."""

    sinks: ArrayLike = 0
    recent: ArrayLike = 0
    prompt: ArrayLike = 0


def scores(
    state: CacheState,
    by: By,
    *,
    mass: jax.Array | None = None,
    queries: jax.Array | None = None,
    scale: float | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """How much each page of each row is worth, [R, P] float32 by columns of the rows' tables,
    averaged over layers and kv heads; +inf where a page is not full, -inf where there is none.

    "random" and recency, with what `Protect` saves, are what the others have to beat
    (arXiv:2609.03430 found them hard to beat).

    Args:
      by: "recency": later pages are worth more. "random": by `key`, a `jax.random.key`.
        "norm": pages of short keys are, which draw much attention (Devoto et al. 2024).
        "key_diversity": pages are whose mean key points away from the row's (KeyDiff; Park et al.
        2025). "attention": pages are that got much of some queries' weight, `mass` (SnapKV; Li et
        al. 2024). "expected": pages are that queries like `queries` would look at, were they
        Gaussian (Expected Attention; Devoto et al. 2025).
      mass: [R, K, P] as `attend(..., return_mass=True)` gives it, summed over steps; or of each
        layer, [L, R, K, P].
      queries: [R, T, N, H], turned as they are when they attend; of each layer [L, R, T, N, H].
      scale: of the scores of `queries`; H**-0.5 unless given.

    Raises:
      ValueError: an unknown `by`, what it needs is missing or has another shape, or a pool without
        summaries for "norm", "key_diversity" and "expected".
    """
    if by not in get_args(By):
        raise ValueError(f"by={by!r}: must be one of {', '.join(map(repr, get_args(By)))}")
    pages, shape = pool_of(state), pool_of(state).table.shape
    if by == "random":
        if key is None:
            raise ValueError("by='random' needs key=jax.random.key(seed)")
        found = jax.random.uniform(key, shape)
    elif by == "recency":
        found = ((pages.first - pages.offset) // pages.size).astype(jnp.float32)
    elif by == "attention":
        found = _by_mass(state, mass)
    else:
        found = _by_summary(state, by, queries, scale)
    low, high = last_positions(state)
    found = jnp.where(_full(state), found, jnp.inf)
    return jnp.where(pages.needed(low, high), found, -jnp.inf)


def _full(state: CacheState) -> jax.Array:
    """The columns [R, P] of pages all of whose positions have been written."""
    pages = pool_of(state)
    return pages.first + pages.size <= last_positions(state)[1][:, None]


def _by_mass(state: CacheState, mass: jax.Array | None) -> jax.Array:
    rows, columns = pool_of(state).table.shape
    one = rows, state.config.num_kv_heads, columns
    if mass is None or jnp.shape(mass) not in (one, (state.num_layers, *one)):
        given = None if mass is None else jnp.shape(mass)
        raise ValueError(
            f"by='attention': mass has shape {given}, must be [R, K, P] = {one} (or with the "
            "layers in front), as attend(..., return_mass=True) gives it"
        )
    mass = jnp.asarray(mass, jnp.float32)
    return mass.mean(-2) if mass.ndim == 3 else mass.mean((0, -2))


def _by_summary(
    state: CacheState, by: By, queries: jax.Array | None, scale: float | None
) -> jax.Array:
    pages = pool_of(state)
    if state.summaries is None:
        raise ValueError(
            f"by={by!r}: the pool's pages have no summaries; make it with "
            "jaxkv.paged.init(..., summaries=True)"
        )
    held = state.summaries.of(jnp.maximum(pages.table, 0))  # [L?, R, P, K, ...]
    there = (_full(state) & pages.needed(*last_positions(state)))[..., None]  # [R, P, 1]
    if by == "norm":
        found = -held.norm / _mean(held.norm, there)
    elif by == "key_diversity":
        mean = held.mean.astype(jnp.float32)
        found = -_cosine(mean, _mean(mean, there[..., None]))
    else:
        found = _expected(state, held, there, queries, scale)
    found = found.mean(-1)
    return found if found.ndim == 2 else found.mean(0)


def _mean(x: jax.Array, there: jax.Array) -> jax.Array:
    """The mean over the pages [..., R, P, K, ...] that are there, kept."""
    axis = 1 - there.ndim  # of P
    count = jnp.maximum(there.sum(axis, keepdims=True), 1)
    mean: jax.Array = jnp.where(there, x, 0).sum(axis, keepdims=True) / count
    return jnp.where(mean == 0, 1e-30, mean)


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / jnp.maximum(norms, 1e-30)


def _expected(
    state: CacheState,
    held: Summaries,
    there: jax.Array,
    queries: jax.Array | None,
    scale: float | None,
) -> jax.Array:
    """The share [L?, R, P, K] of weight that Gaussian queries give to each page."""
    lead = held.unit.shape[:-2]
    shape = () if queries is None else jnp.shape(queries)
    config, rows = state.config, pool_of(state).table.shape[0]
    wanted = lead, config.num_kv_heads, config.head_dim
    if queries is None or len(shape) != len(lead) + 3:
        raise ValueError(
            f"by='expected': queries has shape {shape}, must be [R, T, N, H] with R={rows}, "
            f"H={config.head_dim}, and the layers in front where the pool has them"
        )
    if (shape[:-3], shape[-2] % wanted[1], shape[-1]) != (lead, 0, wanted[2]):
        raise ValueError(
            f"by='expected': queries has shape {shape}, must be {(*lead, 'T', 'N', wanted[2])}, N "
            f"a multiple of {wanted[1]}"
        )
    scale = config.head_dim**-0.5 if scale is None else scale
    by_head = jnp.asarray(queries, jnp.float32).reshape(*shape[:-2], wanted[1], -1, shape[-1])
    mean, variance = by_head.mean(-4) * scale, by_head.var(-4) * scale**2  # [L?, R, K, G, H]
    keys = held.mean.astype(jnp.float32)
    # Uniform between their bounds, whose variance is a twelfth of the width's square.
    width = (held.below.astype(jnp.float32) + held.above) * held.unit[..., None]
    square = keys * keys + width * width / 12
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("...kgh,...pkh->...pkg", mean, keys, precision=exact)
    logits += 0.5 * jnp.einsum("...kgh,...pkh->...pkg", variance, square, precision=exact)
    logits = jnp.where(there[..., None], logits, -jnp.inf)
    return jnp.nan_to_num(jax.nn.softmax(logits, axis=-3)).mean(-1)


def compress(
    state: CacheState, scores: jax.Array, budget: ArrayLike, protect: Protect | None = None
) -> CacheState:
    """Rows keep the `budget` (int or [R]) pages of the last tier with the best scores [R, P], and
    give back the others. Tokens do not move.

    Pages that are not full stay, and so do those in which the next `rewind_length` tokens may be
    taken back, and what `protect` says; they count towards the budget, and stay beyond it. What is
    gone can neither be attended to nor be rewound into (`Status.REWIND_INTO_GAP`).

    Raises:
      ValueError: scores of another shape, or a budget below 0 (inside jit such a row stays as it
        was and gets `Status.OUT_OF_RANGE`).
    """
    pages, protect = pool_of(state), protect or Protect()
    if jnp.shape(scores) != pages.table.shape:
        raise ValueError(
            f"scores has shape {jnp.shape(scores)}: must be [R, P] = {pages.table.shape}, as "
            "jaxkv.paged.scores gives them"
        )
    count = as_counts("budget", budget, state.batch_size, None)
    stays = _stays(state, protect)
    value = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.asarray(scores, jnp.float32))
    needed = pages.needed(*last_positions(state))
    # Three classes, then the scores, then the older: what stays counts first, what is not there
    # last.
    kind = jnp.where(stays, 0, jnp.where(needed, 1, 2))
    order = jnp.lexsort((-value, kind), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    kept = stays | (rank < count[:, None]) | (count < 0)[:, None]
    refused = flagged(state.refused, count < 0, Status.OUT_OF_RANGE)
    return dataclasses.replace(state, pages=allocation.keep(pages, kept), refused=refused)


def _stays(state: CacheState, protect: Protect) -> jax.Array:
    """The columns [R, P] of pages that are not to be dropped."""
    pages, config = pool_of(state), state.config
    end, high = positions(state)[0][:, None], last_positions(state)[1][:, None]
    first, stop = pages.first, pages.first + pages.size

    def tokens(name: str, given: Any) -> jax.Array:
        return as_counts(f"protect.{name}", given, state.batch_size, None)[:, None]

    reach = config.rewind_length + config.step - 1
    stays = (stop > high - reach) | (first < tokens("sinks", protect.sinks))
    stays |= (first < tokens("prompt", protect.prompt)) | (
        stop > end - tokens("recent", protect.recent)
    )
    return (first >= 0) & stays
