"""nuScenes' detection metric (arXiv 1903.11027): average precision by the distance of centres, five errors of the
matches, and their sum, the nuScenes detection score. As nuscenes-devkit computes it, on boxes in the view's frame.

A box is (x, y, z of its middle, length, width, height, yaw, velocity x, y).
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray
from torch import Tensor

from ..data.bev_frames import ATTRIBUTES, RANGES, attribute
from ..runtime.distributed import all_gather_object

ERRORS = dict(mATE="trans_err", mASE="scale_err", mAOE="orient_err", mAVE="vel_err", mAAE="attr_err")
NONE = dict(
    traffic_cone=("attr_err", "vel_err", "orient_err"), barrier=("attr_err", "vel_err")
)  # not defined for these
DISTANCES, FOR_ERRORS, MIN_RECALL, MIN_PRECISION = (0.5, 1.0, 2.0, 4.0), 2.0, 0.1, 0.1
STEPS = np.linspace(0, 1, 101)  # of recall
FIRST = round(100 * MIN_RECALL) + 1


class NuScenesMetric:
    """Every process adds its own samples, `result` gathers them."""

    def __init__(self, class_names: Sequence[str]):
        self.class_names = list(class_names)
        self.samples: dict[int, tuple[ndarray, ...]] = {}

    def update(
        self,
        index: int,
        predicted: tuple[Tensor, Tensor, Tensor],
        boxes: Tensor,
        labels: Tensor,
        attributes: Tensor | None = None,
    ) -> None:
        """Add sample `index` of the split: predicted (boxes (n, 9), scores (n,), labels (n,)), and the ground truth:
        boxes (m, 9), labels (m,), attributes (m,), numbers in ATTRIBUTES, -1: none."""
        arrays = [t.detach().cpu().numpy().astype(np.float64) for t in (*predicted, boxes, labels)]
        kinds = np.full(len(boxes), -1.0) if attributes is None else attributes.cpu().numpy().astype(np.float64)
        self.samples[int(index)] = (*arrays, kinds)

    def gathered(self) -> list[tuple[ndarray, ...]]:
        """Return the samples of all processes, in the split's order; one that several have counts once."""
        whole = {index: sample for part in all_gather_object(self.samples) for index, sample in part.items()}
        return [whole[index] for index in sorted(whole)]

    def result(self) -> tuple[dict[str, float], dict]:
        """Return (mAP, of all distances and at each, and NDS in percent, mean errors as nuScenes names them, images;
        detail: per class `ap` and `errors`, and the curves: precision at 101 recalls at each distance).

        Without a true box in any sample the metrics are NaN.
        """
        samples = self.gathered()
        detail, table = {}, []
        for label, name in enumerate(self.class_names):
            curves = {d: accumulate(samples, label, name, d) for d in DISTANCES}
            ap = {d: average_precision(curve) for d, curve in curves.items()}
            errors = {
                short: np.nan if kind in NONE.get(name, ()) else error(curves[FOR_ERRORS], kind)
                for short, kind in ERRORS.items()
            }
            table.append((*ap.values(), *errors.values()))
            precision = {str(d): curve["precision"].tolist() for d, curve in curves.items()}
            detail[name] = dict(ap={str(d): 100 * v for d, v in ap.items()}, errors=errors, precision=precision)
        table = np.array(table)
        aps, errors = table[:, :4], table[:, 4:]
        mean_errors = [float(np.mean(e[~np.isnan(e)])) if (~np.isnan(e)).any() else 1.0 for e in errors.T]
        score = (5 * aps.mean() + sum(max(0.0, 1 - e) for e in mean_errors)) / 10
        metrics = dict(mAP=100 * float(aps.mean()), NDS=100 * float(score))
        metrics |= {f"mAP_{d:g}m": 100 * float(ap) for d, ap in zip(DISTANCES, aps.mean(0))}
        metrics |= dict(zip(ERRORS, mean_errors))
        if not any(len(truth) for *_, truth, _ in samples):
            metrics = dict.fromkeys(metrics, float("nan"))
        return metrics | dict(images=len(samples)), detail


