"""LPIPS equals a calculation by hand, convolution by convolution, on small random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import save_file

from lorabooth.errors import BaseModelError
from lorabooth.evaluation.lpips import AlexLpips, MapDistance, formula, open_lpips, pixels
from tests.evaluation.tiny_backbones import images, lpips_tensors

CPU = torch.device("cpu")


def convolved(
    x_CHW: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int
) -> np.ndarray:
    padded = np.pad(x_CHW, ((0, 0), (padding, padding), (padding, padding)))
    side = weight.shape[-1]
    windows = sliding_window_view(padded, (side, side), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]


def pooled(x_CHW: np.ndarray) -> np.ndarray:
    return sliding_window_view(x_CHW, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(3, 4))


def maps_by_hand(rgb: np.ndarray, t: dict[str, np.ndarray]) -> list[np.ndarray]:
    """AlexNet as its paper and torchvision have it, with LPIPS's own scaling of the pixels."""
    x = rgb.astype(np.float64).transpose(2, 0, 1) / 127.5 - 1
    x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[
        :, None, None
    ]
    one = np.maximum(convolved(x, t["features.0.weight"], t["features.0.bias"], 4, 2), 0)
    two = np.maximum(convolved(pooled(one), t["features.3.weight"], t["features.3.bias"], 1, 2), 0)
    three = np.maximum(convolved(pooled(two), t["features.6.weight"], t["features.6.bias"], 1, 1), 0)
    four = np.maximum(convolved(three, t["features.8.weight"], t["features.8.bias"], 1, 1), 0)
    return [
        one,
        two,
        three,
        four,
        np.maximum(convolved(four, t["features.10.weight"], t["features.10.bias"], 1, 1), 0),
    ]


def distance_by_hand(a: list[np.ndarray], b: list[np.ndarray], lines: list[np.ndarray]) -> float:
    total = 0.0
    for x, y, line in zip(a, b, lines, strict=True):
        places = []
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                u, v = x[:, row, column], y[:, row, column]
                u, v = u / (np.linalg.norm(u) + 1e-10), v / (np.linalg.norm(v) + 1e-10)
                places.append(float((line * (u - v) ** 2).sum()))
        total += float(np.mean(places))
    return total


def test_it_is_the_calculation_by_hand(tmp_path: Path) -> None:
    tensors = lpips_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    first, second = images(3, 67, seed=1), images(3, 67, seed=2)
    found = open_lpips(tmp_path, CPU)(first, second)
    by_name = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    lines = [by_name[f"lin{k}.model.1.weight"].ravel() for k in range(5)]
    for i in range(3):
        a, b = (maps_by_hand(np.asarray(side[i]), by_name) for side in (first, second))
        assert found[i] == pytest.approx(distance_by_hand(a, b, lines), rel=2e-4)
    assert found.dtype == np.float32


def test_the_names_of_the_lpips_package_are_the_same_network() -> None:
    tensors = lpips_tensors()
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    packaged = {
        f"net.slice{slices[int(name.split('.')[1])]}.{name[9:]}"
        if name.startswith("features")
        else name: tensor
        for name, tensor in tensors.items()
    }
    assert "net.slice2.3.weight" in packaged
    x, y = pixels(images(2, 64, seed=1)), pixels(images(2, 64, seed=2))
    more = {"scaling_layer.shift": torch.zeros(1), "lins.0.model.1.weight": torch.zeros(1)}
    assert torch.equal(AlexLpips(packaged | more)(x, y), AlexLpips(tensors)(x, y))


def test_a_distance_is_zero_of_itself_and_symmetric() -> None:
    network = AlexLpips(lpips_tensors())
    x, y = pixels(images(2, 64, seed=1)), pixels(images(2, 64, seed=2))
    assert network(x, x).tolist() == [0, 0]
    assert torch.equal(network(x, y), network(y, x))
    assert (network(x, y) > 0).all()


def test_unweighted_is_all_weights_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(2, c, 3, 3, generator=generator) for c in (4, 6)] for _ in range(2))
    ones = [torch.ones(1, c, 1, 1) for c in (4, 6)]
    assert torch.allclose(formula(a, b), formula(a, b, ones))
    by_hand = distance_by_hand(
        [m[1].double().numpy() for m in a], [m[1].double().numpy() for m in b], [np.ones(4), np.ones(6)]
    )
    assert float(formula(a, b)[1]) == pytest.approx(by_hand, rel=1e-5)


def test_batches_do_not_change_distances_and_no_image_is_looked_at_twice(tmp_path: Path) -> None:
    network = AlexLpips(lpips_tensors())
    seen: list[int] = []

    def features(batch: list) -> list[torch.Tensor]:
        seen.append(len(batch))
        return network.features(pixels(batch))

    some = images(4, 64)
    pairs = [(a, b) for i, a in enumerate(some) for b in some[i + 1 :]] * 7
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = MapDistance("x", features, network.lines())(first, second)
    assert seen == [4, 4]  # 42 pairs, 32 at once
    one_by_one = [float(network(pixels([a]), pixels([b]))) for a, b in pairs]
    assert found.tolist() == pytest.approx(one_by_one, rel=1e-4)
    assert len(MapDistance("x", features)([], [])) == 0
    with pytest.raises(ValueError, match="1 images against 2"):
        MapDistance("x", features)(some[:1], some[:2])


def test_another_size_is_brought_to_the_first(tmp_path: Path) -> None:
    save_file(lpips_tensors(), tmp_path / "model.safetensors")
    distance = open_lpips(tmp_path / "model.safetensors", CPU)
    small, large = images(1, 64)[0], images(1, 96, seed=1)[0]
    assert distance([small], [large]) == pytest.approx(distance([small], [large.resize((64, 64))]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("lin3.model.1.weight"), "1 tensors are missing, lin3.model.1.weight"),
        (
            lambda t: t.update({"lin3.model.1.weight": torch.ones(1, 9, 1, 1)}),
            r"lin3.model.1.weight has the shape",
        ),
        (lambda t: t.update({"features.8.weight": torch.ones(4, 9, 3, 3)}), "features.8 has the shape"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: object, expected: str) -> None:
    tensors = lpips_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=expected) as caught:
        open_lpips(tmp_path, CPU)
    assert str(tmp_path) not in str(caught.value)


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such file or folder"):
        open_lpips(tmp_path / "nothing", CPU)
    with pytest.raises(BaseModelError, match=r"0 \.safetensors files here"):
        open_lpips(tmp_path, CPU)
    (tmp_path / "alex.pth").write_bytes(b"PK")
    with pytest.raises(BaseModelError, match=r"no \.safetensors file"):
        open_lpips(tmp_path / "alex.pth", CPU)
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(BaseModelError, match="not the weights of LPIPS"):
        open_lpips(tmp_path, CPU)
