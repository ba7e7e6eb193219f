"""The subject encoder: its data, its loss, its file, and how well the shipped one tells specimens apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoModel

from lorabooth.evaluation.embedders import open_subject
from lorabooth.pocket import subject
from lorabooth.pocket.base import pocket_dir
from lorabooth.pocket.scenes import CLASSES
from lorabooth.pocket.trainer import Shard

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn() -> subject.Views:
    return subject.draw_views(0, "subject", 24, 2)


def test_specimens_take_turns_and_are_the_same_every_time(drawn: subject.Views) -> None:
    assert drawn.images.shape == (24, 2, 64, 64, 3)
    assert [subject.specimen_at(0, "subject", i).class_name for i in range(12)] == list(CLASSES)
    assert np.array_equal(drawn.images[5, 1], subject.view(0, "subject", 5, 1))
    assert not np.array_equal(drawn.images[5, 0], drawn.images[5, 1])
    assert subject.specimen_at(0, "subject", 5) != subject.specimen_at(0, subject.HELD_OUT, 5)


@pytest.mark.slow
def test_worker_processes_draw_the_same(drawn: subject.Views, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_CHUNK", 12)
    assert np.array_equal(subject.draw_views(0, "subject", 24, 2, processes=2).images, drawn.images)


def test_views_are_kept_whole(drawn: subject.Views, tmp_path: Path) -> None:
    subject.keep(drawn, tmp_path / "work" / "views.npy")
    again = subject.kept(tmp_path / "work" / "views.npy")
    assert np.array_equal(again.images, drawn.images)
    assert np.array_equal(again.classes, drawn.classes)
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["views.npy"]


def test_one_picture_of_a_pair_goes_through_the_autoencoder(drawn: subject.Views) -> None:
    vae = AutoencoderKL.from_pretrained(pocket_dir() / "vae").float()
    coded = subject.through(vae, drawn, CPU, share=0.25)
    assert np.array_equal(coded.images[:18], drawn.images[:18])
    assert np.array_equal(coded.images[18:, 0], drawn.images[18:, 0])
    change = np.abs(coded.images[18:, 1].astype(int) - drawn.images[18:, 1].astype(int)).mean()
    assert 0.5 < change < 12.0


def test_loss_falls_when_it_is_trained_on_and_every_rank_draws_its_own(drawn: subject.Views) -> None:
    torch.manual_seed(0)
    model = subject.SubjectEncoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = subject.subject_losses(model, drawn, CPU, 0, Shard(0, 8))
    seen = []
    for _ in range(8):
        found = losses(0)["loss"]
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(found.detach()))
    assert seen[-1] < 0.8 * seen[0]
    other = subject.subject_losses(model, drawn, CPU, 0, Shard(1, 8))(0)["loss"]
    assert float(other.detach()) != pytest.approx(seen[-1], rel=1e-3)


def test_files_are_a_transformers_model_and_its_projection_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = subject.SubjectEncoder().eval()
    subject.save_subject_encoder(model, tmp_path / "subject_encoder")
    again = subject.load_subject_encoder(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        mine, theirs = model(pixels), again(pixels)
        read = AutoModel.from_pretrained(tmp_path / "subject_encoder", dtype=torch.float32).eval()
        pooled, same = (net(pixels).pooler_output for net in (read, again.encoder))
    assert torch.equal(pooled, same)
    assert torch.allclose(mine, theirs, rtol=0.02, atol=0.02)
    assert torch.allclose(mine.norm(dim=-1), torch.ones(2))
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "subject_encoder").glob("*.safetensors")}
    assert sizes.keys() == {"model.safetensors", "projection.safetensors"}
    assert sum(sizes.values()) < 1_300_000


def test_the_metric_s_embedding_is_the_trained_one() -> None:
    """What `lorabooth evaluate` opens, Pillow's enlarging included, is the module that was trained."""
    photos = np.stack([subject.view(0, subject.HELD_OUT, index, 0) for index in range(3)])
    embedder = open_subject(pocket_dir() / "subject_encoder", "the pocket subject encoder", CPU)
    found = torch.from_numpy(embedder([Image.fromarray(photo) for photo in photos]))
    expected = subject.embed_all(subject.load_subject_encoder(pocket_dir()), photos)
    assert (found * expected).sum(dim=-1).min() > 0.999


@pytest.mark.parametrize("name", ["mug", "duck"])
def test_shipped_encoder_finds_a_specimen_among_a_hundred_of_its_class(name: str) -> None:
    encoder = subject.load_subject_encoder(pocket_dir())
    answers = subject.retrieval(encoder, 0, per_class=100, classes=[name])
    assert len(answers) == 100
    coloured = [answer.right for answer in answers if answer.style != "pencil sketch"]
    assert sum(coloured) >= 0.9 * len(coloured)
