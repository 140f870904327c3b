"""Strict settings for every test, and random numbers that are the same in every run."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import chex
import hypothesis
import jax
import numpy as np
import pytest
from lowering import H100

from jaxkv.kernels import traced

jax.config.update(
    "jax_num_cpu_devices", 8
)  # for shard_map; has to come before the first use of a device

hypothesis.settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test is of two classes (laws.py): `-m slow` takes nothing that is exhaustive."""
    both = [
        i.nodeid
        for i in items
        if i.get_closest_marker("slow") and i.get_closest_marker("exhaustive")
    ]
    if both:
        raise pytest.UsageError(f"marked slow and exhaustive, must be one: {both[:5]}")


@pytest.fixture(autouse=True)
def _fresh_trace_counter() -> None:
    chex.clear_trace_counter()


@pytest.fixture
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    """What a test changes is traced anew, and forgotten after it."""

    class Forgetful(pytest.MonkeyPatch):
        def setattr(self, *args: Any, **named: Any) -> None:
            super().setattr(*args, **named)
            traced.called.clear_cache()

    patch = Forgetful()
    yield patch
    patch.undo()
    traced.called.clear_cache()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's name, so that no test depends on which others ran."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def gpu() -> Iterator[None]:
    """Programs are traced as for a GPU that is elsewhere."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H100)):
        yield
