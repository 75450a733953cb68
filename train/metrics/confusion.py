"""Tables from confusion counts: the accuracy of each class, and which classes are confused."""

import csv
import io

import torch
from torch import Tensor


def per_class(confusion: Tensor, names: list[str]) -> list[dict]:
    """Return a row per class: class, images, right, top1 (percent; None without images), taken_for and times.

    confusion: counts (true class, predicted). taken_for: the most frequent wrong prediction, None if there is none.
    """
    rows = []
    for i, (name, row) in enumerate(zip(names, confusion.cpu())):
        images, right = int(row.sum()), int(row[i])
        wrong = row.clone()
        wrong[i] = 0
        times, other = wrong.max(0)
        rows.append(
            dict(
                {"class": name},
                images=images,
                right=right,
                top1=100 * right / images if images else None,
                taken_for=names[int(other)] if times else None,
                times=int(times),
            )
        )
    return rows


def confused(confusion: Tensor, names: list[str], most: int = 20) -> list[dict]:
    """Return up to `most` pairs of classes with the most mistakes: true, predicted, images."""
    wrong = confusion.cpu().clone().fill_diagonal_(0).flatten()
    order = torch.argsort(wrong, descending=True, stable=True)[:most].tolist()
    return [
        dict(true=names[place // len(names)], predicted=names[place % len(names)], images=int(wrong[place]))
        for place in order
        if wrong[place]
    ]


def as_csv(rows: list[dict]) -> str:
    """Format rows as CSV with a header; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def worst(rows: list[dict], most: int = 5) -> list[str]:
    """Format a table of the classes with the lowest accuracy, without those that have no mistakes."""
    failing = sorted((row for row in rows if row["times"]), key=lambda row: row["top1"])[:most]
    if not failing:
        return []
    width = max(len("worst classes"), *(len(row["class"]) for row in failing))
    lines = [f"  {'worst classes':{width}}  images    top1  most often taken for"]
    for row in failing:
        taken_for = f"{row['taken_for']} ({row['times']} of {row['images']})"
        lines.append(f"  {row['class']:{width}}  {row['images']:6d}  {row['top1']:6.2f}  {taken_for}")
    return lines
