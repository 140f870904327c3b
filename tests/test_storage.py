"""Caches on disk: what was saved goes on bit for bit; whatever is not a whole file of the right
kind is refused, and nothing changes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from cases import Array
from safetensors.numpy import load_file, save_file

import jaxkv
from jaxkv import CacheState, KvCacheConfig, QuantSpec, storage
from jaxkv.signed import StorageError
from jaxkv.storage import load, save

B, K, H = 2, 2, 32
SMALL: dict[str, Any] = {"max_tokens": 96, "num_kv_heads": K, "head_dim": H}
CONFIGS = {
    name: jaxkv.preset(
        name, **SMALL, **({} if name == "KIVI2" else {"sink_tokens": 4}), tail_length=32
    )
    for name in jaxkv.PRESETS
} | {
    "bf16_chain": KvCacheConfig(
        8,
        "bf16",
        max_tokens=48,
        num_kv_heads=K,
        head_dim=H,
        warm_length=8,
        sink_tokens=2,
        rewind_length=3,
    ),
    "centred": KvCacheConfig(
        4, max_tokens=24, num_kv_heads=K, head_dim=H, key_quant=QuantSpec(4, center=True)
    ),
}
STEPS = {"not_full": 3, "wrapped": 14}  # appends of 8 tokens
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
append, attend = jit(jaxkv.append), jit(jaxkv.attend)
rewind, gather = jit(jaxkv.rewind), jit(jaxkv.gather)


def tokens(seed: int, size: int = 8) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, B, size, K, H)).astype(np.float32)
    return keys, values


@functools.cache
def filled(name: str, steps: int) -> CacheState:
    """Rows of different lengths."""
    state = jaxkv.init(
        CONFIGS[name], B, key_mean=np.full((K, H), 0.5, np.float32) if name == "centred" else None
    )
    for i in range(steps):
        state = append(state, *tokens(i), np.array([8, 5], np.int32))
    return state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_caches_go_on_bit_for_bit(name: str, steps: int, path: Path) -> None:
    state = filled(name, steps)
    save(path, state)
    loaded = load(path, config=state.config)
    chex.assert_trees_all_equal(loaded, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, state)
    lengths = np.array([8, 3], np.int32)
    chex.assert_trees_all_equal(*(append(s, *tokens(99), lengths) for s in (loaded, state)))
    query = tokens(50)[0][:, :1]
    np.testing.assert_array_equal(attend(loaded, query), attend(state, query))


@pytest.mark.slow
def test_prompt_cache_of_a_rewound_state(path: Path) -> None:
    """Tokens that a rewind may bring back are saved with the rest."""
    state = filled("bf16_chain", 14)
    back = rewind(state, np.int32(2))
    save(path, back)
    chex.assert_trees_all_equal(load(path), back)
    chex.assert_trees_all_equal(
        gather(rewind(load(path), np.int32(1))), gather(rewind(state, np.int32(3)))
    )


@pytest.mark.slow
def test_status_and_layers_are_saved(path: Path) -> None:
    state = jaxkv.init(CONFIGS["Q4"], B, num_layers=3)
    for layer in range(3):
        state = jit(jaxkv.append)(state, *tokens(layer), layer=np.int32(layer))
    state = jit(jaxkv.evict)(state, np.array([50, 2], np.int32))
    assert state.status.any()
    save(path, state)
    chex.assert_trees_all_equal(load(path), state)
    chex.assert_trees_all_equal(load(path, rows=1), jaxkv.take_rows(state, [1]))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, [1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_one_row_or_some(rows: Any, mmap: bool, path: Path) -> None:
    state = filled("Q4_SINKS", 14)
    save(path, state)
    chex.assert_trees_all_equal(
        load(path, rows=rows, mmap=mmap), jaxkv.take_rows(state, np.atleast_1d(rows))
    )


def test_short_caches_take_little_room(path: Path) -> None:
    """Slots that have never been written are not saved, so a prompt's file is as long as the
    prompt."""
    config = jaxkv.preset("q4", max_tokens=8192, num_kv_heads=K, head_dim=H, tail_length=8)
    state = append(jaxkv.init(config, B), *tokens(0))
    save(path, state)
    assert path.stat().st_size < 2**15 < jaxkv.nbytes(state) / 10
    chex.assert_trees_all_equal(load(path), state)


def test_any_safetensors_reader_opens_the_file(path: Path) -> None:
    state = filled("Q4", 14)
    save(path, state)
    arrays = load_file(path)
    np.testing.assert_array_equal(arrays["tiers/1/keys/data"], state.tiers[1].keys.data)
    np.testing.assert_array_equal(arrays["end"], state.end)


# Files that are refused.


def refuses(path: Path, message: str, **kwargs: Any) -> None:
    for mmap in (False, True):
        with pytest.raises(StorageError, match=message):
            load(path, mmap=mmap, **kwargs)


def test_files_cut_short(path: Path) -> None:
    save(path, filled("bf16_chain", 3))
    whole = path.read_bytes()
    lengths = {
        *range(64),
        *range(64, len(whole), len(whole) // 97),
        *range(len(whole) - 8, len(whole)),
    }
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        refuses(path, "is cut short|cut short or altered")
    path.write_bytes(whole + b"\0")
    refuses(path, "cut short or altered")


def test_altered_bytes(path: Path, rng: np.random.Generator) -> None:
    """One bit anywhere: in the header's length, the metadata, the digest, the codes."""
    save(path, filled("bf16_chain", 3))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [
        *range(8),
        *rng.integers(8, header, 60),
        *rng.integers(header, len(whole), 60),
        len(whole) - 1,
    ]:
        altered = bytearray(whole)
        altered[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        refuses(path, "is no jaxkv file|cut short or altered|has version")
    path.write_bytes(whole)
    chex.assert_trees_all_equal(load(path), filled("bf16_chain", 3))


def test_other_versions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "VERSION", 7)
        save(path, filled("Q4", 3))
    refuses(path, "has version 7, this jaxkv reads version 2: load it with the one that saved it")


