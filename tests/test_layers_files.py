"""`Layers` on disk: one file that gives back the same bits, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models.spec import Kind, LayerSpec

B, K, H = 2, 2, 8
MODEL = {
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": K,
    "head_dim": H,
    "sliding_window": 8,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_scaling": {"factor": 8.0, "list": [1, 2]},
}
SPECS = (*jaxkv.layers_of(MODEL, "q4", 24, tail_length=4), LayerSpec(kind=Kind.OWN))
OWN = {"a": jnp.arange(B * 3.0).reshape(B, 3), "b": jnp.arange(B)}
LIKE = {4: {"a": np.zeros((1, 3), np.float32), "b": np.zeros(1, np.int32)}}


@pytest.fixture(scope="module")
def held() -> jaxkv.Layers:
    state = jaxkv.init_layers(SPECS, B, own={4: OWN})
    keys = jax.random.normal(jax.random.key(0), (B, 12, K, H))
    for i in range(3):
        state = jaxkv.append(state, keys + i, keys - i, [12, 7], layer=i)
    return state


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_comes_back_bit_for_bit(held: jaxkv.Layers, tmp_path: Path) -> None:
    jaxkv.save(tmp_path / "layers", held)
    assert_same(jaxkv.load_layers(tmp_path / "layers", layers=SPECS, own=LIKE), held)
    row = jaxkv.load_layers(tmp_path / "layers", own=LIKE, rows=1, mmap=False)
    assert_same(row, jaxkv.take_rows(held, [1]))


def test_layers_that_differ_only_by_their_config(tmp_path: Path) -> None:
    config = jaxkv.preset("q4", max_tokens=24, num_kv_heads=K, head_dim=H)
    state = jaxkv.init_layers(jaxkv.exact_ends(config, 3), B)
    jaxkv.save(tmp_path / "layers", state)
    assert_same(jaxkv.load_layers(tmp_path / "layers"), state)


@pytest.mark.slow
def test_what_is_not_what_was_asked_for(held: jaxkv.Layers, tmp_path: Path) -> None:
    jaxkv.save(tmp_path / "layers", held)
    with pytest.raises(ValueError, match=r"own=\[\]: the file has states of layers \[4\]"):
        jaxkv.load_layers(tmp_path / "layers")
    with pytest.raises(jaxkv.StorageError, match="is of other layers"):
        jaxkv.load_layers(tmp_path / "layers", layers=SPECS[:4], own=LIKE)
    with pytest.raises(ValueError, match="must be rows of the file"):
        jaxkv.load_layers(tmp_path / "layers", own=LIKE, rows=2)
    wrong = {4: {**LIKE[4], "a": np.zeros((1, 5), np.float32)}}
    with pytest.raises(jaxkv.StorageError, match="header that no save writes"):
        jaxkv.load_layers(tmp_path / "layers", own=wrong)
    with pytest.raises(jaxkv.StorageError, match="header that no save writes"):
        jaxkv.load(tmp_path / "layers")
    jaxkv.save(tmp_path / "state", held.stacks[0])
    with pytest.raises(jaxkv.StorageError, match=r"holds no Layers .*: use jaxkv.load"):
        jaxkv.load_layers(tmp_path / "state")
    assert_same(jaxkv.load(tmp_path / "state"), held.stacks[0])
