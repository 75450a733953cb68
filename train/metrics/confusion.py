"""What a confusion count says of the classes: their accuracy, and which are taken for which."""

import csv
import io

import torch
from torch import Tensor


def per_class(confusion: Tensor, names: list[str]) -> list[dict]:
    """For each class: class, images, right, top1 (percent; None without images), taken_for and times.

    confusion: counts (true class, predicted). taken_for: what its other images were most often called, None if none.
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
    """The pairs with most mistakes: true, predicted, images; fewer than `most` where there are fewer."""
    wrong = confusion.cpu().clone().fill_diagonal_(0).flatten()
    order = torch.argsort(wrong, descending=True, stable=True)[:most].tolist()
    return [
        dict(true=names[place // len(names)], predicted=names[place % len(names)], images=int(wrong[place]))
        for place in order
        if wrong[place]
    ]


def as_csv(rows: list[dict]) -> str:
    """The rows as a CSV file with a header; what is None is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def worst(rows: list[dict], most: int = 5) -> list[str]:
    """Lines for people: a table of the classes with the lowest accuracy that have any mistake."""
    failing = sorted((row for row in rows if row["times"]), key=lambda row: row["top1"])[:most]
    if not failing:
        return []
    width = max(len("worst classes"), *(len(row["class"]) for row in failing))
    lines = [f"  {'worst classes':{width}}  images    top1  most often taken for"]
    for row in failing:
        said = f"{row['taken_for']} ({row['times']} of {row['images']})"
        lines.append(f"  {row['class']:{width}}  {row['images']:6d}  {row['top1']:6.2f}  {said}")
    return lines
