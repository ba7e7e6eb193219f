"""Our files in diffusers and PEFT, theirs in ours: the same numbers come out of the networks."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabooth.adapters import file, formats, inject, peft_folder
from lorabooth.adapters.convert import convert_file
from lorabooth.adapters.folders import open_folder
from lorabooth.adapters.metadata import Metadata
from lorabooth.errors import AdapterError
from tests.adapters.conftest import ATTENTION, EVERYTHING, Base, difference, outputs

META = Metadata(family="sd1", base_id="tiny")
CLOSE = 1e-5


def parts(pipe):
    return {"denoiser": pipe.unet, "text_encoder": pipe.text_encoder}


def assert_close(got, expected):
    assert difference(got[0], expected[0]) < CLOSE
    assert difference(got[1], expected[1]) < CLOSE


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(("alpha", "patterns"), [(4.0, (ATTENTION,)), (0.5, EVERYTHING)])
def test_our_file_in_diffusers(base, trained, tmp_path, layout, alpha, patterns, caplog):
    components = base.load()
    plain = outputs(components)
    tensors = trained(components, patterns=patterns, alpha=alpha)
    expected = outputs(components)
    path = tmp_path / "adapter.safetensors"
    file.write(path, tensors, META, layout)
    pipe = base.pipeline()
    logging.getLogger("diffusers").propagate = True
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        pipe.load_lora_weights(str(path))
    told = [str(w.message) for w in caught] + caplog.messages
    assert not [t for t in told if "key" in t.lower() or "target" in t.lower()], told
    assert_close(outputs(parts(pipe)), expected)
    assert difference(expected[0], plain[0]) > 1e-3


def test_our_file_without_text_encoder_in_diffusers(sd1, trained, tmp_path):
    components = sd1.load()
    tensors = trained(components, text=False)
    file.write(tmp_path / "a.safetensors", tensors, META)
    pipe = sd1.pipeline()
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert_close(outputs(parts(pipe)), outputs(components))


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("mixed", ["alpha", "rank", "both"])
def test_modules_of_several_ranks_and_alphas_in_diffusers(sd1, trained, tmp_path, layout, mixed):
    components = sd1.load()
    tensors = trained(components)
    inject.detach(components)
    for i, key in enumerate(sorted(k for k in tensors if k.endswith(".alpha"))):
        if i % 3 == 0 and mixed != "rank":
            tensors[key] = torch.tensor(float(i % 2) * 3)
        if i % 3 == 0 and mixed != "alpha":
            down, up = key.replace("alpha", "lora_A"), key.replace("alpha", "lora_B")
            tensors |= {down: tensors[down][:1].clone(), up: tensors[up][:, :1].clone()}
    inject.attach_tensors(components, tensors)
    file.write(tmp_path / "a.safetensors", tensors, META, layout)
    pipe = sd1.pipeline()
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert_close(outputs(parts(pipe)), outputs(components))
    fresh = sd1.load()
    inject.attach_tensors(fresh, file.read(tmp_path / "a.safetensors").tensors)
    assert_close(outputs(fresh), outputs(components))


def test_strength_means_the_same(sd1, trained, tmp_path):
    components = sd1.load()
    tensors = trained(components)
    file.write(tmp_path / "a.safetensors", tensors, META)
    pipe = sd1.pipeline()
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="a")
    pipe.set_adapters(["a"], [0.4])
    inject.set_strength(components, "default", 0.4)
    assert_close(outputs(parts(pipe)), outputs(components))


def test_live_adapter_on_a_users_pipeline_is_seen_by_it(sd1, trained):
    tensors = trained(sd1.load())
    pipe = sd1.pipeline()
    plain = outputs(parts(pipe))
    inject.attach_tensors(parts(pipe), tensors, name="mine")
    assert pipe.get_active_adapters() == ["mine"]
    pipe.disable_lora()
    assert torch.equal(outputs(parts(pipe))[0], plain[0])
    pipe.enable_lora()
    assert difference(outputs(parts(pipe))[0], plain[0]) > 1e-2
    inject.detach(parts(pipe), "mine")
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("mixed", [False, True])
def test_peft_folder_opens_in_peft(base, trained, tmp_path, mixed):
    from peft import PeftModel

    components = base.load()
    tensors = trained(components, alpha=7.0)
    if mixed:
        for i, key in enumerate(sorted(k for k in tensors if k.endswith(".alpha"))):
            tensors[key] = torch.tensor(1.0 + i % 3)
            if i % 4 == 0:
                for kind, cut in (("lora_A", slice(0, 1)), ("lora_B", (slice(None), slice(0, 1)))):
                    tensors[key.replace("alpha", kind)] = tensors[key.replace("alpha", kind)][
                        cut
                    ].contiguous()
        inject.detach(components)
        inject.attach_tensors(components, tensors)
    expected = outputs(components)
    other = base.load()
    nested = hasattr(other["text_encoder"], "text_model")
    folders = peft_folder.export_peft(tmp_path, tensors, META, text_model_prefix=nested)
    assert folders == {"denoiser": tmp_path / "unet", "text_encoder": tmp_path / "text_encoder"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # on missing keys
        warnings.simplefilter("error", RuntimeWarning)  # on patterns that match nothing
        opened = {name: PeftModel.from_pretrained(other[name], folder) for name, folder in folders.items()}
    assert_close(outputs({name: model.base_model.model for name, model in opened.items()}), expected)
    back = {}
    for name, folder in folders.items():
        got = open_folder(folder, name)
        assert got.notes == ()
        back |= got.tensors()
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in back)


def test_folder_that_peft_saved(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    components = base.load()
    config = LoraConfig(
        r=3, lora_alpha=5, init_lora_weights="gaussian", target_modules=["to_q", "to_v", "conv1"],
        alpha_pattern={"attn1.to_q": 2}, rank_pattern={"conv1": 2},
    )  # fmt: skip
    model = get_peft_model(components["denoiser"], config)
    fill_up(model)
    expected = outputs(components)
    model.save_pretrained(tmp_path)
    got = open_folder(tmp_path)
    fresh = base.load()
    inject.attach_tensors(fresh, got.tensors())
    assert_close(outputs(fresh), expected)


def test_folders_that_are_no_lora(tmp_path):
    with pytest.raises(AdapterError, match="holds no adapter"):
        open_folder(tmp_path)
    for text in ("{", "[]", '{"peft_type": "LOHA"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError):
            open_folder(tmp_path)


def fill_up(model):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("text", "with_metadata", "convert"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, True)],
)
def test_file_that_diffusers_scripts_save(base: Base, tmp_path: Path, text, with_metadata, convert):
    """As train_dreambooth_lora.py does: add_adapter, get_peft_model_state_dict, save_lora_weights."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = base.pipeline()
    # alpha = rank when the file cannot say otherwise
    alpha = 10 if with_metadata else 4
    unet_targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "proj_in"]
    configs = {"unet": LoraConfig(r=4, lora_alpha=alpha, target_modules=unet_targets)}
    if text:
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        configs["text_encoder"] = LoraConfig(r=4, lora_alpha=alpha, target_modules=targets)
    states, metadata = {}, {}
    for name, config in configs.items():
        model = getattr(pipe, name)
        model.add_adapter(config)
        fill_up(model)
        state = get_peft_model_state_dict(model)
        states[name] = convert_state_dict_to_diffusers(state) if convert else state
        metadata[name] = model.peft_config["default"].to_dict() if with_metadata else None
    expected = outputs(parts(pipe))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states.get("text_encoder"),
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata.get("text_encoder"),
    )
    got = file.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert got.layout == "diffusers"
    assert bool(got.notes) is not with_metadata
    assert any(key.startswith("text_encoder.text_model.") for key in got.tensors) is text
    fresh = base.load()
    inject.attach_tensors(fresh, got.tensors)
    assert_close(outputs(fresh), expected)
    # and on to the layout that everybody opens
    file.write(tmp_path / "kohya.safetensors", got.tensors, META)
    reader = base.pipeline()
    reader.load_lora_weights(str(tmp_path / "kohya.safetensors"))
    assert_close(outputs(parts(reader)), expected)


