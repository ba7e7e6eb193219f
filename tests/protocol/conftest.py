"""A real run on the pocket base, a few steps long, and a small subject encoder; made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from lorabooth.protocol.prompts import EvaluationPrompts
from lorabooth.protocol.results import Evaluation

TWO = EvaluationPrompts(
    ("a photo of a {token} {noun} in the snow", "a painting of a {token} {noun}"),
    ("a photo of a {noun}",),
    ("a photo of a cat on the grass",),
)
FEW = {"prompts": TWO, "images_per_prompt": 2, "class_images": 2, "unrelated_images": 1, "steps": 2}


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with its photos beside it. Read only: copy it to write there."""
    from lorabooth.api import train
    from lorabooth.recipe import from_mapping

    home = tmp_path_factory.mktemp("evaluated")
    photos = home / "photos"
    shutil.copytree(Path(str(files("lorabooth.pocket"))) / "demo" / "photos", photos)
    recipe = from_mapping(
        {
            "model": {"base": "pocket"},
            "subjects": [{"images": str(photos), "noun": "mug", "token": "qzx"}],
            "prior": {"mode": "none"},
            "optim": {"steps": 4, "lr": 2e-2},
            "run": {"sample_count": 0, "checkpoint_every": 0},
        },
        (),
        "the test",
    )
    return train(recipe, out=home / "run").out


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small network of the pocket subject encoder's class."""
    from tests.evaluation.tiny_backbones import make_resnet

    return make_resnet(tmp_path_factory.mktemp("backbones") / "encoder")


@pytest.fixture(scope="session")
def evaluated(trained_run: Path, encoder: Path) -> Evaluation:
    """The run, evaluated in its own folder."""
    from lorabooth.protocol.run import evaluate

    return evaluate(trained_run, **FEW, dino=str(encoder))


@pytest.fixture
def run_copy(trained_run: Path, evaluated: Evaluation, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the evaluated run, to spoil."""

    def copied() -> Path:
        return Path(shutil.copytree(trained_run, tmp_path / "run"))

    return copied
