"""A classifier of class, place and colour that measures the pocket base; it is not shipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from numpy.typing import NDArray
from torch import Tensor, nn

from lorabooth.pocket.dataset import batch_indices, pixels_of
from lorabooth.pocket.scenes import CLASSES, COLOURS, PLACES, Scene
from lorabooth.pocket.trainer import Hyper
from lorabooth.rng import generator_for

HEADS: dict[str, tuple[str, ...]] = {"class": CLASSES, "place": tuple(PLACES), "colour": tuple(COLOURS)}
HYPER = Hyper(lr=2e-3, warmup_steps=50, final_lr_ratio=0.02, weight_decay=0.02, ema_decay=0.995)
BATCH = 64


class Judge(nn.Module):
    """A small convolutional network with one head an attribute."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        before = 3
        for index, after in enumerate(widths):
            kernel, padding = (5, 2) if index == 0 else (3, 1)
            layers += [
                nn.Conv2d(before, after, kernel, stride=2, padding=padding),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
            layers += (
                [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()] if index else []
            )
            before = after
        self.trunk = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(16 * widths[-1], len(values)) for name, values in HEADS.items()}
        )

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Pictures [B,3,64,64] in [-1, 1] -> logits [B,K] a head."""
        features = self.dropout(self.trunk(x_BCHW).flatten(1))
        return {name: head(features) for name, head in self.heads.items()}


def attributes(scene: Scene) -> dict[str, str]:
    """The values that the judge should read from a scene's picture."""
    return {"class": scene.specimen.class_name, "place": scene.place, "colour": scene.specimen.colour}


def label_table(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Indices into `HEADS` values, int64 [N] a head; a pencil sketch has no colour: -100."""
    table: dict[str, Tensor] = {}
    for name, values in HEADS.items():
        found = [values.index(attributes(scene)[name]) for scene in scenes]
        if name == "colour":
            found = [-100 if s.style == "pencil sketch" else i for i, s in zip(found, scenes, strict=True)]
        table[name] = torch.tensor(found)
    return table


def _moved(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """All pictures shifted by up to four pixels and, every other time, mirrored."""
    top, left, mirror = torch.randint(0, 8, (3,), generator=generator).tolist()
    size = pixels_BCHW.shape[-1]
    moved = F.pad(pixels_BCHW, (4, 4, 4, 4), mode="reflect")[..., top : top + size, left : left + size]
    return moved.flip(-1) if mirror % 2 else moved


def judge_losses(
    judge: Judge, images: NDArray[np.uint8], labels: Mapping[str, Tensor], seed: int
) -> Callable[[int], Mapping[str, Tensor]]:
    """The losses of a step: cross-entropy of all heads on shifted, mirrored and slightly noisy pictures."""
    device = next(judge.parameters()).device

    def losses(step: int) -> Mapping[str, Tensor]:
        picks = batch_indices(seed, step, "judge", len(images), BATCH)
        generator = generator_for(seed, step, 0, "judge noise")
        pixels = _moved(pixels_of(images[picks], device), generator)
        noise = torch.randn(pixels.shape, generator=generator).to(device)
        strength = 0.12 * torch.rand((len(picks), 1, 1, 1), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = judge(pixels + strength * noise)
        index = torch.from_numpy(picks)
        parts = {n: F.cross_entropy(logits[n].float(), labels[n][index].to(device)) for n in HEADS}
        return {"loss": sum(parts.values(), pixels.new_zeros(())), **parts}

    return losses


@torch.no_grad()
def judged(judge: Judge, pixels_NCHW: Tensor) -> dict[str, list[str]]:
    """What the judge reads from pictures in [-1, 1]: a value a picture and head."""
    device = next(judge.parameters()).device
    logits = [judge(part.to(device)) for part in torch.split(pixels_NCHW, 100)]
    return {
        name: [values[i] for part in logits for i in part[name].argmax(dim=1).tolist()]
        for name, values in HEADS.items()
    }


@dataclass(frozen=True, slots=True)
class Share:
    """A measured share with its 95 % Wilson interval.

    Attributes:
        right, total: counts.
        low, high: the interval's ends.
    """

    right: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself, in [0, 1]."""
        return self.right / self.total


def share(right: int, total: int) -> Share:
    """The share `right` of `total` with the Wilson score interval (Wilson 1927) at 95 %."""
    z, p = 1.959964, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * float(np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)))
    return Share(right, total, middle - reach, middle + reach)


def agreement(judge: Judge, pixels_NCHW: Tensor, scenes: Sequence[Scene]) -> dict[str, Share]:
    """How often the judge reads from each picture what its scene holds."""
    read = judged(judge, pixels_NCHW)
    return {
        name: share(
            sum(a == attributes(s)[name] for a, s in zip(read[name], scenes, strict=True)), len(scenes)
        )
        for name in HEADS
    }
