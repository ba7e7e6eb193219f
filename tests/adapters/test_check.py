"""Every way an adapter can be wrong has its finding, and a sound one has none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabooth.adapters import file
from lorabooth.adapters.check import CheckReport, check_adapter
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.peft_folder import export_peft
from lorabooth.errors import BaseModelError
from lorabooth.progress import Silent, Task
from tests.adapters.conftest import Base
from tests.families.ldm import make_single_file

Trained = Callable[..., dict[str, Tensor]]
Stored = dict[str, Tensor]
ABOUT = Metadata(family="sd1", rank=4, alpha=6.0, lorabooth_version="0.1.0")


@pytest.fixture
def adapter(sd1: Base, trained: Trained, tmp_path: Path) -> Path:
    file.write(tmp_path / "mug.safetensors", trained(sd1.load()), ABOUT)
    return tmp_path / "mug.safetensors"


def changed(adapter: Path, change: Callable[[Stored], None], metadata: dict[str, str] | None = None) -> Path:
    stored = load_file(adapter)
    change(stored)
    path = adapter.with_name("changed.safetensors")
    save_file({key: value.contiguous() for key, value in stored.items()}, path, metadata=metadata)
    return path


def codes(report: CheckReport) -> list[str]:
    return [problem.code for problem in report.problems]


def first(stored: Stored, end: str) -> str:
    return next(key for key in sorted(stored) if key.endswith(end))


# ---- by itself ----


def test_sound(adapter: Path) -> None:
    report = check_adapter(adapter)
    assert report.sound
    assert report == CheckReport("mug.safetensors", "LoRA", "sd1", tensors=285, modules=95)


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_sound_in_other_layouts(layout: str, sd1: Base, trained: Trained, tmp_path: Path) -> None:
    tensors = trained(sd1.load())
    if layout == "peft":
        export_peft(tmp_path / "a", tensors, ABOUT)
    else:
        file.write(tmp_path / "a.safetensors", tensors, ABOUT, layout)
    report = check_adapter(tmp_path / ("a" if layout == "peft" else "a.safetensors"), sd1.folder)
    assert (report.problems, report.warnings, report.notes) == ((), (), ())
    assert report.modules == report.matched == 95


def nan(stored: Stored) -> None:
    stored[first(stored, "lora_up.weight")][0, 0] = math.nan


def infinity(stored: Stored) -> None:
    stored[first(stored, "lora_down.weight")].view(-1)[-1] = -math.inf


def half(stored: Stored) -> None:
    stored.pop(first(stored, "lora_up.weight"))


def misshapen(stored: Stored) -> None:
    stored[first(stored, "to_q.lora_up.weight")] = torch.ones(32, 3)


def endless_alpha(stored: Stored) -> None:
    stored[first(stored, ".alpha")] = torch.tensor(math.inf)


def several_alphas(stored: Stored) -> None:
    stored[first(stored, ".alpha")] = torch.ones(2)


def stranger(stored: Stored) -> None:
    stored["hello.world"] = torch.ones(2)


def strange_layer(stored: Stored) -> None:
    for side, shape in (("down", (4, 8)), ("up", (8, 4))):
        stored[f"lora_unet_nobody_knows_me.lora_{side}.weight"] = torch.ones(*shape)


def twice(stored: Stored) -> None:
    key = first(stored, "to_q.lora_down.weight")
    stored[key.replace("lora_down", "lora_A")] = stored[key].clone()


def whole_numbers(stored: Stored) -> None:
    key = first(stored, "lora_down.weight")
    stored[key] = torch.ones(stored[key].shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (nan, "not_finite"),
        (infinity, "not_finite"),
        (half, "incomplete"),
        (misshapen, "shape"),
        (several_alphas, "alpha"),
        (stranger, "unknown"),
        (strange_layer, "unknown"),
        (twice, "repeated"),
        (whole_numbers, "dtype"),
    ],
)
def test_each_defect_has_its_finding(change: Callable[[Stored], None], code: str, adapter: Path) -> None:
    report = check_adapter(changed(adapter, change))
    assert codes(report) == [code]
    assert report.problems[0].names


def test_an_infinite_alpha_is_named_as_one(adapter: Path) -> None:
    assert codes(check_adapter(changed(adapter, endless_alpha))) == ["alpha", "not_finite"]


def test_several_defects_are_told_together_with_all_names(adapter: Path) -> None:
    def change(stored: Stored) -> None:
        for key in [key for key in stored if key.endswith("lora_up.weight")][:7]:
            stored.pop(key)
        for key in [key for key in stored if key.endswith("lora_down.weight")]:
            stored[key].fill_(math.nan)

    report = check_adapter(changed(adapter, change))
    assert codes(report) == ["incomplete", "not_finite"]
    assert [len(problem.names) for problem in report.problems] == [7, 95]
    assert "and 90 more" in report.problems[1].message


def test_a_fresh_adapter_has_no_effect_which_is_a_warning(sd1: Base, tmp_path: Path) -> None:
    from lorabooth.adapters import inject
    from lorabooth.adapters.inject import Target
    from tests.adapters.conftest import ATTENTION

    components = sd1.load()
    inject.attach(components, [Target("denoiser", (ATTENTION,), 4, 4.0)], seed=0)
    file.write(tmp_path / "new.safetensors", inject.tensors(components), ABOUT)
    report = check_adapter(tmp_path / "new.safetensors")
    assert report.sound
    (warning,) = report.warnings
    assert warning.code == "dead"
    assert len(warning.names) == report.modules
    assert "no effect" in warning.message


def test_a_few_dead_modules_are_named(adapter: Path) -> None:
    def change(stored: Stored) -> None:
        key = first(stored, "to_q.lora_up.weight")
        stored[key] = -torch.zeros_like(stored[key])

    report = check_adapter(changed(adapter, change))
    (warning,) = report.warnings
    assert len(warning.names) == 1
    assert warning.names[0].endswith("to_q")


def test_an_assumed_alpha_is_a_note(adapter: Path) -> None:
    def change(stored: Stored) -> None:
        for key in [key for key in stored if key.endswith(".alpha")]:
            stored.pop(key)

    report = check_adapter(changed(adapter, change))
    assert report.sound
    assert any("95 modules carry no alpha" in note for note in report.notes)


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("a.ckpt", b"PK\x03\x04", "unreadable"), ("a.safetensors", b"", "unreadable"), ("", b"", "unreadable")],
)
def test_unreadable_is_a_problem_not_an_exception(
    name: str, content: bytes, code: str, tmp_path: Path
) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    assert codes(check_adapter(tmp_path / (name or "absent"))) == [code]


def test_a_base_model_is_no_adapter(tiny_sd: Path) -> None:
    report = check_adapter(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    assert codes(report) == ["kind"]
    assert "UNet" in report.problems[0].message


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_raises(data: st.DataObject, adapter: Path) -> None:
    blob = bytearray(adapter.read_bytes())
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    for _ in range(data.draw(st.integers(0, 5))):
        if blob:
            blob[data.draw(st.integers(0, min(len(blob), 40_000) - 1))] = data.draw(st.integers(0, 255))
    path = adapter.with_name("damaged.safetensors")
    path.write_bytes(blob)
    report = check_adapter(path)
    json.dumps(report.to_dict())
    assert report.sound == (not report.problems)


# ---- LyCORIS ----


def test_loha_and_its_defects(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    parts = {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4), "hada_w2_b": (4, 32)}
    stored = {f"{stem}.{key}": torch.ones(*shape) for key, shape in parts.items()}
    path = tmp_path / "a.safetensors"
    save_file(stored, path)
    assert check_adapter(path).sound
    save_file(stored | {f"{stem}.hada_w1_b": torch.ones(3, 32)}, path)
    assert codes(check_adapter(path)) == ["shape"]
    stored.pop(f"{stem}.hada_w2_a")
    save_file(stored, path)
    assert codes(check_adapter(path)) == ["incomplete"]


# ---- against a base ----


def test_fits_its_base_as_folder_and_as_single_file(adapter: Path, sd1: Base, tmp_path: Path) -> None:
    single = make_single_file(sd1.folder, tmp_path / "base.safetensors", configs=False)
    for base in (sd1.folder, single):
        report = check_adapter(adapter, base)
        assert report.sound
        assert (report.base, report.base_family) == (base.name, "sd1")
        assert report.matched == report.modules == 95


def test_partial_match_lists_the_keys(adapter: Path, sd1: Base) -> None:
    def change(stored: Stored) -> None:
        for end in ("lora_down.weight", "lora_up.weight", "alpha"):
            key = first(stored, f"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.{end}")
            stored[key.replace("attentions_0", "attentions_7")] = stored.pop(key)

    report = check_adapter(changed(adapter, change, {"lorabooth.family": "sd1"}), sd1.folder)
    assert codes(report) == ["unmatched"]
    assert report.problems[0].names == (
        "denoiser.down_blocks.0.attentions.7.transformer_blocks.0.attn1.to_q",
    )
    assert "1 of 95 modules" in report.problems[0].message
    assert report.matched == 94


def test_no_match_is_said_so(sd1: Base, tmp_path: Path) -> None:
    stem = "unet.down_blocks.5.attentions.9.proj_in"
    stored = {f"{stem}.lora_A.weight": torch.ones(4, 8), f"{stem}.lora_B.weight": torch.ones(8, 4)}
    save_file(stored, tmp_path / "a.safetensors")
    report = check_adapter(tmp_path / "a.safetensors", sd1.folder)
    assert codes(report) == ["unmatched"]
    assert "None of the adapter's 1 modules" in report.problems[0].message
    assert report.matched == 0


def test_another_family_is_one_line_with_all_names(adapter: Path, tiny_sd2: Path) -> None:
    def wider(stored: Stored) -> None:
        key = first(stored, "attn2_to_k.lora_down.weight")
        stored[key] = torch.ones(4, 768)

    path = changed(adapter, wider, {"lorabooth.family": "sd1"})
    report = check_adapter(path, tiny_sd2)
    assert codes(report) == ["family"]
    message = report.problems[0].message
    assert message == "This adapter is for Stable Diffusion 1, the base is Stable Diffusion 2."
    assert any("attn2.to_k" in name for name in report.problems[0].names)


def test_another_family_that_fits_is_only_a_warning(adapter: Path, tiny_sd: Path) -> None:
    path = changed(adapter, lambda stored: None, {"lorabooth.family": "sd2"})
    report = check_adapter(path, tiny_sd)
    assert report.sound
    assert [warning.code for warning in report.warnings] == ["family"]


def test_another_shape_is_told_with_both(adapter: Path, sd1: Base) -> None:
    def change(stored: Stored) -> None:
        key = first(stored, "attn1_to_q.lora_up.weight")
        stored[key] = torch.ones(99, 4)

    report = check_adapter(changed(adapter, change), sd1.folder)
    assert codes(report) == ["misfit"]
    assert "adapter [99, 32], base [32, 32]" in report.problems[0].message


def test_a_linear_layer_and_a_convolution_of_one_pixel_are_one(sd1: Base, tmp_path: Path) -> None:
    """SD1's proj_in is a 1x1 convolution; kohya's SD2 files have some where the layer is linear."""
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    for kernel in ((), (1, 1)):
        stored = {
            f"{stem}.lora_down.weight": torch.ones(4, 32, *kernel),
            f"{stem}.lora_up.weight": torch.ones(32, 4, *kernel),
        }
        save_file(stored, tmp_path / "a.safetensors")
        assert check_adapter(tmp_path / "a.safetensors", sd1.folder).matched == 1
    stored[f"{stem}.lora_down.weight"] = torch.ones(4, 32, 3, 3)
    save_file(stored, tmp_path / "a.safetensors")
    assert codes(check_adapter(tmp_path / "a.safetensors", sd1.folder)) == ["misfit"]


def test_an_absent_base_is_the_base_s_error(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError):
        check_adapter(adapter, tmp_path / "nothing")


# ---- reading ----


class Counting(Silent):
    def __init__(self) -> None:
        self.total, self.done = 0, 0

    @contextmanager
    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> Iterator[Task]:
        self.total += total
        outer = self

        class Step:
            def advance(self, count: int = 1, **fields: str) -> None:
                outer.done += count

        yield Step()


def test_every_tensor_is_counted(adapter: Path) -> None:
    reporter = Counting()
    check_adapter(adapter, reporter=reporter)
    assert reporter.total == reporter.done == 285


def test_to_dict_is_plain(adapter: Path) -> None:
    facts = json.loads(json.dumps(check_adapter(changed(adapter, nan)).to_dict()))
    assert facts["sound"] is False
    assert facts["problems"][0]["names"]
