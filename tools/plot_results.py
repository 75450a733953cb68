"""Plot the measurements in docs/results: summary_cpu.png, each model's speed-up over its peer, and pareto_cpu.png.

    python tools/plot_results.py

pareto_cpu.png has the published accuracy against the measured CPU time. The measurements are written by
tools/benchmark.py and `tools/zoo.py --time`.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FILES = ("biformer_t_cpu", "halo_h1_cpu", "models_cpu", "sparse_and_plugins_cpu")


def read_speedups() -> dict[str, dict[str, float]]:
    """Return {model against peer: {inference, training: speed-up}} of the fp32 measurements."""
    speedups: dict[str, dict[str, float]] = {}
    for name in FILES:
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
            if row["dtype"] == "float32":
                peer = "published form" if row["peer"] == "published" else f"timm {row['peer']}"
                label = f"{row['model'].replace(',fuse', ', fused')} / {peer}"
                speedups.setdefault(label, {})[row["mode"]] = row["speedup"]
    return dict(sorted(speedups.items(), key=lambda item: item[1]["inference"]))


def plot_speedups(plt) -> Path:
    speedups = read_speedups()
    figure, axis = plt.subplots(figsize=(9, 0.34 * len(speedups) + 1.2), layout="constrained")
    for mode, offset, color in (("inference", 0.2, "#2a6fbb"), ("training", -0.2, "#e07b39")):
        rows = [(i + offset, row[mode]) for i, row in enumerate(speedups.values()) if mode in row]
        places, values = zip(*rows)
        bars = axis.barh(places, values, height=0.38, color=color, label=mode)
        axis.bar_label(bars, fmt="%.2f×", fontsize=7, padding=2)
    axis.axvline(1, color="#333333", lw=0.8)
    axis.set_yticks(range(len(speedups)), speedups, fontsize=8)
    axis.set(xlabel="times as fast, fp32, two CPU cores", xlim=(0, 7.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(RESULTS / "summary_cpu.png", dpi=130)
    return RESULTS / "summary_cpu.png"


def read_points() -> dict[str, dict[str, tuple[float, float]]]:
    """Return {family: {model: (CPU seconds of an image, published top-1)}} of models trained on ImageNet-1K alone."""
    import saccade.backbones  # noqa: F401  (registers the models)
    from saccade.backbones import catalog

    seconds = json.loads((RESULTS / "zoo_cpu.json").read_text(encoding="utf-8"))["cpu_seconds"]
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for family, names in catalog.families().items():
        for name in names:
            published = catalog.published(name)
            if published is not None and name in seconds and "pre-trained" not in published.source:
                title = (catalog.module_of(name).__doc__ or "").partition(":")[0]
                title = "Agent Attention" if family.endswith(".agent") else title
                points.setdefault(title, {})[name] = (seconds[name], published.top1)
    return points


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Return the models that no other beats in both time and accuracy, the fastest first."""
    front: list[str] = []
    for name, (_, top1) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or top1 > points[front[-1]][1]:
            front.append(name)
    return front


def plot_pareto(plt) -> Path:
    points = read_points()
    every = {name: point for models in points.values() for name, point in models.items()}
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    front = pareto(every)
    axis.plot(*zip(*(every[name] for name in front)), color="#bbbbbb", lw=1.2, zorder=1)
    for i, (title, models) in enumerate(sorted(points.items())):
        axis.scatter(*zip(*models.values()), s=26, color=plt.get_cmap("tab10")(i), label=title, zorder=2)
    for name in front:
        style = dict(
            xytext=(-3, 3), textcoords="offset points", fontsize=7, ha="right", rotation=-40, rotation_mode="anchor"
        )
        axis.annotate(name, every[name], **style)
    axis.margins(0.2, 0.2)
    axis.set(xscale="log", xlabel="CPU seconds of one image, fp32, one thread", ylabel="published ImageNet top-1, %")
    axis.grid(color="#eeeeee")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(RESULTS / "pareto_cpu.png", dpi=130)
    return RESULTS / "pareto_cpu.png"


def main() -> None:
    if len(sys.argv) > 1:
        print(__doc__)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = (RESULTS / "zoo_cpu.json").exists()
    for plot in (plot_speedups, plot_pareto) if measured else (plot_speedups,):
        print(f"wrote {plot(plt)}")


if __name__ == "__main__":
    main()
