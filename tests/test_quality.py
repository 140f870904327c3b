"""The examples' quality measurement: what its quick mode finds stays a little below these bounds, and it goes on where it stopped."""

from __future__ import annotations

import json
import pathlib

import pytest

for needed in ("gguf", "tokenizers", "tqdm"):
    pytest.importorskip(needed)

import quality  # noqa: E402

# KL divergence from fp32 and bits per element; the perplexity of 512 tokens says less than its noise.
BOUNDS = {"Q8": (1e-4, 8.5), "Q4": (0.0035, 4.5), "K4V2": (0.012, 3.5), "Q2": (0.045, 2.5)}


@pytest.mark.slow
def test_quick_mode_finds_no_worse_codes_than_before() -> None:
    sweep = quality.main(["--quick"])["sweep"]
    assert set(sweep) == set(BOUNDS)
    for name, (kl, bits) in BOUNDS.items():
        assert sweep[name]["kl"] <= kl, name
        assert sweep[name]["bits_per_element"] <= bits, name


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
        {"bits_per_element": 4.5, "perplexity": 22.0, "baseline_perplexity": 20.0, "kl": 0.1, "top1": 1.0, "tokens": 100},
        {"bits_per_element": 4.5, "perplexity": 10.0, "baseline_perplexity": 10.0, "kl": 0.0, "top1": 0.5, "tokens": 300},
    ]
    score = quality.combine(parts)
    assert score["perplexity_increase_percent"] == pytest.approx(100 * (1.1**0.25 - 1))
    assert (score["kl"], score["top1"], score["tokens"]) == (pytest.approx(0.025), 0.625, 400)
