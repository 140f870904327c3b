"""What each cache costs in quality on a model: a sweep over codecs, and four harder questions.

    python examples/quality.py --tokens 16384            # writes results/quality.json and .png; a rerun adds what is missing
    python examples/quality.py --model qwen2.5-0.5b.gguf --tokens 8192    # a file of its own; SmolLM2-135M is the default
    python examples/quality.py --quick                   # a few caches on two short windows; fails if one has become worse
    python examples/quality.py --peers --python .venv/bin/python    # llama.cpp's KV types on the same windows, too

The sweep scores windows of two texts, prose and technical, as perplexity.py does. The harder
questions are in probes.py (a model with a key bias, greedy decoding, a hidden passkey) and peers.py
(llama.cpp). The plot needs matplotlib, which is in the extra `bench`.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import gguf_model
import jax
import llama
import numpy as np
import perplexity
import probes
from charts import plot, show
from texts import TEXTS, read_text
from tqdm import tqdm

import jaxkv
from jaxkv import Precision, QuantSpec

RESULTS = pathlib.Path(__file__).parent / "benchmarks" / "results" / "quality.json"
SECTIONS = ("sweep", "bias", "greedy", "passkey")
TAIL = 128
PART = 4  # windows that are read at once, scored and saved
QUICK = {"Q8": (1e-4, 8.5), "Q4": (0.0035, 4.5), "K4V2": (0.012, 3.5), "Q2": (0.045, 2.5)}
"""What --quick reads, with bounds a little above what was measured: KL and bits an element.
Perplexity says less at 512 tokens."""
CACHES_OF_BIAS = ("Q4", "FP16", "K8V4", "Q4_PLAIN64", "Q4_BIAS")


def pair(bits: int, group_size: int, **flags: Any) -> dict[str, Any]:
    """The same recipe for keys and values."""
    return {
        "key_quant": QuantSpec(bits, group_size, **flags),
        "value_quant": QuantSpec(bits, group_size, **flags),
    }


def named_caches(model: llama.LlamaConfig, max_tokens: int) -> dict[str, jaxkv.KvCacheConfig]:
    """Every cache that is measured: the presets, and what they were chosen over."""
    shape = {
        "max_tokens": max_tokens,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rotary": model.rotary,
    }
    sinks = {"sink_tokens": 64}
    aligned, fine = (QuantSpec(4, group, rotate=True, align=True) for group in (64, 32))
    others: dict[str, dict[str, Any]] = {
        "Q4_NO_ROTARY": {"rotary": None},
        "Q4_TAIL0": {"tail_length": 0},
        "K8V4": {"key_quant": QuantSpec(8, 64), "value_quant": aligned},
        "K4G32_V4": {"key_quant": fine, "value_quant": aligned} | sinks,
        "K3V3": {"store_precision": Precision.Q3} | sinks,
        "Q2_G32": pair(2, 32, rotate=True, align=True) | sinks,
        "Q4_ROTATED": pair(4, 64, rotate=True),
        "Q4_PLAIN64": pair(4, 64),
        "Q4_PLAIN32": pair(4, 32),
        "Q4_TOKEN": pair(4, model.num_kv_heads * model.head_dim),
        "Q4_SYMMETRIC": pair(4, 64, rotate=True, symmetric=True),
        "KIVI2_SINKS": jaxkv.PRESETS["KIVI2"][0] | sinks,
        "BF16": {"tail_precision": Precision.BF16, "store_precision": Precision.BF16},
    }
    fields = {name: values for name, (values, _) in jaxkv.PRESETS.items()} | others
    return {
        name: jaxkv.KvCacheConfig(**{"tail_length": TAIL} | shape | values)
        for name, values in fields.items()
    }


class Results:
    """A JSON file of sections, written after every measurement; what it holds is not measured
    again."""

    def __init__(self, path: pathlib.Path | None, header: dict[str, Any], fresh: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {}
        if path and path.exists() and not fresh:
            self.data = json.loads(path.read_text())
            for name in ("window", "chunk"):
                if self.data[name] != header[name]:
                    raise ValueError(
                        f"{path} was measured with {name}={self.data[name]}: give another --out, "
                        "or --fresh"
                    )
        self.data.update(header)

    def once(self, section: str, name: str, measure: Callable[[], Any]) -> Any:
        held = self.data.setdefault(section, {})
        if name not in held:
            held[name] = measure()
            self.save()
        return held[name]

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(unfinished, self.path)


def read_parts(model: gguf_model.Model, num_scored: int, length: int) -> dict[str, np.ndarray]:
    """Both texts in parts of up to `PART` windows [PART, length], in turns: "prose 0", "technical
    0", "prose 1", ..."""
    halves = []
    for name in TEXTS:
        windows = perplexity.cut_windows(
            model.encode(read_text(name)), num_scored // 2, length, model.start_token
        )
        halves.append(
            [
                (f"{name} {i}", part)
                for i, part in enumerate(np.split(windows, range(PART, len(windows), PART)))
            ]
        )
    return dict(part for turn in zip(*halves, strict=True) for part in turn)


