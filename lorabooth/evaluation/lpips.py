"""LPIPS (arXiv 1801.03924): how different two images look, by the features of a network.

    d(a, b) = sum over layers l of  mean over h,w of  sum over channels c of  w_lc (y_lc(a) - y_lc(b))^2

where y_l are a network's feature maps, each position scaled to length 1 over its channels, and w_l >= 0 are
learned from people's judgements. `AlexLpips` is the published network (AlexNet, version 0.1, the paper's
forward metric); without its weights the same formula with w = 1 on another network's maps (the package's
`lpips=False`) still orders images by likeness, and is named as what it is.

Shape suffixes: B batch, C channels, H W positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorabooth.errors import BaseModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10
# Number in torchvision's alexnet().features -> stride, padding, and whether a 3x3 pooling comes before.
_CONVOLUTIONS = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}
# lpips.LPIPS(net="alex") cuts AlexNet into slices; the last number is torchvision's.
_SLICED = re.compile(r"net\.slice\d\.(\d+)\.(weight|bias)")
_PAIRS_AT_ONCE = 32
_PIXELS_AT_ONCE = 4_000_000

Features = Callable[[Sequence["Image"]], Sequence[Tensor]]


class AlexLpips(nn.Module):
    """AlexNet's convolutions and LPIPS's weights for each; as wide as the tensors it is made from.

    Args:
        tensors: `features.N.weight`, `features.N.bias` (N = 0, 3, 6, 8, 10) as torchvision's alexnet names
            them, and `linK.model.1.weight` [1,C,1,1] (K = 0..4) as the lpips package does. The names of a
            whole `lpips.LPIPS(net="alex").state_dict()` are understood too.

    Raises:
        ValueError: a tensor is missing or has a wrong shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        found = {_SLICED.sub(r"features.\1.\2", name): tensor for name, tensor in tensors.items()}
        names = [f"features.{n}.{part}" for n in _CONVOLUTIONS for part in ("weight", "bias")]
        names += [f"lin{k}.model.1.weight" for k in range(len(_CONVOLUTIONS))]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} for one")
        width = 3
        for k, n in enumerate(_CONVOLUTIONS):
            weight, bias, line = (
                found[name].detach().float()
                for name in (f"features.{n}.weight", f"features.{n}.bias", f"lin{k}.model.1.weight")
            )
            count = len(weight)
            if weight.ndim != 4 or weight.shape[1] != width or bias.shape != (count,):
                raise ValueError(f"features.{n} has the shape {list(weight.shape)}, {list(bias.shape)}")
            if line.numel() != count:
                raise ValueError(
                    f"lin{k}.model.1.weight has the shape {list(line.shape)}, not [1,{count},1,1]"
                )
            self.register_buffer(f"weight_{k}", weight)
            self.register_buffer(f"bias_{k}", bias)
            self.register_buffer(f"line_{k}", line.reshape(1, count, 1, 1))
            width = count
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Pixels in [-1, 1], sides of at least 63 px -> the five maps after the ReLUs."""
        x = (x_BCHW - self.get_buffer("shift")) / self.get_buffer("scale")
        maps = []
        for k, (stride, padding, pooled) in enumerate(_CONVOLUTIONS.values()):
            if pooled:
                x = F.max_pool2d(x, 3, 2)
            weight, bias = self.get_buffer(f"weight_{k}"), self.get_buffer(f"bias_{k}")
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            maps.append(x)
        return maps

    def lines(self) -> list[Tensor]:
        """The learned weights of the five layers, [1,C,1,1] each."""
        return [self.get_buffer(f"line_{k}") for k in range(len(_CONVOLUTIONS))]

    def forward(self, first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        """The distances [B] of pairs of images in [-1, 1]."""
        return formula(self.features(first_BCHW), self.features(second_BCHW), self.lines())


def formula(
    first: Sequence[Tensor], second: Sequence[Tensor], lines: Sequence[Tensor] | None = None
) -> Tensor:
    """LPIPS of two lists of feature maps [B,C,H,W], layer by layer; [B].

    Args:
        first: maps of the first images.
        second: of the second.
        lines: weights [1,C,1,1] of each layer; None: all 1.
    """
    total = torch.zeros(len(first[0]), device=first[0].device)
    for layer, (a, b) in enumerate(zip(first, second, strict=True)):
        squared = (_unit(a) - _unit(b)) ** 2
        if lines is not None:
            squared = squared * lines[layer]
        total = total + squared.sum(dim=1).mean(dim=(1, 2))
    return total


class MapDistance:
    """LPIPS's formula on the maps that a function takes from images.

    Args:
        name: what it is, for every output.
        features: images of one size -> maps, one tensor [B,C,H,W] per layer.
        lines: weights per layer; None: all 1.
    """

    def __init__(self, name: str, features: Features, lines: Sequence[Tensor] | None = None) -> None:
        self.name = name
        self._features = features
        self._lines = lines

    def __call__(self, first: Sequence[Image], second: Sequence[Image]) -> NDArray[np.float32]:
        """Distance of pair i, [N]; within a batch, an image that is in several pairs is looked at once."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} images against {len(second)}")
        size_px = first[0].size if first else (1, 1)
        step = max(1, min(_PAIRS_AT_ONCE, _PIXELS_AT_ONCE // (size_px[0] * size_px[1])))
        parts = [
            self._batch(first[start : start + step], second[start : start + step], size_px)
            for start in range(0, len(first), step)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    @torch.inference_mode()
    def _batch(
        self, first: Sequence[Image], second: Sequence[Image], size_px: tuple[int, int]
    ) -> NDArray[np.float32]:
        distinct = {id(image): image for image in (*first, *second)}
        place = {key: i for i, key in enumerate(distinct)}
        images = [i if i.size == size_px else i.convert("RGB").resize(size_px) for i in distinct.values()]
        maps = self._features(images)
        left, right = ([place[id(image)] for image in side] for side in (first, second))
        total = formula([m[left] for m in maps], [m[right] for m in maps], self._lines)
        return total.float().cpu().numpy()


def open_lpips(path: Path, device: torch.device) -> MapDistance:
    """The published LPIPS from a file, or from a folder with one file, of safetensors.

    Images are compared at their own size, as the lpips package does; a pair of different sizes at the size
    of the first image given.

    Raises:
        BaseModelError: no such file, or not these tensors.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise BaseModelError(f"{path.name}: {_not_one(path, len(files))}")
    try:
        network = AlexLpips(load_file(files[0])).to(device).eval()
    except (OSError, ValueError, SafetensorError) as error:
        text = first_line(error).replace(str(files[0]), files[0].name)
        raise BaseModelError(f"{path.name}: not the weights of LPIPS with AlexNet: {text}.") from error

    def features(images: Sequence[Image]) -> Sequence[Tensor]:
        return network.features(pixels(images).to(device))

    return MapDistance("LPIPS (AlexNet)", features, network.lines())


def pixels(images: Sequence[Image]) -> Tensor:
    """Images of one size -> float32 [B,3,H,W] in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _unit(x_BCHW: Tensor) -> Tensor:
    return x_BCHW / (x_BCHW.pow(2).sum(dim=1, keepdim=True).sqrt() + _EPSILON)


def _not_one(path: Path, count: int) -> str:
    if not path.exists():
        return "there is no such file or folder."
    return "this is no .safetensors file." if path.is_file() else f"{count} .safetensors files here, not one."
