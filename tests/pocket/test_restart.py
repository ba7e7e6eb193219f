"""A build that starts from a finished base keeps its parts and trains its denoiser on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorabooth.errors import RecipeError
from lorabooth.pocket.build import BuildPlan, build
from lorabooth.pocket.restart import start_from
from lorabooth.pocket.trainer import read_state


def _part(folder: Path, part: str) -> dict[str, torch.Tensor]:
    name = "model" if part in ("clip", "text_encoder") else "diffusion_pytorch_model"
    return load_file(folder / part / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
def test_parts_stay_and_the_denoiser_trains_on(tmp_path: Path) -> None:
    first = BuildPlan(work=tmp_path / "a", out=tmp_path / "first", minutes=0, scenes=60, processes=1)
    build(first)
    second = BuildPlan(work=tmp_path / "b", out=tmp_path / "second", minutes=0, scenes=60, processes=1)
    start_from(second, first.out)
    build(second)
    for part in ("clip", "text_encoder"):
        for name, tensor in _part(first.out, part).items():
            assert torch.equal(tensor, _part(second.out, part)[name]), (part, name)
    # The autoencoder's scale is measured anew: the same up to half precision.
    for name, tensor in _part(first.out, "vae").items():
        assert torch.allclose(tensor.float(), _part(second.out, "vae")[name].float(), atol=0.05), name
    before, after = _part(first.out, "unet"), _part(second.out, "unet")
    changes = [float((after[name].float() - before[name].float()).abs().max()) for name in before]
    assert 0 < max(changes) < 0.1
    assert read_state(second.state_file("unet"))[1]["step"] == second.min_steps


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a pocket base"):
        start_from(BuildPlan(work=tmp_path / "w", out=tmp_path / "o"), tmp_path)
