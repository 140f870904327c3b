"""2,000 damaged files: each is refused with StorageError, and none costs more memory than it is
long. Half of them carry a valid checksum, as only someone who means harm would write."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheState, KvCacheConfig, Status
from jaxkv.signed import NO_DIGEST, StorageError, sign

pytestmark = pytest.mark.slow

CONFIG = KvCacheConfig(4, max_tokens=24, num_kv_heads=2, head_dim=16, sink_tokens=2)
OBJECTS = 2**21
"""Bytes that Python's own objects may take besides; tracing the shapes of a state takes half."""

Header = dict[str, Any]


@functools.cache
def state(size: int) -> CacheState:
    new = np.random.default_rng(0).normal(size=(2, size, 2, 16)).astype(np.float32)
    return jaxkv.append(jaxkv.init(CONFIG, 2), new, new, np.array([size, 5], np.int32))


@pytest.fixture(scope="module", params=[9, 40], ids=["not_full", "wrapped"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a file in which nothing is wrong; loaded once, so that what JAX keeps is no
    part of what a damaged one costs."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    jaxkv.save(path, state(request.param))
    jaxkv.load(path, config=CONFIG)
    return path.read_bytes()


def refused(path: Path, data: bytes, mmap: bool, config: KvCacheConfig | None = CONFIG) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(StorageError):
            jaxkv.load(path, config=config, mmap=mmap)
        assert tracemalloc.get_traced_memory()[1] <= len(data) + OBJECTS
    finally:
        tracemalloc.stop()


def parts(data: bytes) -> tuple[Header, bytes]:
    """A file's header, its own JSON unpacked, and its arrays."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"]["cache"] = json.loads(header["__metadata__"]["cache"])
    return header, data[end:]


def signed(path: Path, header: Header, arrays: bytes) -> bytes:
    """A file with this header and a checksum that is right."""
    header = copy.deepcopy(header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["sha256"] = NO_DIGEST
        header["__metadata__"]["cache"] = json.dumps(header["__metadata__"].get("cache"))
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + arrays)
    with open(path, "r+b") as file:
        sign(file.fileno())
    return path.read_bytes()


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a JSON tree but for the names that say that a file is ours."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in items:
        if name not in ("sha256", "jaxkv_version", "__metadata__"):
            yield (*above, name)
        if isinstance(value, (dict, list)):
            yield from places(value, (*above, name))


HOSTILE: list[Any] = [
    -1, 0, 3, 10**6, 2**31, 2**40, 2**63, 10**30, -(10**30), 0.5, float("nan"), float("inf"), None,
    True, "", "q4", "F64", [], {}, [1], [[]], {"a": 1}, [2**62, 2**62], [0, 2**63], "\0", "x" * 999,
]  # fmt: skip


def test_cuts(whole: bytes, tmp_path: Path, rng: np.random.Generator) -> None:
    """200 files that end early, and some that go on."""
    for index in range(200):
        size = int(rng.integers(len(whole)))
        data = whole[:size] if index % 10 else whole + rng.bytes(size)
        refused(tmp_path / "cache", data, mmap=bool(index % 2))


def test_flips(whole: bytes, tmp_path: Path, rng: np.random.Generator) -> None:
    """300 files with one to eight other bytes, half of them in the header."""
    header = 8 + int.from_bytes(whole[:8], "little")
    for index in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, header if index % 2 else len(whole), rng.integers(1, 9)):
            data[place] ^= int(rng.integers(1, 256))
        if data != whole:
            refused(tmp_path / "cache", bytes(data), mmap=bool(index % 4 < 2))


def test_hostile_headers(whole: bytes, tmp_path: Path, rng: np.random.Generator) -> None:
    """400 headers in which one thing is something else, or missing; the checksum is right."""
    header, arrays = parts(whole)
    everywhere = list(places(header))
    for index in range(400):
        changed = copy.deepcopy(header)
        *above, last = everywhere[int(rng.integers(len(everywhere)))]
        inside = functools.reduce(lambda tree, name: tree[name], above, changed)
        old = copy.deepcopy(inside[last])
        inside[last] = HOSTILE[int(rng.integers(len(HOSTILE)))]
        if inside[last] == old or index % 5 == 0:
            del inside[last]
        if above[-1:] == ["config"] and last not in inside:
            continue  # what is missing takes its default
        refused(tmp_path / "cache", signed(tmp_path / "cache", changed, arrays), mmap=True)


def test_hostile_positions(whole: bytes, tmp_path: Path, rng: np.random.Generator) -> None:
    """100 files with positions that no verb leaves, and a right checksum."""
    header, arrays = parts(whole)
    names = ("end", "lost")
    for index in range(100):
        data = bytearray(arrays)
        name = names[index % 2]
        begin, end = header[name]["data_offsets"]
        place = int(rng.integers(begin // 4, end // 4)) * 4
        least, most = (-(2**31), -1) if index % 4 < 2 or name == "end" else (1000, 2**31 - 1)
        data[place : place + 4] = np.int32(rng.integers(least, most + 1)).tobytes()
        refused(tmp_path / "cache", signed(tmp_path / "cache", header, bytes(data)), mmap=True)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("batch_size", 2**40),
        ("batch_size", 10**30),
        ("num_layers", 2**50),
        ("max_tokens", 2**31 - 2**8),
    ],
)
def test_sizes_beyond_memory(whole: bytes, tmp_path: Path, name: str, size: int) -> None:
    """A consistent file of a few kilobytes that says it is 200 gigabytes long, or more."""
    header, arrays = parts(whole)
    cache = header["__metadata__"]["cache"]
    if name == "max_tokens":
        config = jaxkv.KvCacheConfig(4, max_tokens=size, num_kv_heads=2, head_dim=16, sink_tokens=2)
        cache["config"][name] = size
        cache["chain"][-1]["length"] = config.chain[-1].length
        cache["chain"][-1]["capacity"] = config.chain[-1].capacity
    else:
        cache[name] = size
    data = signed(tmp_path / "cache", header, arrays)
    refused(tmp_path / "cache", data, mmap=True, config=None)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "", "null", "[]", '"x"', "1e999"]
)
def test_headers_that_are_no_header(tmp_path: Path, text: str) -> None:
    """What JSON's reader makes of them is no matter."""
    for json_text in (
        text,
        f'{{"__metadata__":{{"jaxkv_version":"1","sha256":"{NO_DIGEST}"}},{text}',
    ):
        data = len(json_text).to_bytes(8, "little") + json_text.encode()
        path = tmp_path / "cache"
        path.write_bytes(data)
        if NO_DIGEST in json_text:
            with open(path, "r+b") as file:
                sign(file.fileno())
        refused(path, path.read_bytes(), mmap=True)


BREAK: dict[str, Callable[[CacheState], dict[str, Any]]] = {
    "end": lambda state: {"end": state.end.at[1].set(-(2**31))},
    "lost": lambda state: {"lost": state.lost.at[0, 1].set(2**31 - 1)},
}


@pytest.mark.parametrize("field", BREAK)
def test_broken_states_are_not_saved(tmp_path: Path, field: str) -> None:
    """A state that no verb leaves is refused, and an older file stays."""
    good = state(9)
    jaxkv.save(tmp_path / "cache", good)
    broken = dataclasses.replace(good, **BREAK[field](good))
    with pytest.raises(ValueError, match=r"rows \[\[[01]\]\] have positions that no verb leaves"):
        jaxkv.save(tmp_path / "cache", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    jaxkv.load(tmp_path / "cache", config=CONFIG)


def test_states_with_a_status_are_saved(tmp_path: Path) -> None:
    """A refused request leaves no broken row."""
    flagged = jax.jit(jaxkv.take_rows)(jax.jit(jaxkv.evict)(state(9), 99), jnp.array([0, 7]))
    jaxkv.save(tmp_path / "cache", flagged)
    np.testing.assert_array_equal(
        jaxkv.load(tmp_path / "cache").status, [Status.EVICT_TOO_MANY, Status.OUT_OF_RANGE]
    )
