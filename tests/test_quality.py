"""The examples' quality measurement: its quick mode guards the codecs, and a long one goes on where
it stopped."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

for needed in ("gguf", "tokenizers", "tqdm"):
    pytest.importorskip(needed)

import quality  # noqa: E402

pytestmark = pytest.mark.slow


def test_quick_mode_fails_on_worse_codes() -> None:
    """CI runs the quick mode itself, as it does every example's."""
    bounds = quality.QUICK
    good = {name: {"kl": kl, "bits_per_element": bits} for name, (kl, bits) in bounds.items()}
    quality.check_quick(good)
    for worse in (
        {"kl": 0.0036, "bits_per_element": 4.5},
        {"kl": 0.001, "bits_per_element": 4.6},
        {"kl": np.nan, "bits_per_element": 4.5},
    ):
        with pytest.raises(SystemExit, match="Q4"):
            quality.check_quick({**good, "Q4": worse})


def test_results_are_kept_and_not_measured_again(tmp_path: pathlib.Path) -> None:
    path, header = tmp_path / "results.json", {"window": 2048, "chunk": 64}
    quality.Results(path, header, fresh=False).once("bias", "Q4", lambda: 1)
    assert json.loads(path.read_text()) == {**header, "bias": {"Q4": 1}}
    assert quality.Results(path, header, fresh=False).once("bias", "Q4", lambda: 2) == 1
    assert quality.Results(path, header, fresh=True).once("bias", "Q4", lambda: 2) == 2


def test_results_of_another_reading_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results.json"
    quality.Results(path, {"window": 2048, "chunk": 64}, fresh=False).save()
    with pytest.raises(ValueError, match="chunk=64"):
        quality.Results(path, {"window": 2048, "chunk": 16}, fresh=False)


def test_parts_of_different_sizes_combine_to_the_mean_over_tokens() -> None:
    parts = [
        {
            "bits_per_element": 4.5,
            "perplexity": 22.0,
            "baseline_perplexity": 20.0,
            "kl": 0.1,
            "top1": 1.0,
            "tokens": 100,
        },
        {
            "bits_per_element": 4.5,
            "perplexity": 10.0,
            "baseline_perplexity": 10.0,
            "kl": 0.0,
            "top1": 0.5,
            "tokens": 300,
        },
    ]
    score = quality.combine(parts)
    assert score["perplexity_increase_percent"] == pytest.approx(100 * (1.1**0.25 - 1))
    assert (score["kl"], score["top1"], score["tokens"]) == (pytest.approx(0.025), 0.625, 400)