def sweep(
    model: llama.LlamaConfig,
    params: llama.Params,
    caches: dict[str, jaxkv.KvCacheConfig],
    parts: dict[str, np.ndarray],
    results: Results,
    chunk: int,
) -> None:
    """Scores every cache on every part: all of them on the first part of both texts, then on the
    second, ..."""
    reading = {"chunk": chunk, "batch_size": PART}

    @functools.cache
    def baseline(part: str) -> np.ndarray:
        exact = perplexity.fp32_config(model, parts[part].shape[1])
        return perplexity.read_windows(model, params, exact, parts[part], **reading)

    def measure(name: str, part: str) -> dict[str, float]:
        return perplexity.evaluate(
            model, params, caches[name], parts[part], baseline(part), **reading
        )

    rounds = [list(parts)[i : i + len(TEXTS)] for i in range(0, len(parts), len(TEXTS))]
    jobs = [(name, part) for parts_of_round in rounds for name in caches for part in parts_of_round]
    for name, part in tqdm(jobs, "sweep", unit="read"):
        results.once("parts", f"{name}, {part}", lambda name=name, part=part: measure(name, part))
        summarize(results, "sweep", name)


def summarize(results: Results, section: str, name: str) -> None:
    """The mean of what a cache has scored so far."""
    scores = [score for key, score in results.data["parts"].items() if key.startswith(f"{name}, ")]
    results.data.setdefault(section, {})[name] = combine(scores)
    results.save()


