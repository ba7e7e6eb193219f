"""Run diffusers' train_dreambooth_lora.py unchanged and write down when its phases and steps ended.

Usage: peer_runner.py PEER_SCRIPT TIMES_JSON [the peer's own arguments ...]

The peer's progress bars are told of every optimizer step and of every batch of class images; they are
timed. Where torchvision has no build for the installed torch (CPU machines), a stand-in of the five image
transforms that the script names is put in its place, made of Pillow and torch: they run in the data loader,
and are a small part of a step.
"""

from __future__ import annotations

import enum
import importlib.util
import itertools
import json
import random
import resource
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def _resize(size: int, interpolation: Any = None) -> Any:  # noqa: ARG001 - torchvision's signature
    def apply(image: Image.Image) -> Image.Image:
        scale = size / min(image.size)
        return image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
        )

    return apply


def _crop(size: int, *, center: bool) -> Any:
    def apply(image: Image.Image) -> Image.Image:
        left = (image.width - size) // 2 if center else random.randint(0, image.width - size)
        top = (image.height - size) // 2 if center else random.randint(0, image.height - size)
        return image.crop((left, top, left + size, top + size))

    return apply


def _compose(parts: list[Any]) -> Any:
    def apply(value: Any) -> Any:
        for part in parts:
            value = part(value)
        return value

    return apply


def _torchvision_stand_in() -> None:
    transforms = types.ModuleType("torchvision.transforms")
    transforms.InterpolationMode = _InterpolationMode  # type: ignore[attr-defined]
    transforms.Resize = _resize  # type: ignore[attr-defined]
    transforms.CenterCrop = lambda size: _crop(size, center=True)  # type: ignore[attr-defined]
    transforms.RandomCrop = lambda size: _crop(size, center=False)  # type: ignore[attr-defined]
    transforms.ToTensor = lambda: (
        lambda image: (  # type: ignore[attr-defined]
            torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
        )
    )
    transforms.Normalize = lambda mean, std: lambda x: (x - mean[0]) / std[0]  # type: ignore[attr-defined]
    transforms.Compose = _compose  # type: ignore[attr-defined]
    package = types.ModuleType("torchvision")
    package.transforms = transforms  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("torchvision", loader=None)
    sys.modules["torchvision"] = package
    sys.modules["torchvision.transforms"] = transforms


def main() -> None:
    """Run the peer under a timing progress bar."""
    began_s = time.perf_counter()
    script, times_json = Path(sys.argv[1]), Path(sys.argv[2])
    import diffusers  # noqa: F401  (before the stand-in, so that it sees torchvision as it is)
    import transformers  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import AutoTokenizer, PretrainedConfig  # noqa: F401

    stand_in = importlib.util.find_spec("torchvision") is None
    if stand_in:
        _torchvision_stand_in()
    import tqdm.auto

    ended_s: list[float] = []
    class_images_s: list[float] = []

    class TimedBar(tqdm.auto.tqdm):  # type: ignore[type-arg,misc]
        def __iter__(self) -> Any:
            began = time.perf_counter()
            yield from super().__iter__()
            if self.desc and self.desc.startswith("Generating class images"):
                class_images_s.append(time.perf_counter() - began)

        def update(self, n: float | None = 1) -> bool | None:
            if self.desc and self.desc.startswith("Steps"):
                ended_s.append(time.perf_counter())
            return super().update(n)

    tqdm.auto.tqdm = TimedBar
    sys.argv = [str(script), *sys.argv[3:]]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        facts = {
            "step_s": [b - a for a, b in itertools.pairwise(ended_s)],
            "class_images_s": sum(class_images_s),
            "training_s": ended_s[-1] - ended_s[0] if ended_s else None,
            "total_s": time.perf_counter() - began_s,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "torchvision_stand_in": stand_in,
        }
        times_json.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
