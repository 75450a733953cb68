"""Shared by all plots: matplotlib without a display, the colors, and saving."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#2a6fbb", "#e07b39", "#8a8f98"


def save_figure(figure: plt.Figure, file: Path) -> Path:
    """Write a figure as PNG, close it, and return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