def test_file_that_unet_saves_alone(sd1, tmp_path):
    from peft import LoraConfig

    pipe = sd1.pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    fill_up(pipe.unet)
    expected = outputs(parts(pipe))
    pipe.unet.save_lora_adapter(tmp_path)
    got = file.read(next(tmp_path.glob("*.safetensors")))
    fresh = sd1.load()
    inject.attach_tensors(fresh, got.tensors)
    assert_close(outputs(fresh), expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_converted_adapters_open_in_peft_and_diffusers(base, trained, tmp_path, mixed):
    from peft import PeftModel

    components = base.load()
    tensors = trained(components, alpha=7.0)
    if mixed:  # several alphas, which diffusers reads right in its own layout
        for i, key in enumerate(sorted(k for k in tensors if k.endswith(".alpha"))):
            tensors[key] = torch.tensor(1.0 + i % 3)
        inject.detach(components)
        inject.attach_tensors(components, tensors)
    expected = outputs(components)
    foreign = formats.export(tensors, "kohya", "sd1")
    save_file(foreign, tmp_path / "kohya.safetensors", {"ss_base_model_version": "sd_v1"})
    convert_file(tmp_path / "kohya.safetensors", tmp_path / "peft", to="peft")
    other = base.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # on missing keys
        warnings.simplefilter("error", RuntimeWarning)  # on patterns that match nothing
        opened = {
            name: PeftModel.from_pretrained(other[name], tmp_path / "peft" / folder)
            for name, folder in (("denoiser", "unet"), ("text_encoder", "text_encoder"))
        }
    assert_close(outputs({name: model.base_model.model for name, model in opened.items()}), expected)
    convert_file(tmp_path / "peft", tmp_path / "diffusers", to="diffusers")
    pipe = base.pipeline()
    pipe.load_lora_weights(str(tmp_path / "diffusers"))
    assert_close(outputs(parts(pipe)), expected)
    convert_file(tmp_path / "diffusers", tmp_path / "level", to="kohya", level_alphas=True)
    pipe = base.pipeline()
    pipe.load_lora_weights(str(tmp_path / "level" / "diffusers.safetensors"))
    assert_close(outputs(parts(pipe)), expected)
