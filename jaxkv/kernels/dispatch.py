"""Which implementation attends over a tier and writes to it: the GPU kernels where they can run and
XLA everywhere else.

The kernels are imported where one is wanted: Pallas costs as much as all else that `import jaxkv`
adds to JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv import platform
from jaxkv.chain import TierSpec
from jaxkv.formats import Format, QuantSpec
from jaxkv.kernels import xla
from jaxkv.kernels.queries import Queries
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.tiers import tokens
from jaxkv.tiers.basis import Basis
from jaxkv.tiers.place import Index, Run, scatter, windows
from jaxkv.tiers.segment import Segment, Tier
from jaxkv.tiers.tokens import Tokens

if TYPE_CHECKING:
    from jaxkv.kernels.pallas_gpu import Limits

Implementation = Literal["xla", "pallas"] | None

MOST_HEAD_DIM = 256
LEAST_PAGE = 16
TURNED = "it does not add the score of a mean before the rotary embedding"
UNMEASURED = "over the pages of a pool it has not yet run on a GPU"
READABLE = ("data", "scale", "zero_point", "scale_unit", "zero_unit")


def partial_attention(
    part: Segment, basis: Basis, own: Queries, implementation: Implementation = None
) -> Partial:
    """`xla.partial_attention` by the implementation asked for, whose result `basis`, that of the
    values, turns back.

    Args:
      implementation: "xla", "pallas", or None: the kernel on NVIDIA GPUs for what it can do, XLA
        otherwise.

    Raises:
      ValueError: "pallas" was asked for by name and cannot run; it says why.
    """
    check_implementation(implementation)

    def portable(query: jax.Array) -> Partial:
        codes = xla.partial_attention(part, dataclasses.replace(own, folded=query))
        return in_tokens_basis(basis, codes)

    def kernel(query: jax.Array) -> Partial:
        from jaxkv.kernels import pallas_gpu

        bounds = limits(own, part)
        return pallas_gpu.partial_attention(part, query, own.unit, bounds, part.layer, basis)

    query = own.folded
    if implementation == "xla":
        return portable(query)
    reason = refusal(part, query.shape[-1], own.scoring)
    reason = reason or (TURNED if own.turned is not None else None) or platform.no_gpu()
    if implementation is None and part.pages is not None:
        reason = reason or UNMEASURED
    if implementation == "pallas":
        if reason:
            raise ValueError(
                f"implementation='pallas': {reason}; pass 'xla', or None to choose by platform"
            )
        return kernel(query)
    # Without a GPU in sight the kernel is not even traced: nothing changes for those who have none.
    return (
        portable(query) if reason else lax.platform_dependent(query, cuda=kernel, default=portable)
    )


def turned_query(basis: Basis, query: jax.Array, implementation: Implementation) -> jax.Array:
    """`Basis.query` by the implementation asked for."""
    if implementation == "xla" or platform.no_gpu():
        return basis.query(query)
    from jaxkv.kernels import pallas_turns

    if not basis.turns or pallas_turns.refusal(query.shape[-1]):
        return basis.query(query)
    kernel = functools.partial(pallas_turns.query, basis)
    found: jax.Array = lax.platform_dependent(query, cuda=kernel, default=basis.query)
    return found


def in_tokens_basis(basis: Basis, codes: Partial) -> Partial:
    """Sums of values as a tier stores them, back among raw tokens."""
    return dataclasses.replace(codes, out=basis.output(codes.out, codes.sum))


def check_implementation(implementation: Any) -> None:
    """Refuses unknown names."""
    if implementation not in ("xla", "pallas", None):
        raise ValueError(
            f"implementation={implementation!r}: must be 'xla', 'pallas' or None to choose by "
            "platform"
        )


def limits(own: Queries, part: Segment) -> Limits:
    """`Queries.see` as bounds."""
    from jaxkv.kernels.pallas_gpu import Limits

    sink_tokens, (upto, since) = own.sink_tokens, own.scoring.bounds(own.position)
    if part.span is not None:  # there are no sinks in such a segment
        low, high = (x if part.base is None else x + part.base[:, None] for x in part.span)
        upto = jnp.minimum(upto, high - 1)
        since, sink_tokens = low if since is None else jnp.maximum(since, low), 0
    groups = own.folded.shape[2] // own.position.shape[1]
    since = since if since is None else jnp.tile(since, (1, groups))
    return Limits(jnp.tile(upto, (1, groups)), since, sink_tokens)


def refusal(part: Segment, head_dim: int, scoring: Scoring) -> str | None:
    """Why the kernel cannot do this tier, or None."""
    if scoring.changes_scores:
        return "it knows causality, windows and sink logits, not soft_cap, decay, bias or mask"
    if part.pages is not None and part.pages.size % LEAST_PAGE:
        return f"pages of {part.pages.size} tokens are no multiple of {LEAST_PAGE}"
    if head_dim > MOST_HEAD_DIM:
        return f"head_dim={head_dim} is more than {MOST_HEAD_DIM}"
    if head_dim % 8:
        return f"head_dim={head_dim} is no multiple of 8"
    if part.spec.value is None:
        return "it reads values apart from the keys, and here they are a part of them"
    if part.spec.value_dim not in (None, head_dim):
        return f"it takes values like keys, not value_dim={part.spec.value_dim} beside {head_dim}"
    for held, fmt in zip(part.tier.sides, part.spec.formats, strict=True):
        arrays = {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
        unknown = [
            name for name, array in arrays.items() if array is not None and name not in READABLE
        ]
        if isinstance(fmt, QuantSpec) and fmt.bits == 3:
            return f"it reads codes of 8, 4 or 2 bits, not the 3 of the {part.spec.name} tier"
        if unknown:
            return f"it cannot read {fmt} in the {part.spec.name} tier"
        if _overflows(held):
            return (
                f"the {part.spec.name} tier has an array of 2 to 4 GiB of bytes, "
                "where Pallas-Triton's offsets overflow: split the batch"
            )
    return None


AT_ONCE = 2**17
"""Elements of a prompt's keys that enter a cache at once on CPUs: temporaries of half a megabyte,
which stay in the L2 cache. Larger ones are page-faulted in: twice the time for 2,048 tokens."""


def tokens_at_once(shape: tuple[int, ...], step: int) -> int:
    """How many of the tokens [B, T, K, H] enter a cache at once, whole migration batches."""
    batch, size, heads, head_dim = shape
    if platform.name() != "cpu":
        return size
    most = max(AT_ONCE // (batch * heads * head_dim), 32)
    return -(-most // step) * step


def write_sides(
    tier: Tier,
    spec: TierSpec,
    new: tuple[jax.Array, ...],
    run: Run,
    layer: Index,
    implementation: Implementation,
) -> Tier:
    """`write` of all sides of a tier; without a GPU in sight they are encoded together."""
    sides = list(zip(tier.sides, spec.formats, new, strict=True))
    if len(sides) == 1 or (implementation != "xla" and not platform.no_gpu()):
        return Tier(*(write(held, fmt, x, run, layer, implementation) for held, fmt, x in sides))
    check_implementation(implementation)
    put = windows if platform.is_tiled() else scatter
    keys, values = (tokens.basis_of(held, fmt, layer) for held, fmt, _ in sides)
    encoded = tokens.encode_both((keys, values), *new)
    return Tier(
        *(
            tokens.write(held, fmt, x, run, layer, put)
            for (held, fmt, _), x in zip(sides, encoded, strict=True)
        )
    )


def write(
    held: Tokens,
    fmt: Format,
    new: jax.Array,
    run: Run,
    layer: Index,
    implementation: Implementation,
) -> Tokens:
    """Stores tokens [B, T, K, H] in the slots of a run of one side of a tier.

    By the kernel on NVIDIA GPUs unless `implementation` is "xla"; what it cannot write, XLA does.
    """
    check_implementation(implementation)

    def refused() -> Any:
        from jaxkv.kernels import pallas_write

        return pallas_write.refusal(fmt, *new.shape[2:]) or _overflows(held)

    put = windows if platform.is_tiled() else scatter

    def portable(held: Tokens, new: jax.Array) -> Tokens:
        encoded = tokens.encode(tokens.basis_of(held, fmt, layer), new)
        return tokens.write(held, fmt, encoded, run, layer, put)

    def kernel(held: Tokens, new: jax.Array) -> Tokens:
        from jaxkv.kernels import pallas_write

        assert isinstance(fmt, QuantSpec)
        return pallas_write.write(held, fmt, new, run, layer)

    if implementation == "xla" or run.pages is not None or platform.no_gpu() or refused():
        return portable(held, new)
    found: Tokens = lax.platform_dependent(held, new, cuda=kernel, default=portable)
    return found


def _overflows(held: Tokens) -> bool:
    """Pallas-Triton counts elements in 32 bits, signed in effect, in arrays of up to 4 GiB."""
    return any(
        2**31 < array.size <= 2**32 // array.dtype.itemsize for array in jax.tree.leaves(held)
    )
