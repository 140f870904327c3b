"""Two processes with two devices each, joined by `jax.distributed` with gloo over loopback: one
cache, split between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

WORKER = """
import sys
import jax

process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import jaxkv
from jaxkv import shards, storage
from jaxkv.sharding import Axes

assert jax.device_count() == 4 and jax.local_device_count() == 2
B, N, K, H = 2, 4, 2, 32
axes = Axes(heads="heads", context="context")
mesh = jax.make_mesh((2, 2), ("context", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
assert {device.process_index for device in mesh.devices[:, 0]} == {0, 1}  # the context spans both processes
config = jaxkv.KvCacheConfig(tail_length=8, max_tokens=64, num_kv_heads=K, head_dim=H, sink_tokens=4, store_precision="q8")


def spread(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


state = shards.init(config, B, mesh=mesh, axes=axes)
mapped = lambda verb, ins, out: jax.jit(jax.shard_map(verb, mesh=mesh, in_specs=(state.specs, *ins), out_specs=out))
append = mapped(shards.append, (axes.tokens, axes.tokens, axes.rows), state.specs)
attend = mapped(shards.attend, (axes.tokens,), axes.tokens)
alone, rng = jaxkv.init(config, B), np.random.default_rng(0)
for lengths in ([8, 8], [8, 3], [5, 0], [8, 8], [8, 8], [8, 8], [8, 8], [8, 8], [8, 8], [1, 2]):
    keys, values = rng.normal(size=(2, B, 8, K, H)).astype(np.float32)
    lengths = np.array(lengths, np.int32)
    state = append(state, spread(keys, axes.tokens), spread(values, axes.tokens), spread(lengths, axes.rows))
    alone = jax.jit(jaxkv.append)(alone, keys, values, lengths)
query = rng.normal(size=(B, 1, N, H)).astype(np.float32)
out = multihost_utils.process_allgather(attend(state, spread(query, axes.tokens)), tiled=True)
expected = jaxkv.attend(alone, query)
assert int(alone.end[0]) > 64
np.testing.assert_allclose(out, expected, atol=2e-5)
try:
    storage.save("nowhere", state.cache)
except ValueError as error:
    assert "spread over several hosts" in str(error)
else:
    raise AssertionError("a part of a state was saved")
print("agreed", flush=True)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_share_a_context() -> None:
    """Every second position lives in the other process; both get what one process with the whole
    cache gets."""
    port, environment = str(free_port()), {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(2)
    ]
    try:
        for worker in workers:
            out, errors = worker.communicate(timeout=150)
            assert worker.returncode == 0, errors
            assert out.endswith("agreed\n")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
