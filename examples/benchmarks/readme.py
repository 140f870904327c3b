"""Writes README's measured tables from the results and the presets: what stands between `<!-- name
-->` and `<!-- /name -->`.

python examples/benchmarks/readme.py [--check]
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import sys
from typing import Any

import jaxkv
from jaxkv.stats import bytes_per_token

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "benchmarks" / "results"
SMALL = {"max_tokens": 4096, "num_kv_heads": 8, "head_dim": 128}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def presets() -> str:
    """Every preset with the size of a token in its store."""
    rows = []
    for name, (_, text) in jaxkv.PRESETS.items():
        config = jaxkv.preset(name, **SMALL)
        bits = (
            8
            * bytes_per_token(config, config.chain[-1])
            / (2 * config.num_kv_heads * config.head_dim)
        )
        rows.append([f"`{name}`", f"{bits:.3g}", text])
    return table(["preset", "bits/element, 128 a head", "when"], rows)


def quality(found: dict[str, Any]) -> str:
    """The sweep beside llama.cpp's cache types, and the harder questions as far as they were
    asked."""
    rows = [
        [
            name,
            f"{row['bits_per_element']:.2f}",
            f"{row['perplexity_increase_percent']:+.2f} %",
            f"{row['kl']:.5f}",
            f"{row['top1']:.4f}",
            f"{row['tokens']:,}",
        ]
        for name, row in (found["sweep"] | found.get("llama_cpp", {})).items()
    ]
    head = ["cache", "bits/element", "perplexity", "KL", "top-1", "tokens scored"]
    intro = f"{found['model'].removesuffix('.gguf')}, newest {found['tail']} tokens in fp16, against the fp32 cache on the same tokens "
    parts = [
        f"{intro}(`{found['command']}`; {found['device']}, jax {found['jax']}):",
        table(head, rows),
    ]
    parts += [
        write(found[name])
        for name, write in (("bias", bias), ("greedy", greedy), ("passkey", passkey))
        if found.get(name)
    ]
    return "\n\n".join(parts)


def models(found: list[dict[str, Any]]) -> str:
    """What each cache that several models were asked for loses, the worst model first."""
    common = set.intersection(*(set(results["sweep"]) for results in found))
    runs = sorted(found, key=lambda run: -sum(run["sweep"][name]["kl"] for name in common))
    asked = collections.Counter(name for results in runs for name in results["sweep"])
    names = [name for name, count in asked.items() if count > 1]
    rows = []
    for name in sorted(names, key=lambda name: -bits_of(runs, name)):
        scores = [results["sweep"].get(name) for results in runs]
        rows.append([f"`{name}`", f"{bits_of(runs, name):.2f}", *map(loss, scores)])
    labels = [results["model"].removesuffix(".gguf") for results in runs]
    picture = (
        "![KL and perplexity against bits per element](examples/benchmarks/results/quality.png)"
    )
    return f"{table(['cache', 'bits/element', *labels], rows)}\n\n{picture}"


def bits_of(runs: list[dict[str, Any]], name: str) -> float:
    """The most that an element of a cache takes in any model."""
    return max(run["sweep"][name]["bits_per_element"] for run in runs if name in run["sweep"])


def loss(row: dict[str, float] | None) -> str:
    """KL (its 99.9 % quantile), perplexity, top-1; tokens where they are fewer than 8,192."""
    if row is None:
        return ""
    few = f", {row['tokens']:,} tokens" if row["tokens"] < 8192 else ""
    worst = f" ({row['kl_99.9']:.3g})" if "kl_99.9" in row else ""
    return (
        f"{row['kl']:.5f}{worst}, "
        f"{row['perplexity_increase_percent']:+.2f} %, {row['top1']:.3f}{few}"
    )


def bias(found: dict[str, Any]) -> str:
    """KL of each cache in models with a key bias."""
    by_cache: dict[str, dict[str, float]] = {}
    for name, score in found.items():
        cache, case = name.split(", ")
        by_cache.setdefault(cache, {})[case] = score["kl"]
    cases = list(next(iter(by_cache.values())))
    rows = [[name, *(f"{scores[case]:.4f}" for case in cases)] for name, scores in by_cache.items()]
    intro = "KL with a key bias, as Qwen2 has one, of norm 50 and 500 in every third layer, after and before the rotary embedding:"
    outro = (
        "Before the embedding it is another model each time (perplexity 56 and 3,273, where "
        "unquantized fp16 loses 1.28 too). "
        "*Without it*: a bias that is known need not be cached. Subtract it from the keys, and "
        "where it was rotated give what it adds "
        "to the scores as `bias`."
    )
    return f"{intro}\n\n{table(['cache', *cases], rows)}\n\n{outro}"


def greedy(found: dict[str, Any]) -> str:
    tokens = "; ".join(
        f"{name} {row['median']:.0f} ({row['mean']:.0f})" for name, row in found.items()
    )
    prompts = len(next(iter(found.values()))["each"])
    return f"Greedy tokens, of 128, before the first unlike the fp32 cache's, median (mean) over {prompts} prompts: {tokens}."


def passkey(found: dict[str, Any]) -> str:
    counts = [
        sum(trial[name]["found"] for trial in found.values()) for name in ("FP32", "quantized")
    ]
    return (
        "A passkey hidden at eight depths of prompts of 1,536 to 7,168 tokens was found "
        f"{counts[1]} times of {len(found)} "
        f"with Q4, {counts[0]} times with fp32."
    )


def gpu(found: dict[str, Any]) -> str:
    """What a decode step compiles to."""
    rows = [
        [
            row["cache"],
            row["step"],
            row["migration"],
            row["implementation"],
            str(row["launches"]["a layer"]),
            str(row["cache_sized_copies"]),
            f"{row['temporaries_mb']:.1f} MB",
        ]
        for row in found["programs"]
    ]
    head = [
        "cache",
        "step",
        "migration",
        "by",
        "launches a layer",
        "cache-sized copies",
        "temporaries",
    ]
    return (
        f"Decode steps over {found['layers']} layers in a scan, {found['tokens']:,} tokens, "
        f"{found['query_heads']} query heads and "
        f"{found['kv_heads']} kv heads of {found['head_dim']}, compiled to machine code for "
        f"{found['device']} on a machine without one "
        f"(`{found['command']}`, jax {found['jax']}):\n\n{table(head, rows)}"
    )


def tpu(found: dict[str, Any]) -> str:
    """What steps compile to for a TPU."""
    rows = [
        [
            row["cache"],
            row["step"] + (f", {row['rows']} rows" if row["rows"] > 1 else ""),
            row["layers"],
            str(row["cache_sized_copies"]),
            f"{row['temporaries_mb']:.1f} MB",
            f"{row['cycles'] / found['num_layers'] / 1e3:,.0f}",
            f"{row['code_mb']:.1f} MB",
        ]
        for row in found["programs"].values()
    ]
    head = [
        "cache",
        "step",
        "layers",
        "cache-sized copies",
        "temporaries",
        "thousand cycles a layer",
        "code",
    ]
    return (
        f"{found['num_layers']} layers, {found['tokens']:,} tokens, {found['query_heads']} query "
        f"heads and {found['kv_heads']} kv heads of {found['head_dim']}, a prompt of "
        f"{found['prompt']} and a chunk of {found['chunk']}, compiled for a {found['device']} on a "
        f"machine without one (`{found['command']}`, jax {found['jax']}, libtpu "
        f"{found['libtpu']}; cycles are the compiler's estimates):\n\n{table(head, rows)}"
    )


def measured(found: dict[str, Any]) -> str:
    """Times on a GPU, by `gpu.py`."""
    names = ("cudnn", "torch", "bf16", "q8", "q4", "q2")

    def cell(row: dict[str, Any], name: str) -> str:
        times = f" ({row[name + '_speedup']:.2f})" if row.get(name + "_speedup") else ""
        return f"{row[name] * 1e6:.0f}{times}" if name in row else ""

    rows = [
        [
            row["model"],
            str(row["batch"]),
            f"{row['length']:,}",
            *(cell(row, name) for name in names),
        ]
        for row in found["attention"]
    ]
    shares = ", ".join(
        f"{mode} {step['append_share']:.0%}" for mode, step in found["decode_step"].items()
    )
    return (
        f"Microseconds of one attention on {found['device']} (`python "
        f"examples/benchmarks/gpu.py`, jax {found['jax']}), in brackets how "
        "many times as fast as the better peer; an append's share of a decode step at 32,768 "
        f"tokens: {shares}.\n\n"
        f"{table(['model', 'rows', 'tokens', *names], rows)}"
    )


def speed(found: dict[str, Any]) -> str:
    """Decode attention at the longest length that all systems were asked for, and what does not
    grow."""
    columns = {name: lengths["16384"] for name, lengths in found["attention_ms"].items()}
    names = next(iter(columns.values()))
    rows = [[name, *(cell(times, name) for times in columns.values())] for name in names]
    (small, large), (appends_small, appends_large) = (
        list(found["capacity_ms"][what].values()) for what in ("attend", "append")
    )
    long = {name: lengths["65536"] for name, lengths in found["attention_ms"].items()}
    q8 = cell(long["GQA 32/8/128"], "jaxkv Q8")
    return "\n\n".join(
        [
            "Milliseconds for the attention of one decoded token over 16,384 tokens (the 8 ragged "
            "rows: 4,096 to 16,384); query heads / kv "
            "heads / head dim as given; in brackets the ratio to torch's fastest bfloat16 "
            f"attention in the same run. {found['device']}, "
            f"{found['threads']} threads, jax {found['jax']} (`{found['command']}`):",
            table(["", *columns], rows),
            "Our caches have a JAX device for each core (below; `jaxkv.shards` in `shard_map`); "
            "one device is JAX's default.",
            "Q4 at 65,536 tokens: "
            + "; ".join(f"{name} {cell(times, 'jaxkv Q4')}" for name, times in long.items())
            + f". Q8: {q8}. "
            f"With 1,024 tokens held, a cache for 65,536 takes {large / small:.2f} times as long "
            "as one for 1,024; an append of one token "
            f"{appends_large / appends_small:.2f} times ({appends_large:.2f} ms). Attention's "
            "temporaries at 65,536 tokens: at most "
            f"{max(found['temporaries_mb'].values()):.1f} MB.",
            "An append of one token by mode of migration: "
            + "; ".join(
                f"{mode} {ms['mean']:.2f} ms on average, {ms['slowest']:.2f} at most"
                for mode, ms in found["append_ms"].items()
            )
            + ".",
            "![Time against context length](examples/benchmarks/results/cpu.png)",
        ]
    )


def cell(times: dict[str, float], name: str) -> str:
    ratio = (
        f" ({times[name] / times['torch bf16']:.2f})"
        if name in times and "torch bf16" in times
        else ""
    )
    return f"{times[name]:.2f}{ratio}" if name in times else ""


def sparse(found: list[dict[str, Any]]) -> str:
    """What each way of reading or keeping fewer pages loses, of several models."""

    def cell(model: dict[str, Any], name: str) -> list[str]:
        row = model["rows"].get(name)
        if row is None:
            return ["-", "-"]
        kl = f"{sum(row['kl']) / len(row['kl']):.3f}" if row["kl"] else "-"
        return [kl, f"{sum(row['found'])}/{len(row['found'])}" if row["found"] else "-"]

    names = [name for name in found[0]["rows"] if name != "fp32"]
    most = found[0]["rows"]["all pages"]["bytes"]
    head = ["read, or kept", "bytes read"]
    for model in found:
        short = model["model"].split(".Q")[0]
        head += [f"{short}: KL, {model['scored']} tokens", "passkeys"]
    rows = [
        [name, f"{found[0]['rows'][name]['bytes'] / most:.2f}"]
        + [text for model in found for text in cell(model, name)]
        for name in names
    ]
    return table(head, rows)


def sections() -> dict[str, str]:
    found = {"presets": presets()}
    for name, write, file in (
        ("quality", quality, "quality.json"),
        ("speed", speed, "cpu.json"),
        ("gpu", gpu, "gpu_compiled.json"),
        ("tpu", tpu, "tpu_compiled.json"),
    ):
        if (RESULTS / file).exists():
            found[name] = write(json.loads((RESULTS / file).read_text()))
    of_models = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("sparse_*.json"))]
    if of_models:
        found["sparse"] = sparse(of_models)
    swept = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("quality*.json"))]
    if swept := [results for results in swept if results.get("sweep")]:
        found["models"] = models(swept)
    on_gpus = [
        measured(json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu_nvidia*.json"))
    ]
    if on_gpus:
        found["gpu"] = "\n\n".join([found["gpu"]] * ("gpu" in found) + on_gpus)
    return found


def filled(readme: str) -> str:
    for name, text in sections().items():
        readme = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, text=text: f"{m[1]}{text}\n{m[2]}",
            readme,
            flags=re.S,
        )
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if README is out of date"
    )
    check, path = parser.parse_args().check, ROOT / "README.md"
    old = path.read_text()
    if check and filled(old) != old:
        sys.exit("README.md is out of date: python examples/benchmarks/readme.py")
    path.write_text(filled(old))


if __name__ == "__main__":
    main()