def test_other_configs(path: Path) -> None:
    save(path, filled("Q4", 3))
    refuses(path, r"is for another config: store_precision=q4 \(wanted q8\)", config=CONFIGS["Q8"])
    with pytest.raises(ValueError, match=r"rows=\[2\]: must be rows of the file, 0 .. 1"):
        load(path, rows=[2])


def test_chains_that_this_version_would_choose_otherwise(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config alone does not say how codes are to be read; a file whose formats differ is
    refused."""
    description = storage.description_of

    def other(state: CacheState) -> dict[str, Any]:
        found = json.loads(json.dumps(description(state)))
        found["chain"][1]["key"]["group_size"] = 16
        return found

    with monkeypatch.context() as patch:
        patch.setattr(storage, "description_of", other)
        save(path, filled("Q4", 3))
    refuses(path, "has tiers in formats that this jaxkv would choose otherwise")


def test_other_files(path: Path) -> None:
    save_file({"x": np.zeros(3)}, path)
    refuses(path, "is no jaxkv file")
    path.write_bytes(b"")
    refuses(path, "is no jaxkv file")
    with pytest.raises(FileNotFoundError):
        load(path.parent / "nothing")


# Interrupted saves.


@pytest.mark.parametrize("place", ["save_file", "replace", "fsync"])
def test_failed_saves_leave_the_old_file(
    place: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, filled("Q4", 3))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    module: Any = sys.modules["safetensors.numpy"] if place == "save_file" else os
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(module, place, fail)
        save(path, filled("Q4", 14))
    assert os.listdir(path.parent) == [path.name]
    chex.assert_trees_all_equal(load(path), filled("Q4", 3))


SAVE_AND_KILL = """
import os, random, signal, sys, time, warnings
import jax, numpy as np, jaxkv
from jaxkv.storage import StorageError, load, save

folder, path, kills = sys.argv[1], os.path.join(sys.argv[1], "cache"), int(sys.argv[2])
config = jaxkv.KvCacheConfig(tail_length=64, max_tokens=2048, num_kv_heads=4, head_dim=64)
states = []
for seed in (1, 2):
    new = jax.random.normal(jax.random.key(seed), (2, 2048, 4, 64))
    states.append(jax.tree.map(np.asarray, jaxkv.append(jaxkv.init(config, 2), new, new)))
save(path, states[0])
warnings.simplefilter("ignore")  # a fork of a process with threads: the child touches files and NumPy only
random.seed(0)

def is_whole(name):
    loaded = jax.tree.leaves(load(name))
    return any(all(map(np.array_equal, loaded, jax.tree.leaves(state))) for state in states)

torn = refused = 0
for kill in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            save(path, states[1]); save(path, states[0])
    time.sleep(random.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert is_whole(path), kill
    for name in sorted(set(os.listdir(folder)) - {"cache"}):
        torn += 1
        try:
            assert is_whole(os.path.join(folder, name)), name
        except StorageError:
            refused += 1
        os.unlink(os.path.join(folder, name))
print(torn, refused)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """Killed 50 times while it saves, a process leaves a whole file each time; what it left half
    written is refused."""
    command = [sys.executable, "-c", SAVE_AND_KILL, str(tmp_path), "50"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    torn, refused = map(int, done.stdout.split())
    assert torn >= 10  # that many kills were in the middle
    assert refused > 0


# Checkpoint libraries.


def test_orbax_keeps_a_sharded_state(tmp_path: Path) -> None:
    """A state spread over devices is a pytree of arrays; Orbax saves each shard and restores it in
    its place."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    from jax.sharding import Mesh

    from jaxkv import sharding

    axes = sharding.Axes(batch="batch", heads="heads")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    state = sharding.place(filled("Q4_SINKS", 14), mesh, axes)
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", wanted)
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
        lambda leaf: leaf.sharding, state
    )
    save(tmp_path / "one", state)  # on one host a file will do
    chex.assert_trees_all_equal(load(tmp_path / "one"), filled("Q4_SINKS", 14))
