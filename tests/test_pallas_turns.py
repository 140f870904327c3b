"""The kernels before and behind the walk, in interpret mode, against `Basis` and `softmax.merge`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import softmax
from jaxkv.codec import rotation
from jaxkv.formats import QuantSpec
from jaxkv.kernels import pallas_turns
from jaxkv.kernels.pallas_codes import side
from jaxkv.tiers.basis import Basis

ROWS, HEADS, H = 2, 3, 128
UNIT = 2.0**-24  # of float32, half
DEEP = 16  # roundings on the way: the transform's stages, the reflection, the sums


def basis(rng, *, full: bool) -> Basis:
    spec = QuantSpec(4, 64, rotate=True, align=full, balance=full)
    if not full:
        return Basis(spec)
    mean, direction = (jnp.asarray(rng.normal(size=(ROWS, HEADS, H)), jnp.float32) for _ in "md")
    balance = rng.integers(-(2**22), 2**22, (ROWS, HEADS, H))
    return Basis(spec, mean, rotation.mirror_of(direction), jnp.asarray(balance, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_queries_are_turned_as_by_the_basis(rng, queries, full):
    own = basis(rng, full=full)
    query = jnp.asarray(rng.normal(size=(ROWS, HEADS, queries, H)), jnp.float32)
    found, wanted = pallas_turns.query(own, query, interpret=True), own.query(query)
    largest = float(jnp.abs(query).max()) * np.sqrt(H)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=DEEP * UNIT * largest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "rows", "splits"), [(1, 8, 1), (4, 8, 5), (7, 8, 33), (40, 16, 70)]
)
@pytest.mark.parametrize("full", [None, False, True])
def test_splits_are_merged_and_turned_back(rng, queries, rows, splits, full):
    own = None if full is None else basis(rng, full=full)
    value = side(QuantSpec(4, 64), H)
    chunks = HEADS * -(-queries // rows)
    shape = ROWS, chunks, splits, value.count + 1, rows, value.size
    out = rng.normal(size=shape)
    out[:, :, :, -1] = np.abs(out[:, :, :, -1, :, :1])  # the sums of weights
    out = jnp.asarray(out, jnp.float32)
    top = jnp.asarray(3 * rng.normal(size=(*shape[:3], rows)), jnp.float32)
    top = top.at[:, :, -1].set(softmax.FLOOR)  # a split that found nothing
    out = out.at[:, :, -1].set(0)
    found = pallas_turns.merged(value, own, (out, top), queries, interpret=True)

    def part(split: int) -> softmax.Partial:
        tiles = jnp.swapaxes(out[:, :, split, :-1], 2, 3).reshape(ROWS, chunks, rows, H)
        each = softmax.Partial(tiles, top[:, :, split], out[:, :, split, -1, :, 0])
        return jax.tree.map(
            lambda x: x.reshape(ROWS, HEADS, -1, *x.shape[3:])[:, :, :queries], each
        )

    merged = softmax.merge([part(split) for split in range(splits)])
    wanted = merged.out if own is None else own.output(merged.out, merged.sum)
    largest = (float(jnp.abs(merged.out).max()) + float(merged.sum.max())) * np.sqrt(H) * 2
    np.testing.assert_allclose(found.out, wanted, rtol=0, atol=(DEEP + splits) * UNIT * largest)
    np.testing.assert_array_equal(found.max, merged.max)
    np.testing.assert_allclose(found.sum, merged.sum, rtol=(DEEP + splits) * UNIT)
