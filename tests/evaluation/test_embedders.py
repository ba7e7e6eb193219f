"""Embeddings are those of the models' own classes, called by hand on pixels prepared by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ResNetModel, ViTModel

from lorabooth.errors import BaseModelError
from lorabooth.evaluation.embedders import BATCH, CosineDistance, open_clip, open_pocket_clip, open_subject
from lorabooth.evaluation.lpips import MapDistance, formula
from lorabooth.families.quiet import quiet_libraries
from lorabooth.pocket.base import pocket_dir
from lorabooth.progress import Silent
from tests.evaluation.tiny_backbones import images, make_clip, make_dinov2, make_resnet, make_vit, normalised

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_resnet(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def unit(x: torch.Tensor) -> np.ndarray:
    x = x.double().numpy().ravel()
    return x / np.sqrt((x * x).sum())


@torch.no_grad()
def test_vit_gives_the_class_token_after_the_last_norm(vit: Path) -> None:
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()
    some = images(3)
    found = open_subject(vit, "v", CPU)(some)
    assert (found.shape, found.dtype) == ((3, 16), np.float32)
    for image, row in zip(some, found, strict=True):
        before = model(normalised(image), output_hidden_states=True).hidden_states[-1][0, 0].double().numpy()
        scaled = (before - before.mean()) / np.sqrt(before.var() + model.config.layer_norm_eps)
        scaled = scaled * model.layernorm.weight.numpy() + model.layernorm.bias.numpy()
        assert row == pytest.approx(scaled / np.linalg.norm(scaled), abs=1e-5)


@torch.no_grad()
def test_dinov2_gives_the_class_token_too(tmp_path: Path) -> None:
    model = Dinov2Model.from_pretrained(make_dinov2(tmp_path)).eval()
    some = images(2)
    found = open_subject(tmp_path, "d", CPU)(some)
    for image, row in zip(some, found, strict=True):
        assert row == pytest.approx(unit(model(normalised(image)).last_hidden_state[:, 0]), abs=1e-5)


@torch.no_grad()
def test_resnet_gives_the_mean_over_its_last_map(resnet: Path) -> None:
    model = ResNetModel.from_pretrained(resnet).eval()
    some = images(2)
    found = open_subject(resnet, "r", CPU)(some)
    for image, row in zip(some, found, strict=True):
        maps = model(normalised(image)).last_hidden_state
        assert row == pytest.approx(unit(maps.mean(dim=(2, 3))), abs=1e-5)


@torch.no_grad()
def test_a_projection_beside_the_weights_is_applied(resnet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resnet, tmp_path / "with"))
    matrix = torch.tensor([[2.0, *[0.0] * 11], [0.0, 1.0, *[0.0] * 10]])
    save_file({"weight": matrix.half()}, folder / "projection.safetensors")
    some = images(2)
    plain, found = (open_subject(place, "r", CPU)(some) for place in (resnet, folder))
    for before, after in zip(plain, found, strict=True):
        assert after == pytest.approx(unit(torch.tensor([[2 * before[0], before[1]]])), abs=1e-5)
    save_file({"weight": matrix[:, :5].contiguous()}, folder / "projection.safetensors")
    with pytest.raises(BaseModelError, match="r: cannot be used as a vision model"):
        open_subject(folder, "r", CPU)


@torch.no_grad()
def test_the_stages_of_a_resnet_stand_in_for_lpips(resnet: Path, vit: Path) -> None:
    model = ResNetModel.from_pretrained(resnet).eval()
    a, b = images(2)
    embedder = open_subject(resnet, "r", CPU)
    found = MapDistance("stages", embedder.stages)([a], [b])
    by_hand = [model(normalised(i), output_hidden_states=True).hidden_states[1:] for i in (a, b)]
    assert [m.shape[1] for m in by_hand[0]] == [8, 12]
    assert float(found[0]) == pytest.approx(float(formula(*by_hand)), rel=1e-4)
    assert found[0] > 0
    assert open_subject(vit, "v", CPU).stages([a]) == []


def test_what_is_left_without_maps_is_the_cosine(vit: Path) -> None:
    embedder = open_subject(vit, "some ViT", CPU)
    distance = CosineDistance(embedder)
    a, b = images(2)
    left, right = embedder([a, b])
    assert distance([a, a], [b, a]).tolist() == pytest.approx([1 - float(left @ right), 0], abs=1e-6)
    assert distance.name == "1 - cosine of some ViT (no LPIPS)"
    assert len(distance([], [])) == 0


@torch.no_grad()
def test_clip_projects_both_halves(clip: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    embedder = open_clip(clip, "c", CPU)
    some, prompts = images(2), ["a photo of a dog", "a red hat", "a painting of a cat on the beach in snow"]
    for image, row in zip(some, embedder.images(some), strict=True):
        pooled = model.vision_model(normalised(image)).pooler_output
        assert row == pytest.approx(unit(pooled @ model.visual_projection.weight.T), abs=1e-5)
    for prompt, row in zip(prompts, embedder.texts(prompts), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])  # one prompt, without padding
        end = model.text_model(ids).last_hidden_state[:, -1]
        assert row == pytest.approx(unit(end @ model.text_projection.weight.T), abs=1e-5)


def test_a_caption_that_is_too_long_is_cut_and_said_to_be(clip: Path) -> None:
    warned: list[str] = []

    class Listener(Silent):
        def warn(self, message: str) -> None:
            warned.append(message)

    embedder = open_clip(clip, "the CLIP", CPU, Listener())
    long = "a dog " * 100
    cut, short = embedder.texts([long, "a dog"])
    assert len(warned) == 1
    assert "1 of 2 captions are longer than the 77 tokens that the CLIP reads" in warned[0]
    # What is left: the start, 75 tokens of words, and the end, which the pooled output is read from.
    assert cut == pytest.approx(embedder.texts(["a dog " * 37 + "a"])[0], abs=1e-6)
    assert len(warned) == 1
    assert cut != pytest.approx(short)


def test_batches_and_modes_of_images_do_not_matter(vit: Path) -> None:
    embedder = open_subject(vit, "v", CPU)
    some = images(BATCH + 3)
    together = embedder(some)
    assert together == pytest.approx(np.concatenate([embedder([image]) for image in some]), abs=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1)
    opaque = some[0].copy()
    opaque.putalpha(255)
    assert embedder([opaque]) == pytest.approx(together[:1], abs=1e-5)
    assert embedder([some[0].convert("L")]).shape == (1, 16)
    assert len(embedder([])) == 0


def test_other_sizes_are_brought_to_the_model(vit: Path) -> None:
    large = images(1, 96)[0]
    by_hand = large.resize((32, 32), Image.Resampling.BICUBIC)
    embedder = open_subject(vit, "v", CPU)
    assert embedder([large]) == pytest.approx(embedder([by_hand]), abs=1e-5)


def test_the_pocket_clip_reads_its_own_captions() -> None:
    embedder = open_pocket_clip(pocket_dir(), "p", CPU)
    photo = Image.open(pocket_dir().parent / "demo" / "photos" / "01.png")
    right, wrong = embedder.texts(["a photo of a mug", "a photo of a dog"])
    assert embedder.images([photo])[0] @ right > embedder.images([photo])[0] @ wrong + 0.05


def _config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights; model.safetensors is needed"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "only pytorch_model.bin, a pickle that could run any code",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), "cannot be used as"),
        (lambda f: (f / "config.json").unlink(), "no config.json here"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be used as"),
        (lambda f: _config(f, model_type="nonsense"), "cannot be used as"),
        (lambda f: _config(f, num_hidden_layers=3), "weights are missing or of another shape: "),
        (lambda f: _config(f, hidden_size=24), "cannot be used as"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "cannot be used as"),
    ],
)
def test_a_broken_folder_is_one_message(tmp_path: Path, harm: object, expected: str) -> None:
    folder = make_vit(tmp_path / "vit")
    harm(folder)
    with quiet_libraries(), pytest.raises(BaseModelError, match=expected) as caught:
        open_subject(folder, "folder vit", CPU)
    assert caught.value.what.startswith("folder vit: ")
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in caught.value.what


def test_a_model_of_another_kind_is_refused(vit: Path, clip: Path) -> None:
    with pytest.raises(
        BaseModelError, match=r'cannot be used as a CLIP: its config\.json says model_type "vit"'
    ):
        open_clip(vit, "v", CPU)
    with pytest.raises(BaseModelError, match="cannot be used as a vision model"):
        open_subject(clip, "c", CPU)
    with pytest.raises(BaseModelError, match="there is no such folder"):
        open_subject(vit / "nothing", "n", CPU)


def test_a_pocket_folder_without_its_clip_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="cannot be used as a pocket base's CLIP"):
        open_pocket_clip(tmp_path, "p", CPU)
