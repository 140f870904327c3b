"""`jaxkv info` and `jaxkv show`, and a state drawn as bars."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv.cli import main
from jaxkv.cli.info import faults


@pytest.fixture
def state() -> jaxkv.CacheState:
    """Two rows with 6 of 8 tokens in the tail and 0 and 4 in the store."""
    config = jaxkv.KvCacheConfig(8, max_tokens=24, num_kv_heads=2, head_dim=16, sink_tokens=2)
    tokens = jax.random.normal(jax.random.key(0), (2, 14, 2, 16))
    return jaxkv.append(jaxkv.init(config, 2), tokens, tokens, jnp.array([8, 14]))


def test_info_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["jax"] == jax.__version__ and found["jaxkv"] == jaxkv.__version__
    assert set(found["presets"]) == set(jaxkv.PRESETS)
    assert all("no kernel" in text for text in found["presets"].values())  # on CPUs
    assert main(["info"]) == 0
    assert "Q4" in capsys.readouterr().out


def test_faults_are_those_of_the_version_and_the_platform() -> None:
    assert any("40101" in fault for fault in faults("0.11.1", "cpu"))
    assert not faults("0.11.1", "tpu") and not faults("0.11.2", "cpu")


def test_a_drawing_has_a_line_for_each_tier(state: jaxkv.CacheState) -> None:
    first, *tiers = jaxkv.draw(state, row=1).splitlines()
    assert first == "2 rows, 2 kv heads of 16; next position 8 to 14"
    assert [line.split("[")[0].strip() for line in tiers] == ["hot", "cold", "sinks"]
    assert "8 of 8" in tiers[0] and "4 of 14" in tiers[1] and "2 of 2" in tiers[2]
    assert tiers[0].count("#") == 40 and tiers[1].count("#") == round(40 * 4 / 14)
    with pytest.raises(ValueError, match=r"row=2: the state has 0 \.\. 1"):
        jaxkv.draw(state, row=2)


def test_show_says_what_a_file_holds(
    state: jaxkv.CacheState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    jaxkv.save(path, state)
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out.strip() == jaxkv.draw(state)
    assert main(["show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["end"] == [8, 14] and found["stats"]["store_tokens"] == [0, 4]
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["show", str(path)]) == 2
    assert "cut short" in capsys.readouterr().err
