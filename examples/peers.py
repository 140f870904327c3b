"""llama.cpp's quantized KV caches on given windows of tokens, against its own f16 cache; quality.py
runs it.

    python examples/peers.py MODEL.gguf windows.npy > scores.json

Flash attention is on, as quantized values need it; llama.cpp rotates quantized keys and values by
itself (LLAMA_ATTN_ROT_DISABLE=1 turns it off).
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings

# Name -> ggml type and bits per element: blocks of 32 with one or two 16-bit factors.
TYPES = {
    "f16": (llama_cpp.GGML_TYPE_F16, 16.0),
    "q8_0": (llama_cpp.GGML_TYPE_Q8_0, 8.5),
    "q4_1": (llama_cpp.GGML_TYPE_Q4_1, 5.0),
    "q4_0": (llama_cpp.GGML_TYPE_Q4_0, 4.5),
}

WORST = 32  # largest divergences that are kept, as in perplexity.py


def portable_params(default: Callable[[], Any] = bindings.llama_model_default_params) -> Any:
    """Weights as they are in the file: repacked for AMX, they crash on virtual machines that
    announce AMX and do not grant it."""
    params = default()
    params.use_extra_bufts = False
    return params


bindings.llama_model_default_params = portable_params  # `Llama` has no argument for it


def log_probabilities(model_path: str, kv_type: int, tokens: np.ndarray) -> np.ndarray:
    """What predicts the second half of tokens [S]: [S / 2, V]"""
    model = llama_cpp.Llama(
        model_path,
        n_ctx=len(tokens),
        logits_all=True,
        flash_attn=True,
        type_k=kv_type,
        type_v=kv_type,
        verbose=False,
    )
    model.eval(tokens.tolist())
    logits = np.array(model.scores[len(tokens) // 2 - 1 : len(tokens) - 1])
    model.close()
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def score(model_path: str, windows: np.ndarray) -> dict[str, dict[str, Any]]:
    """Scores of every type over windows [W, S]."""
    kept: dict[str, list[tuple[float, ...]]] = {name: [] for name in TYPES}
    worst: dict[str, list[float]] = {name: [] for name in TYPES}
    for number, tokens in enumerate(windows, 1):
        targets = tokens[len(tokens) // 2 :]
        pick = np.arange(len(targets)), targets
        exact = None
        for name, (kv_type, _) in TYPES.items():
            ours = log_probabilities(model_path, kv_type, tokens)
            exact = ours if exact is None else exact
            kl = (np.exp(exact) * (exact - ours)).sum(-1)
            worst[name] += kl.tolist()
            kept[name].append(
                (
                    ours[pick].mean(),
                    exact[pick].mean(),
                    kl.mean(),
                    (ours.argmax(-1) == exact.argmax(-1)).mean(),
                )
            )
        print(f"llama.cpp: {number} of {len(windows)} windows", file=sys.stderr, flush=True)
    return {
        name: summary(TYPES[name][1], np.mean(rows, axis=0), windows.size // 2)
        | {"kl_worst": sorted(worst[name], reverse=True)[:WORST]}
        for name, rows in kept.items()
    }


def summary(bits: float, means: np.ndarray, num_scored: int) -> dict[str, float]:
    ours, exact, kl, top1 = means.tolist()
    return {
        "bits_per_element": bits,
        "perplexity": float(np.exp(-ours)),
        "baseline_perplexity": float(np.exp(-exact)),
        "kl": kl,
        "top1": top1,
        "tokens": num_scored,
    }


if __name__ == "__main__":
    print(json.dumps(score(sys.argv[1], np.load(sys.argv[2]))))
