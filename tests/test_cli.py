"""The commands beside `plan` (`test_plan.py`): `info`, `show`, `diagnose`, `bench`; `plan --auto`; and
a state drawn as bars."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv.cli import main
from jaxkv.cli.auto import LOSS
from jaxkv.cli.info import faults
from jaxkv.plan import state_bytes


@pytest.fixture
def state() -> jaxkv.CacheState:
    """Two rows with 6 of 8 tokens in the tail and 0 and 4 in the store."""
    config = jaxkv.KvCacheConfig(8, max_tokens=24, num_kv_heads=2, head_dim=16, sink_tokens=2)
    tokens = jax.random.normal(jax.random.key(0), (2, 14, 2, 16))
    return jax.jit(jaxkv.append)(jaxkv.init(config, 2), tokens, tokens, jnp.array([8, 14]))


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


def test_notebooks_show_the_drawing(state: jaxkv.CacheState) -> None:
    """And what `repr` says where there are no numbers, as under jit."""
    assert jaxkv.draw(state) in html.unescape(state._repr_html_())
    shown: list[str] = []

    @jax.jit
    def look(state: jaxkv.CacheState) -> jax.Array:
        shown.append(state._repr_html_())
        return state.end

    look(state)
    assert "traced" in shown[0]
    layers = jaxkv.init_layers([state.config] * 2)
    assert layers._repr_html_().count("2 layers") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # treescope's own
def test_treescope_shows_the_tokens(state: jaxkv.CacheState) -> None:
    """Decoded, beside the config and the rows' positions."""
    treescope = pytest.importorskip("treescope")
    text = treescope.render_to_text(state)
    assert all(f"{name}=" in text for name in ("config", "end", "status", "keys", "positions"))


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
    layers = jaxkv.init_layers([state.config, state.config])
    jaxkv.save(path, layers)
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out.strip() == jaxkv.draw(layers.stacks[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["show", str(path)]) == 2
    assert "cut short" in capsys.readouterr().err


@pytest.mark.slow
def test_diagnose_says_which_layers_lose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of two has keys with a large mean that nothing takes out; exit code 1 says so."""
    quant = jaxkv.QuantSpec(2, 16)
    config = jaxkv.KvCacheConfig(
        64, max_tokens=128, num_kv_heads=1, head_dim=16, key_quant=quant, value_quant=quant
    )
    state, path = jaxkv.init(config, num_layers=2), tmp_path / "a.safetensors"
    tokens = jax.random.normal(jax.random.key(0), (1, 64, 1, 16))
    loud = tokens.at[..., 0].add(50.0)
    for layer, keys in enumerate((0.1 * tokens, loud)):
        state = jaxkv.append(state, keys, tokens, layer=layer)
    jaxkv.save(path, state)
    assert main(["diagnose", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["losing"] == [1] and found["key_error"][0] < 0.1 < found["key_error"][1]
    assert main(["diagnose", str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[2].endswith("loses")


@pytest.mark.slow
def test_bench_beside_jax(capsys: pytest.CaptureFixture[str]) -> None:
    """Its table has a line for each cache, and the share of the memory's bandwidth."""
    sizes = "--context 64 --kv-heads 2 --head-dim 32 --tail 16 --repeats 2 --prompt 8 --compare"
    assert main(["bench", *sizes.split()]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "GB/s" in lines[1] and [line.split()[0] for line in lines[-3:]] == [
        "q4",
        "fp16",
        "jax.nn",
    ]
    assert "compiling attend" in err  # progress


# plan --auto

SIZES = ["plan", "--auto", "--layers=32", "--kv-heads=8", "--head-dim=128"]


def chosen(capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    assert main([*SIZES, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_auto_finds_the_quality(capsys: pytest.CaptureFixture[str]) -> None:
    """All of what is better does not fit, and what is chosen does."""
    found = chosen(capsys, "--context=32768", "--memory=2GB")
    assert found["preset"] == "Q4_BIAS" and found["bytes_per_device"] <= 2e9
    better = jaxkv.preset("q8", max_tokens=32768, num_kv_heads=8, head_dim=128)
    assert state_bytes(better, 32, 1) > 2e9


def test_auto_finds_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = chosen(capsys, "--context=32768", "--quality=0.01")
    assert found["preset"] == "K4V2" and found["loss"] <= 0.01


def test_auto_finds_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    """The longest one that fits: a slot or two more do not."""
    found = chosen(capsys, "--memory=2GB", "--quality=0")
    config = jaxkv.preset("fp16", max_tokens=found["max_tokens"] + 1, num_kv_heads=8, head_dim=128)
    assert found["preset"] == "FP16" and found["bytes_per_device"] <= 2e9
    assert state_bytes(config, 32, 1) > 2e9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--context=512", "wants two of --context, --memory and --quality"),
        ("--context=512 --memory=1GB --quality=0.1", "wants two of"),
        ("--context=512 --memory=1GB --preset=q4", "leave out --preset or --auto"),
        ("--context=512 --quality=-1", "must be a KL of at least 0"),
        ("--context=512 --memory=1kB", "nothing fits 1.00 kB: Q2 takes"),
        ("--memory=1kB --quality=0.1", "do not even hold"),
    ],
)
def test_auto_says_what_it_wants(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SIZES, *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_losses_are_the_measured_ones() -> None:
    """Of `examples/quality.py`, best first."""
    results = Path(__file__).parent.parent / "examples" / "benchmarks" / "results" / "quality.json"
    sweep = json.loads(results.read_text())["sweep"]
    assert list(LOSS.values()) == sorted(LOSS.values())
    for name, loss in LOSS.items():
        assert loss == pytest.approx(sweep[name]["kl"], rel=0.3, abs=1e-5)
