"""What foreign metadata says is shown, cleaned; what makes no sense is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabooth.adapters.inspect import inspect_path


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def test_metadata_of_kohya_and_no_control_characters(tmp_path: Path) -> None:
    said = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
        "ss_steps": "2400",
        "ss_learning_rate": "0.0001",
        "ss_epoch": "10",
        "ss_network_dim": "16",
        "ss_clip_skip": "None",
        "ss_output_name": "evil\x1b[2Jname\nsecond line",
        "ss_tag_frequency": json.dumps({"1_a": {"ohwx dog": 9, "grass": 3}, "1_b": {"grass": 4}, "bad": 1}),
        "modelspec.trigger_phrase": "ohwx dog, ohwx",
        "modelspec.prediction_type": "v",
    }
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
    found = inspect_path(write(tmp_path / "a.safetensors", tensors, said))
    assert (found.family, found.steps, found.prediction) == ("sdxl", 2400, "v_prediction")
    assert found.base == "sd_xl_base_1.0.safetensors"
    assert found.tags == (("ohwx dog", 9), ("grass", 7))
    assert found.trigger_words == ("ohwx dog", "ohwx")
    assert found.facts["learning rate"] == "0.0001"
    assert found.facts["network dim"] == "16"
    assert "clip skip" not in found.facts
    assert all(text.isprintable() for text in found.facts.values())
    assert any("no alpha" in note for note in found.notes)


@pytest.mark.parametrize(
    "said",
    [
        {"ss_tag_frequency": "[" * 100_000, "training_info": "{", "ss_steps": "-3", "software": "x"},
        {"ss_tag_frequency": "[1]", "training_info": '{"step": "many"}', "modelspec.trigger_phrase": "[1]"},
        {"ss_tag_frequency": '{"a": {"b": "c"}}', "training_info": '{"step": true}'},
    ],
)
def test_senseless_metadata_is_passed_over(said: dict[str, str], tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
    found = inspect_path(write(tmp_path / "a.safetensors", tensors, said))
    assert (found.tags, found.steps, found.kind) == ((), 0, "LoRA")


def test_steps_and_trigger_of_ai_toolkit(tmp_path: Path) -> None:
    said = {
        "training_info": '{"step": 2000, "epoch": 7}',
        "ss_tag_frequency": '{"1_p3r5on": {"p3r5on": 1}}',
        "software": '{"name": "ai-toolkit", "version": "0.1.0"}',
    }
    tensors = {
        f"transformer.single_transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(*shape)
        for side, shape in (("A", (4, 3072)), ("B", (3072, 4)))
    }
    found = inspect_path(write(tmp_path / "a.safetensors", tensors, said))
    assert (found.family, found.layout, found.steps) == ("flux", "diffusers", 2000)
    assert found.tags == (("p3r5on", 1),)
    assert found.facts["made by"] == "ai-toolkit 0.1.0"
    assert found.facts["epochs"] == "7"