def accumulate(samples: Sequence[tuple[ndarray, ...]], label: int, name: str, distance: float) -> dict[str, ndarray]:
    """Match predicted boxes to the true ones, best scores first, each to the nearest that is left within `distance`.

    Returns precision and confidence at 101 recalls, and there the mean errors of the matches so far.
    """
    far = RANGES.get(name, max(RANGES.values()))
    kept, there, kinds = [], [], []
    for i, (predicted, scores, labels, boxes, truth, attributes) in enumerate(samples):
        mine = (labels == label) & (np.hypot(*predicted[:, :2].T) < far)
        kept += [(score, i, box) for score, box in zip(scores[mine], predicted[mine])]
        own = (truth == label) & (np.hypot(*boxes[:, :2].T) < far)
        there.append(boxes[own])
        kinds.append(attributes[own])
    count = sum(map(len, there))
    order = np.argsort([score for score, _, _ in kept], kind="stable")[::-1]  # of equal scores, the later one first
    taken = [np.zeros(len(boxes), bool) for boxes in there]
    hits, confidence, matched = [], [], []
    for place in order:
        score, i, box = kept[place]
        away = np.where(taken[i], np.inf, np.hypot(*(there[i][:, :2] - box[:2]).T))
        nearest = int(away.argmin()) if len(away) else -1
        hit = nearest >= 0 and away[nearest] < distance
        hits.append(hit)
        confidence.append(score)
        if hit:
            taken[i][nearest] = True
            matched.append((score, *errors_of(box, there[i][nearest], kinds[i][nearest], name)))
    if not matched:
        return dict(precision=np.zeros(101), confidence=np.zeros(101)) | {
            kind: np.ones(101) for kind in ERRORS.values()
        }
    hits = np.cumsum(hits)
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / count
    curve = dict(
        precision=np.interp(STEPS, recall, precision, right=0),
        confidence=np.interp(STEPS, recall, confidence, right=0),
    )
    scores, *errors = np.array(matched).T
    for kind, values in zip(ERRORS.values(), errors):
        so_far = running_mean(values)
        curve[kind] = np.interp(curve["confidence"][::-1], scores[::-1], so_far[::-1])[::-1]
    return curve


def errors_of(box: ndarray, truth: ndarray, kind: float, name: str) -> tuple[float, ...]:
    """Return, in ERRORS' order: metres, 1 - IoU of the sizes, radians, m/s, and whether the attribute is wrong."""
    least = np.minimum(box[3:6], truth[3:6]).prod()
    overlap = least / (box[3:6].prod() + truth[3:6].prod() - least)
    period = np.pi if name == "barrier" else 2 * np.pi  # a barrier has no front
    turned = abs((truth[6] - box[6] + period / 2) % period - period / 2)
    wrong = np.nan
    if kind >= 0:
        wrong = float(attribute(name, float(np.hypot(*box[7:9]))) != ATTRIBUTES[int(kind)])
    away = np.hypot(*(box[:2] - truth[:2]))
    return away, 1 - overlap, turned, np.hypot(*(box[7:9] - truth[7:9])), wrong


def running_mean(values: ndarray) -> ndarray:
    """Return the mean of all so far that are not NaN; 1 where none is at all, 0 before the first."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    count = np.cumsum(known)
    return np.divide(np.nancumsum(values), count, out=np.zeros(len(values)), where=count > 0)


def average_precision(curve: dict[str, ndarray]) -> float:
    return float((curve["precision"][FIRST:] - MIN_PRECISION).clip(0).mean() / (1 - MIN_PRECISION))


def error(curve: dict[str, ndarray], kind: str) -> float:
    """Return the mean from the least recall that counts to the largest that was reached."""
    reached = np.flatnonzero(curve["confidence"])
    last = reached[-1] if len(reached) else 0
    return float(curve[kind][FIRST : last + 1].mean()) if last >= FIRST else 1.0
