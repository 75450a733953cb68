"""Several runs side by side: what differs in their configs, their scores, and their curves in one figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime import config
from ..runtime.errors import UserError
from ..runtime.run_folder import is_run
from .figure import plt, save_figure

# The metric that chooses the best checkpoint, in percent: the first of these that a run's evaluations have.
SCORES = ("top1", "mask_ap", "box_ap", "miou", "NDS")


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values: {"optimizer.lr": 1e-3, …}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value.__name__ if isinstance(value, type) else value
    return flat


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's settings, log and scores from its folder.

    Returns name, model, settings (dotted keys), train and val (the lines of log.jsonl), score (a metric's name, None
    before the first evaluation), best and last (of the score, in percent, of the better of the weights and their
    average), step (of the best), seconds of training. Raises UserError if the folder is not a run's.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is not a run's folder: give folders that `saccade train` has made")
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    settings = config.load(folder)
    val = [line for line in lines if line["kind"] == "val"]
    score = next((name for name in SCORES if val and name in val[-1]), None)

    def value(line: dict) -> float:
        scores = [line[key] for key in (score, f"ema_{score}") if line.get(key) is not None]
        return max(scores, default=float("-inf"))

    best = max(val, key=value) if score else None
    train = [line for line in lines if line["kind"] == "train"]
    return dict(
        name=folder.name,
        model=settings["model"]["name"],
        settings=_flat(settings),
        train=train,
        val=val,
        score=score,
        best=value(best) if best else None,
        step=best["step"] if best else None,
        last=value(val[-1]) if best else None,
        seconds=train[-1].get("seconds") if train else None,
    )


def differences(runs: Sequence[dict]) -> dict[str, list[Any]]:
    """Return the config's keys that are not the same in all runs, each with its value in every run (None: not set)."""
    keys = list(dict.fromkeys(key for run in runs for key in run["settings"]))
    values = {key: [run["settings"].get(key) for run in runs] for key in keys}
    return {key: per_run for key, per_run in values.items() if any(value != per_run[0] for value in per_run)}


def plot_runs(runs: Sequence[dict], file: Path) -> Path:
    """Plot the training losses and the scores of runs over their steps; return the file (PNG)."""
    figure, (loss, score) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, run in enumerate(runs):
        color = plt.get_cmap("tab10")(i % 10)
        name = run["name"].replace("$", r"\$")
        loss.plot([r["step"] for r in run["train"]], [r["loss"] for r in run["train"]], color=color, label=name, lw=1)
        if run["score"]:
            rows = [r for r in run["val"] if r.get(run["score"]) is not None]
            label = f"{name} ({run['score']})"
            score.plot([r["step"] for r in rows], [r[run["score"]] for r in rows], ".-", color=color, label=label, lw=1)
    loss.set(title="training loss", xlabel="step", yscale="log")
    score.set(title="score on val (%)", xlabel="step")
    for axis in (loss, score):
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, file)
