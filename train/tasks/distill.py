"""Sparsifiner's training (arXiv 2303.13755): a sparse student learns from its dense teacher, in two runs.

    phase "predictors"  only the mask predictors learn: their scores approximate the teacher's attention
    phase "sparse"      all other layers learn, from the labels, the teacher's logits and its patches' features

Each phase is a run of its own; the second begins with the weights of the first.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.weights import read_weights
from ..runtime.config import BelowOne, Fraction, NonNegative
from ..runtime.errors import UserError
from .classify import Classify

IMAGES = 168  # a GPU's share of the published batch, over which the reconstruction's squares were added up


def reconstruction_loss(connectivity: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """Return the squared distance between predicted scores and softmax attention, averaged over the layers.

    connectivity  per layer (B, heads, N-1, N): of a student's `distill(images, recon=True)`.
    attention     per layer (B, heads, N, N), the teacher's, whose row of the class token is left out since it is not
                  predicted. Or the student's own, as in the published self-distillation, which then gets gradients too.

    The sum is over images, heads, queries and keys, so it grows with the batch. Published weight: 0.01.
    """
    if len(connectivity) != len(attention) or not connectivity:
        raise ValueError(f"layers must be equally many, got {len(connectivity)} and {len(attention)}")
    terms = [(S - P[:, :, 1:]).square().sum() for S, P in zip(connectivity, attention)]
    return torch.stack(terms).mean()


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, features: Tensor, teacher_features: Tensor, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (KL(teacher ‖ student) of an image's classes, mean squared error of the patches' features).

    logits    (B, classes), of the student and of the teacher.
    features  (B, N-1, C), of both.
    alive     (B, N-1) bool, the patches that the student has not removed: no others count. None: all.

    No gradient goes to the teacher. Both in float32 at least. Published weights: 0.5 each, beside 1 for the labels.
    """
    full = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = logits.to(full).log_softmax(-1), teacher_logits.detach().to(full).log_softmax(-1)
    classes = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    error = (features.to(full) - teacher_features.detach().to(full)).square().mean(-1)
    if alive is None:
        return classes, error.mean()
    return classes, (error * alive).sum() / alive.sum()


class Distill(Classify):
    """A batch is that of Classify, whose arguments these are too; the model is a Sparsifiner.

    phase: see above. teacher: weights of the dense teacher, a file or a run's folder, for the second phase.
    reconstruction, logits, tokens: the weights of those terms, beside 1 for the labels', as published.
    """

    methods = ("distill",)

    def __init__(
        self,
        data: Any,
        /,
        phase: Literal["predictors", "sparse"],
        teacher: str | None = None,
        reconstruction: NonNegative = 0.01,
        logits: NonNegative = 0.5,
        tokens: NonNegative = 0.5,
        smoothing: BelowOne = 0.0,
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        mix_prob: Fraction = 1.0,
        switch_prob: Fraction = 0.5,
    ):
        super().__init__(data, smoothing, mixup, cutmix, mix_prob, switch_prob)
        if phase == "sparse" and teacher is None:
            raise UserError("task.teacher is missing: phase='sparse' needs the weights of the dense teacher")
        self.phase, self._teacher_weights = phase, teacher
        self._reconstruction, self._logits, self._tokens = reconstruction, logits, tokens

    def model(self, name: str, **kwargs: Any) -> nn.Module:
        net = super().model(name, **kwargs)
        if not hasattr(net, "distill"):
            raise UserError(f"task.type=Distill trains a Sparsifiner, and model.name={name} is none")
        self._student = {"name": name, **kwargs}
        return net

    def trained(self, model: nn.Module) -> nn.Module:
        """Return the student, whose forward pass returns the losses' inputs; other phases' parameters are frozen."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((".predictor." in name) == (self.phase == "predictors"))
        if self.phase == "sparse":
            # Attending to all keys, a Sparsifiner is the dense model whose weights it has.
            weights = read_weights(self._teacher_weights)
            arguments = self._student | dict(checkpoint=weights, new_head=False, token_keep_rate=1.0)
            teacher = super().model(**arguments)
            fits, order = self.match_head(weights)
            if not fits and order is None:
                raise UserError(
                    f"task.teacher={self._teacher_weights} is of other classes than the data's: give another"
                )
            if not fits:
                self._fit_head(teacher, order)
            self._teacher = teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
        return _Student(model, recon=self.phase == "predictors")

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = self.targets(batch)
        out = model(images)
        if self.phase == "predictors":
            # As only the predictors learn, the student's own attention is the teacher's.
            loss = reconstruction_loss(out.connectivity, [attention.detach() for attention in out.attention])
            return self._reconstruction * IMAGES / len(images) * loss, {}
        with torch.no_grad():
            teacher = self._teacher.distill(images, recon=True)
        labels = self.criterion(out.logits.float(), targets)
        logits, tokens = distillation_loss(out.logits, teacher.logits, out.features, teacher.features, out.alive)
        values = {"labels": labels.detach(), "logits": logits.detach(), "tokens": tokens.detach()}
        return labels + self._logits * logits + self._tokens * tokens, values


class _Student(nn.Module):
    """`Sparsifiner.distill` as a forward pass, which DistributedDataParallel requires."""

    def __init__(self, model: nn.Module, recon: bool):
        super().__init__()
        self.model, self.recon = model, recon

    def forward(self, images: Tensor) -> Any:
        return self.model.distill(images, self.recon)
