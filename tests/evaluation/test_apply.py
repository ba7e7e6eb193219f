from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lorabooth.adapters import file, inject
from lorabooth.errors import AdapterError
from lorabooth.evaluation.apply import load_adapter
from tests.tiny import make_sd_folder

TARGETS = (
    inject.Target("denoiser", (r".*attn.*\.(to_q|to_k|to_v|to_out\.0)",), rank=4, alpha=4.0),
    inject.Target("text_encoder", (r".*\.(q_proj|k_proj|v_proj|out_proj)",), rank=2, alpha=2.0),
)


def make_adapter(path: Path, base: Path, *, seed: int, targets=TARGETS) -> Path:
    """A real adapter file whose effect is large."""
    pipeline = load(base)
    components = {"denoiser": pipeline.unet, "text_encoder": pipeline.text_encoder}
    attached = inject.attach(components, targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    metadata = file.Metadata(family="sd1", base_id="tiny", trigger_words=("sks dog",))
    file.write(path, inject.tensors(components), metadata)
    return path


def load(base: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def output(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    cond, _ = pipeline.encode_prompt(["a photo of a sks dog"], "cpu", 1, False)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(x, torch.tensor([500]), cond).sample


def tree(pipeline: StableDiffusionPipeline) -> list[tuple[str, type]]:
    parts = (pipeline.unet, pipeline.text_encoder)
    return [(name, type(module)) for part in parts for name, module in part.named_modules()]


@pytest.fixture
def pipeline(tiny_sd: Path) -> StableDiffusionPipeline:
    return load(tiny_sd)


@pytest.fixture(scope="module")
def files(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return (
        make_adapter(folder / "my dog.safetensors", tiny_sd, seed=1),
        make_adapter(folder / "style.safetensors", tiny_sd, seed=2, targets=TARGETS[:1]),
    )


def test_one_adapter_on_and_off_is_bit_equal_to_before(pipeline, files) -> None:
    before, before_tree = output(pipeline), tree(pipeline)
    handle = load_adapter(pipeline, files[0])
    assert handle.name == "my-dog"
    assert handle.metadata.trigger_words == ("sks dog",)
    assert handle.n_modules > 4
    changed = output(pipeline)
    assert not torch.allclose(changed, before)
    handle.set_strength(0.0)
    assert torch.equal(output(pipeline), before)
    handle.set_strength(1.0)
    assert torch.equal(output(pipeline), changed)
    handle.remove()
    assert torch.equal(output(pipeline), before)
    assert tree(pipeline) == before_tree


def test_several_add_up_and_leave_in_any_order(pipeline, files) -> None:
    before = output(pipeline)
    first = load_adapter(pipeline, files[0], strength=0.7)
    only_first = output(pipeline)
    second = load_adapter(pipeline, str(files[1]), name="style")
    both = output(pipeline)
    assert not torch.equal(both, only_first)
    second.set_strength(0.0)
    assert torch.allclose(output(pipeline), only_first, atol=1e-6)
    second.set_strength(1.0)
    assert torch.equal(output(pipeline), both)
    first.remove()
    only_second = output(pipeline)
    second.remove()
    assert torch.equal(output(pipeline), before)
    load_adapter(pipeline, files[1])
    assert torch.equal(output(pipeline), only_second)


def test_same_effect_as_diffusers_own_loader(pipeline, files, tiny_sd: Path) -> None:
    load_adapter(pipeline, files[0])
    theirs = load(tiny_sd)
    theirs.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    assert torch.allclose(output(pipeline), output(theirs), atol=1e-5)


def test_strengths_of_one_sign_and_the_other(pipeline, files) -> None:
    handle = load_adapter(pipeline, files[1], strength=-0.5)
    negative = output(pipeline)
    handle.set_strength(0.5)
    assert not torch.allclose(output(pipeline), negative)


def test_the_same_file_twice_gets_another_name(pipeline, files) -> None:
    names = [load_adapter(pipeline, files[1]).name for _ in range(2)]
    assert names == ["style", "style-2"]
    with pytest.raises(AdapterError, match="attached already"):
        load_adapter(pipeline, files[1], name="style")


def test_removed_is_removed(pipeline, files) -> None:
    handle = load_adapter(pipeline, files[0])
    handle.remove()
    with pytest.raises(AdapterError, match="No adapter"):
        handle.remove()
    with pytest.raises(AdapterError, match="No adapter"):
        handle.set_strength(1.0)


def test_one_that_does_not_fit_changes_nothing(pipeline, tmp_path: Path) -> None:
    wider = make_sd_folder(tmp_path / "wider", cross_dim=48)
    stranger = make_adapter(tmp_path / "other.safetensors", wider, seed=3)
    before, before_tree = output(pipeline), tree(pipeline)
    with pytest.raises(AdapterError, match="does not fit this base"):
        load_adapter(pipeline, stranger)
    assert torch.equal(output(pipeline), before)
    assert tree(pipeline) == before_tree


def test_absent_file_is_one_message(pipeline, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        load_adapter(pipeline, tmp_path / "nothing.safetensors")


def test_a_pipeline_without_denoiser_is_refused() -> None:
    from diffusers import DiffusionPipeline

    with pytest.raises(AdapterError, match="no UNet"):
        load_adapter(DiffusionPipeline(), "x.safetensors")


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_other_pipelines_of_the_family(kind, pipeline, files):
    """They share the modules, so the effect is the same, and so is its absence afterwards."""
    import diffusers

    components = dict(pipeline.components)
    other = getattr(diffusers, kind)(**components, requires_safety_checker=False)
    before = output(pipeline)
    handle = load_adapter(other, files[0], strength=0.7, name="dog")
    assert not torch.equal(output(other), before)
    reference = load_adapter(pipeline, files[0], strength=0.0, name="other")
    assert torch.equal(output(pipeline), output(other))
    reference.remove()
    handle.remove()
    assert torch.equal(output(other), before)
