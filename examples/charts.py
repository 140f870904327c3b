"""The table and the plot of quality.py: what a cache loses against the bits that an element
takes."""

import pathlib
from typing import Any

import numpy as np

Rows = dict[str, dict[str, float]]

TICKS = (2.5, 3, 3.5, 4, 4.5, 5, 6, 8.5)


def show(rows: Rows) -> None:
    print(
        f"{'cache':<16}{'bits/element':>14}{'perplexity':>12}{'KL':>12}{'99.9 %':>9}{'top-1':>9}{'tokens':>9}"
    )
    for name, row in rows.items():
        increase = f"{row['perplexity_increase_percent']:+.2f} %"
        print(
            f"{name:<16}{row['bits_per_element']:>14.3f}{increase:>12}{row['kl']:>12.5f}{row['kl_99.9']:>9.4f}{row['top1']:>9.4f}{row['tokens']:>9,}"
        )


def plot(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """KL and perplexity increase against bits per element, of each model that was measured."""
    import matplotlib.pyplot as plt  # optional: the extra `bench`

    figure, panels = plt.subplots(1, 2, figsize=(15, 7), layout="constrained")
    columns = {
        "kl": "KL divergence from fp32",
        "perplexity_increase_percent": "perplexity increase (%)",
    }
    for panel, (column, title) in zip(panels, columns.items(), strict=True):
        for data in runs:
            model = data["model"].removesuffix(".gguf")
            draw_points(panel, model, data.get("sweep", {}), column, "o")
            draw_points(panel, f"llama.cpp, {model}", data.get("llama_cpp", {}), column, "^")
        panel.set_xscale("log", base=2)
        panel.set_xticks(TICKS, labels=[str(tick) for tick in TICKS])
        panel.set(xlabel="bits per element, metadata included", ylabel=title)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_yscale("symlog", linthresh=0.1)
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_points(panel: Any, label: str, rows: Rows, column: str, marker: str) -> None:
    """Labelled points of one column; the unquantized caches would only stretch the axes."""
    shown = {
        name: (row["bits_per_element"], row[column])
        for name, row in rows.items()
        if row["bits_per_element"] < 16
    }
    if shown:
        panel.scatter(*zip(*shown.values(), strict=True), marker=marker, label=label)
    for name, point in shown.items():
        panel.annotate(
            name.removeprefix("llama.cpp "),
            point,
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7,
        )


def plot_sparse(found: list[dict[str, Any]], path: pathlib.Path) -> None:
    """KL against the bytes that a step reads, for every way of reading or keeping fewer pages."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(7 * len(found), 6), layout="constrained")
    for panel, model in zip(np.atleast_1d(panels), found, strict=True):
        rows = {name: row for name, row in model["rows"].items() if row["kl"] and row["bytes"]}
        most, ways = rows["all pages"]["bytes"], dict[str, list[tuple[float, float]]]()
        for name, row in rows.items():
            way = name.split(" 1/")[0]
            ways.setdefault(way, []).append((row["bytes"] / most, float(np.mean(row["kl"]))))
        colors = plt.get_cmap("tab20")
        for index, (way, points) in enumerate(ways.items()):
            line = "-o" if way == "top" else "--." if len(points) > 1 else "s"
            label = "best pages (top_pages)" if way == "top" else way
            panel.plot(*zip(*points, strict=True), line, label=label, color=colors(2 * index % 20))
        panel.set(title=f"{model['model'].split('.Q')[0]}, {model['tokens']:,} tokens")
        panel.set(xlabel="bytes read at a step, of those of all 4-bit pages")
        panel.set(ylabel="KL divergence from fp32", xscale="log", yscale="log")
        panel.set_xticks([0.125, 0.25, 0.5, 1], labels=["1/8", "1/4", "1/2", "1"])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