def combine(scores: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of several parts as those of one text."""
    tokens = sum(score["tokens"] for score in scores)

    def mean(value: Callable[[dict[str, float]], float]) -> float:
        return sum(value(score) * score["tokens"] for score in scores) / tokens

    loss, baseline = (
        mean(lambda s: math.log(s["perplexity"])),
        mean(lambda s: math.log(s["baseline_perplexity"])),
    )
    worst = sorted((kl for score in scores for kl in score.get("kl_worst", [])), reverse=True)
    return {
        "bits_per_element": scores[0]["bits_per_element"],
        "perplexity_increase_percent": 100 * math.expm1(loss - baseline),
        "kl": mean(lambda s: s["kl"]),
        "kl_99.9": perplexity.high_quantile(worst, tokens) if worst else math.nan,
        "top1": mean(lambda s: s["top1"]),
        "tokens": tokens,
    }


def measure_peers(
    python: str, model: pathlib.Path, parts: dict[str, np.ndarray], results: Results
) -> None:
    """llama.cpp's KV types on the same windows, by the interpreter that has llama-cpp-python."""
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        print(
            f"llama.cpp is left out: {python} cannot import llama_cpp; give the interpreter that "
            "can with --python",
            file=sys.stderr,
        )
        return
    for part, windows in tqdm(parts.items(), "llama.cpp", unit="part"):
        scores = results.once(
            "llama_cpp_parts", part, lambda windows=windows: run_peers(python, model, windows)
        )
        for name, score in scores.items():
            results.once("parts", f"llama.cpp {name}, {part}", lambda score=score: score)
            summarize(results, "llama_cpp", f"llama.cpp {name}")


def run_peers(python: str, model: pathlib.Path, windows: np.ndarray) -> dict[str, dict[str, float]]:
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, windows)
        file.flush()
        command = [python, pathlib.Path(__file__).with_name("peers.py"), model, file.name]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="which to measure; the order is this one"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="how many the sweep scores")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=64, help="tokens appended at once")
    parser.add_argument("--only", metavar="NAMES", help="caches of the sweep, as Q4,Q2")
    parser.add_argument("--trials", type=int, default=32, help="passkeys to hide")
    parser.add_argument("--peers", action="store_true", help="llama.cpp as well")
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter that has llama-cpp-python"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="JSON file to write or to go on with; the plot lies beside it",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{', '.join(QUICK)} on 512 tokens; writes no file unless --out is given",
    )
    gguf_model.add_model_option(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.window, args.sections, args.only = (
            512,
            512,
            "sweep",
            args.only or ",".join(QUICK),
        )
    elif args.out is None:
        suffix = "" if args.model is None else f"_{args.model.stem}"
        args.out = RESULTS.with_stem(RESULTS.stem + suffix)
    return args


def measure(args: argparse.Namespace, results: Results) -> None:
    loaded = gguf_model.load(args.model, stacked=True)
    model, params = loaded.config, loaded.stacked
    caches, parts, wanted = (
        named_caches(model, args.window),
        read_parts(loaded, args.tokens, args.window),
        args.sections.split(","),
    )
    names = args.only.split(",") if args.only else caches
    first_parts = list(parts.values())[: len(TEXTS)]
    if "sweep" in wanted:
        sweep(model, params, {name: caches[name] for name in names}, parts, results, args.chunk)
    if args.peers:
        measure_peers(args.python, loaded.path, parts, results)
    if "bias" in wanted:
        biased, windows = (
            {name: caches[name] for name in CACHES_OF_BIAS},
            np.stack([part[0] for part in first_parts]),
        )
        probes.measure_bias(model, params, biased, windows, results.once, args.chunk)
    if "greedy" in wanted:
        prompts = np.concatenate([part[:, : args.window // 4] for part in first_parts])
        probes.measure_greedy(
            model, params, {name: caches[name] for name in jaxkv.PRESETS}, prompts, results.once
        )
    if "passkey" in wanted:
        probes.measure_passkey(
            loaded,
            lambda length: named_caches(model, length)["Q4"],
            args.trials,
            results.once,
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_options(argv)
    named = f" --model {args.model.name}" if args.model else ""
    header = {
        "command": f"python examples/quality.py{named} --tokens {args.tokens} --chunk {args.chunk}{' --peers' if args.peers else ''}",
        "device": device_name(),
        "jax": jax.__version__,
        "model": gguf_model.load(args.model, stacked=True).path.name,
        "tail": TAIL,
        **{name: getattr(args, name) for name in ("tokens", "window", "chunk")},
    }
    results = Results(args.out, header, args.fresh)
    measure(args, results)
    show(results.data.get("sweep", {}) | results.data.get("llama_cpp", {}))
    if args.quick:
        check_quick(results.data["sweep"])
    else:
        runs = sorted({args.out, *args.out.parent.glob(f"{RESULTS.stem}*.json")})
        plot([json.loads(path.read_text()) for path in runs], args.out.with_name("quality.png"))
    return results.data


def check_quick(sweep: dict[str, dict[str, float]]) -> None:
    """Refuses codes that have become worse."""
    for name, score in sweep.items():
        kl, bits = QUICK.get(name, (math.inf, math.inf))
        if not (score["kl"] <= kl and score["bits_per_element"] <= bits):  # NaN is neither
            sys.exit(
                f"{name}: KL {score['kl']:.5f} at {score['bits_per_element']} bits; expected at "
                f"most {kl} at {bits}"
            )


def device_name() -> str:
    """The processor's own name where JAX says only "cpu"."""
    kind = jax.devices()[0].device_kind
    info = pathlib.Path("/proc/cpuinfo")
    if kind != "cpu" or not info.exists():
        return kind
    models = [
        line.split(":")[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0]}, {len(models)} threads" if models else kind


if __name__ == "__main__":
    main()
