"""Plot docs/results/summary_cpu.png: the speed-up of each model over its peer, from the measurements in that folder.

    python tools/plot_results.py

The measurements are written by tools/benchmark.py.
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


def main() -> None:
    if len(sys.argv) > 1:
        print(__doc__)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speedups = read_speedups()
    figure, axis = plt.subplots(figsize=(9, 0.34 * len(speedups) + 1.2), layout="constrained")
    for mode, offset, color in (("inference", 0.2, "#2a6fbb"), ("training", -0.2, "#e07b39")):
        rows = [(i + offset, row[mode]) for i, row in enumerate(speedups.values()) if mode in row]
        places, values = zip(*rows)
        bars = axis.barh(places, values, height=0.38, color=color, label=mode)
        axis.bar_label(bars, fmt="%.2f×", fontsize=7, padding=2)
    axis.axvline(1, color="#333333", lw=0.8)
    axis.set_yticks(range(len(speedups)), speedups, fontsize=8)
    axis.set(xlabel="times as fast, fp32, two CPU cores", xlim=(0, 5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(RESULTS / "summary_cpu.png", dpi=130)
    print(f"wrote {RESULTS / 'summary_cpu.png'}")


if __name__ == "__main__":
    main()
