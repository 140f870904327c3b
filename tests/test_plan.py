"""What `plan` says a cache takes is what it takes; `python -m jaxkv` says so in a table and in
JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv import KvCacheConfig, shards
from jaxkv.cli import main
from jaxkv.cli.common import human
from jaxkv.models.configs import ModelShape, model_shape
from jaxkv.models.spec import LayerSpec
from jaxkv.plan import AXES, plan, state_bytes

SIZES: dict[str, Any] = {"max_tokens": 512, "num_kv_heads": 4, "head_dim": 64}
CONFIGS = {name: jaxkv.preset(name, **SIZES) for name in jaxkv.PRESETS} | {
    "chain": KvCacheConfig(32, **SIZES, warm_length=64, sink_tokens=4, rewind_length=8),
    "one_tier": KvCacheConfig(512, **SIZES),
}
over = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
HUGGING_FACE = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 2048,
}


@over
def test_bytes_are_those_of_a_real_state(config: KvCacheConfig) -> None:
    found = plan([config] * 3, batch_size=2)
    state = jaxkv.init(config, 2, num_layers=3)
    assert (
        found.total_bytes
        == found.bytes_per_device
        == jaxkv.nbytes(state)
        == state_bytes(config, 3, 2)
    )
    tiers = ([] if state.sinks is None else [state.sinks]) + list(state.tiers)
    assert [tier.bytes for tier in found.stacks[0].tiers] == [
        sum(leaf.nbytes for leaf in jax.tree.leaves(tier)) for tier in tiers
    ]
    assert [tier.tokens for tier in found.stacks[0].tiers][-1] + sum(
        tier.tokens for tier in found.stacks[0].tiers[:-1]
    ) == config.max_tokens
    assert found.fp16_bytes == 2 * 2 * 3 * 2 * 512 * 4 * 64


@over
def test_bytes_per_token_are_those_of_stats(config: KvCacheConfig) -> None:
    """A full row's `stats` and the plan's bytes per token agree, tier by tier."""
    found = plan([config])
    state = dataclasses.replace(
        jaxkv.init(config, 1), end=jax.numpy.full((1,), config.max_tokens, jax.numpy.int32)
    )
    counts = jaxkv.stats(state)
    tokens = {
        "sinks": counts.sink_tokens,
        "hot": counts.tail_tokens,
        "warm": counts.warm_tokens,
        "cold": counts.store_tokens,
    }
    expected = float(counts.tail_bytes + counts.store_bytes)
    assert (
        sum(tier.bytes_per_token * int(tokens[tier.name][0]) for tier in found.stacks[0].tiers)
        == expected
    )


@pytest.mark.parametrize("name", ["Q4_SINKS", "Q4K", "chain"])
def test_a_mesh_divides_it(name: str) -> None:
    """Bytes per device are those that `shards.init` puts on each."""
    config, devices = CONFIGS[name], {"batch": 2, "heads": 2, "context": 2}
    found = plan([config] * 3, batch_size=4, devices=devices)
    mesh = jax.make_mesh(
        (2, 2, 2), ("batch", "heads", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    state = shards.init(config, 4, 3, mesh=mesh, axes=AXES)
    for device in mesh.devices.flat:
        there = [
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        ]
        assert sum(there) == found.bytes_per_device
    assert found.total_bytes == 8 * found.bytes_per_device
    assert found.devices == devices


@pytest.mark.parametrize("devices", [{}, {"batch": 2, "heads": 4}, {"context": 4}], ids=str)
def test_what_fits_fits(devices: dict[str, int]) -> None:
    """One token, or one row of devices, more would not."""
    config, memory = CONFIGS["chain"], 50_000_000
    fits = plan([config] * 8, 2, devices, memory).fits
    assert fits is not None
    parts, rows = devices.get("context", 1), devices.get("batch", 1)

    def bytes_of(tokens: int, sequences: int) -> int:
        return plan(
            [dataclasses.replace(config, max_tokens=tokens)] * 8, sequences, devices
        ).bytes_per_device

    assert bytes_of(fits.tokens, 2) <= memory < bytes_of(fits.tokens + parts, 2)
    assert (
        bytes_of(config.max_tokens, fits.sequences)
        <= memory
        < bytes_of(config.max_tokens, fits.sequences + rows)
    )
    assert fits.tokens > 2 * fits.fp16_tokens


def test_nothing_fits() -> None:
    fits = plan([CONFIGS["chain"]] * 8, 2, memory=1000).fits
    assert fits is not None
    assert (fits.tokens, fits.sequences, fits.fp16_tokens, fits.fp16_sequences) == (0, 0, 0, 0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="batch_size=3: must be a multiple of the 2 devices"):
        plan([CONFIGS["Q4"]], 3, {"batch": 2})
    with pytest.raises(ValueError, match="must give positive numbers for some of"):
        plan([CONFIGS["Q4"]], devices={"rows": 2})


# Models.


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_hugging_face_config(tmp_path: Path) -> None:
    shape = ModelShape((LayerSpec(num_kv_heads=3, head_dim=64),) * 30, 2048)
    fields = {**HUGGING_FACE, "model_type": "llama"}
    assert model_shape(write(tmp_path, fields)) == shape
    assert model_shape(tmp_path / "config.json") == shape
    own = {"head_dim": 128, "num_key_value_heads": None}
    nested = model_shape(write(tmp_path, {"text_config": {**fields, **own}}))
    assert nested.layers == (LayerSpec(num_kv_heads=9, head_dim=128),) * 30


# The command line.

FLAGS = [
    "--layers",
    "30",
    "--kv-heads",
    "3",
    "--head-dim",
    "64",
    "--context",
    "2048",
    "--batch",
    "4",
    "--preset",
    "q4_sinks",
    "--tail=128",
]


def expected_plan() -> Any:
    config = jaxkv.preset("q4_sinks", max_tokens=2048, num_kv_heads=3, head_dim=64, tail_length=128)
    return config, jaxkv.nbytes(jaxkv.init(config, 4, num_layers=30))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FLAGS, "--json", "--memory", "1GB"]) == 0
    found = json.loads(capsys.readouterr().out)
    config, size = expected_plan()
    assert found["total_bytes"] == found["bytes_per_device"] == size
    assert found["stacks"][0]["config"]["tail_length"] == 128
    assert found["fits"]["sequences"] == 10**9 // jaxkv.nbytes(jaxkv.init(config, 1, num_layers=30))
    assert [tier["name"] for tier in found["stacks"][0]["tiers"]] == ["sinks", "hot", "cold"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FLAGS, "--memory", "1GB", "--mesh", "batch=2"]) == 0
    out = capsys.readouterr().out
    size = expected_plan()[1]
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert out.startswith("30 layers; 4 x 2,048 tokens; devices: batch 2\n")
    assert lines["30"] == "30 layers with 3 kv heads of 64"
    assert human(size) in lines["all"] and f"{size / found_fp16():.1%} of fp16" in lines["all"]
    assert human(size // 2) in lines["per"]
    assert lines["cold"].endswith("4 bits, groups of 64, rotate, align")
    assert lines["1.00"].startswith("1.00 GB per device hold 4 x ")


def found_fp16() -> int:
    return 2 * 2 * 3 * 64 * 30 * 4 * 2048


def test_model_instead_of_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's own context where none is given."""
    write(tmp_path, HUGGING_FACE)
    assert main(["plan", "--model", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_layers"] == 30
    assert found["max_tokens"] == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan", "give --model, or all of"),
        ("plan --layers 2 --kv-heads 2 --head-dim 64", "or --context"),
        ("plan --layers 2 --kv-heads 2 --head-dim 64 --context 512 --preset q3", "no preset 'q3'"),
        (
            "plan --layers 2 --kv-heads 3 --head-dim 64 --context 512 --mesh heads=2",
            "num_kv_heads=3: must be a multiple",
        ),
        ("plan --model nowhere", "No such file"),
    ],
)
def test_errors_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flag", ["--memory=lots", "--memory=3parsecs", "--mesh=heads", "--mesh=heads=two"]
)
def test_flags_that_cannot_be_read(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *FLAGS, flag])
    assert "invalid" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxkv", "plan", *FLAGS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert human(expected_plan()[1]) in done.stdout


@pytest.mark.slow
def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """Times both caches; a small one here."""
    sizes = "--context 64 --kv-heads 2 --head-dim 32 --tail 16 --repeats 2"
    assert main(["bench", *sizes.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["caches"]
    assert set(found) == {"q4", "fp16"}
    config = jaxkv.preset("q4", max_tokens=64, num_kv_heads=2, head_dim=32, tail_length=16)
    assert found["q4"]["bytes"] == jaxkv.nbytes(jaxkv.init(config))
    assert all(
        np.isfinite(row[name]) and row[name] > 0
        for row in found.values()
        for name in ("append", "attend", "both", "compile")
    )
