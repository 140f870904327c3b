"""Arithmetic that rounds alike on every platform, as it is done where the hardware does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import platform
from jaxkv.codec import arithmetic


@pytest.fixture(params=["cpu", "gpu"])
def place(request, monkeypatch):
    monkeypatch.setattr(platform, "name", lambda: request.param)


def numbers(rng, exponents, size=100_000):
    x = rng.uniform(1, 2, size) * 2.0 ** rng.integers(*exponents, size)
    return (x * rng.choice([-1, 1], size)).astype(np.float32)


def test_quotients_are_rounded_to_nearest(rng, place):
    """Of any two floats, and of those with few bits, whose quotients are often exact."""
    x, y = (numbers(rng, (-30, 30)) for _ in "xy")
    few = [a.astype(jnp.bfloat16).astype(np.float32) for a in (x, y)]
    for a, b in ((x, y), (x, few[1]), (few[0], np.rint(few[1]) + np.float32(0.5))):
        np.testing.assert_array_equal(jax.jit(arithmetic.quotient)(a, b), a / b)


def test_a_quotient_off_by_two_units_is_put_right(rng, monkeypatch):
    """A GPU's division is played by one that is wrong in its last bits."""
    x, y = (numbers(rng, (-30, 30)) for _ in "xy")
    for units in (-2, -1, 1, 2):
        first = ((x / y).view(np.int32) + units).view(np.float32)
        found = jax.jit(arithmetic._nearer)(first, x, y)
        np.testing.assert_array_equal(found, x / y)


def test_only_cpus_are_trusted(monkeypatch):
    """Elsewhere quotients and roots are put right, which on a CPU no value shows."""
    for function, numbers_of in ((arithmetic.quotient, 2), (arithmetic.root, 1)):
        texts = set()
        for name in ("cpu", "gpu", "tpu"):
            monkeypatch.setattr(platform, "name", lambda name=name: name)
            texts.add(str(jax.make_jaxpr(lambda *a, f=function: f(*a))(*[1.0] * numbers_of)))
        assert len(texts) == 2


def test_roots_are_rounded_to_nearest(rng, place):
    x = np.abs(numbers(rng, (-30, 30)))
    x[:1000] = np.arange(1000)
    np.testing.assert_array_equal(jax.jit(arithmetic.root)(x), np.sqrt(x))


def test_float16_by_bits_is_numpys(rng, place):
    """All exponents, subnormal numbers, ties and both zeros."""
    x = numbers(rng, (-30, 15))
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every)]
    middle = (every[1:] + every[:-1]) / 2
    for given in (x, every, middle[np.abs(middle) < 65504]):
        found = jax.jit(arithmetic.as_float16)(given)
        np.testing.assert_array_equal(found, given.astype(np.float16).astype(np.float32))
