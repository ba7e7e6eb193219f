"""Weights in few bits: exact as a technique, close to the base, and the adapter none the wiser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabooth.adapters import file, inject
from lorabooth.errors import RecipeError
from lorabooth.memory import quantise
from lorabooth.memory.checkpoint import recompute
from lorabooth.memory.frozen import dequantised, is_in_few_bits
from lorabooth.memory.meter_shapes import ShapesOnly
from tests.memory import nets

# Least cosine between the adapter's gradients on the base in few bits and on the plain one, with random
# weights and with those of a trained base.
CLOSENESS = {"int8": 0.999, "fp8": 0.98, "nf4": 0.8}
TRAINED_CLOSENESS = {"int8": 0.999, "fp8": 0.99, "nf4": 0.95}
BITS = {"int8": 8, "fp8": 8, "nf4": 4}


def in_few_bits(model: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in model.named_modules() if is_in_few_bits(layer)}


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_gradients_are_those_of_the_weights_that_it_stands_for(tiny_sd: Path, kind: str) -> None:
    """Exactness of the technique, and closeness to the plain base."""
    plain = nets.load(tiny_sd)
    reference = nets.gradients(plain, nets.adapt(plain))
    unet = nets.load(tiny_sd)
    parameters = nets.adapt(unet)
    assert quantise.quantise(unet, kind, "cpu") == len(in_few_bits(unet)) > 60
    ours = nets.gradients(unet, parameters)

    equal = nets.load(tiny_sd)
    layers = dict(equal.named_modules())
    for path, layer in in_few_bits(unet).items():
        weight = dequantised(layer, torch.float32)
        layers[path.replace(".base_layer", "")].weight.data = weight
    torch.testing.assert_close(ours, nets.gradients(equal, nets.adapt(equal)), rtol=1e-6, atol=1e-8)
    assert nets.cosine(ours, reference) > CLOSENESS[kind]


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_a_trained_base_is_closer(kind: str) -> None:
    from lorabooth.families import registry, source

    found = source.resolve("pocket")
    family = registry.family(found.family)
    parts = family.load(found, torch.float32)
    again = family.load(found, torch.float32).denoiser
    cond = family.collate(family.encode_prompts(parts, ["a photo of a mug"]))["encoder_hidden_states"]
    x = torch.randn(1, parts.denoiser.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss(unet: Any) -> Tensor:
        return (unet(x, torch.tensor([300]), cond).sample - x).square().mean()  # type: ignore[no-any-return]

    def small(unet: nn.Module) -> list[nn.Parameter]:
        parameters = nets.adapt(unet, [nets.ATTENTION])
        with torch.no_grad():
            for p in parameters:
                p.mul_(0.2)
        return parameters

    reference = nets.gradients(parts.denoiser, small(parts.denoiser), loss)
    parameters = small(again)
    quantise.quantise(again, kind, "cpu")
    assert nets.cosine(nets.gradients(again, parameters, loss), reference) > TRAINED_CLOSENESS[kind]


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_few_bits_are_few_and_what_must_stay_stays(tiny_sd: Path, kind: str) -> None:
    unet = nets.load(tiny_sd)
    sizes = {path: layer.weight.numel() for path, layer in quantise.quantisable(unet).items()}
    quantise.quantise(unet, kind, "cpu")
    for path, layer in in_few_bits(unet).items():
        held = [getattr(layer, name) for name in layer.stored_names if name != "weight_code"]
        stored = sum(t.numel() * t.element_size() for t in held)
        rows = dequantised(layer, torch.float32).shape[0]
        # A scale for each row, or (NF4) 8 bits and an eighth of one for each block of 64.
        assert stored <= sizes[path] * BITS[kind] / 8 + max(4 * rows, sizes[path] / 64 * 1.2 + 16)
    stays = (unet.conv_in, unet.conv_out, unet.time_embedding.linear_1, unet.conv_norm_out)
    assert not any(is_in_few_bits(module) for module in stays)
    assert not any(word in path for path in in_few_bits(unet) for word in ("norm", "emb", "time", "lora"))
    convolutions = [m for m in in_few_bits(unet).values() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 10


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_recomputed_layers_keep_no_inputs(tiny_sd: Path, kind: str) -> None:
    """What bitsandbytes' own 8-bit layers would keep past a checkpoint's back."""
    unet, checkpointed = nets.load(tiny_sd), nets.load(tiny_sd)
    parameters, ours = nets.adapt(unet), nets.adapt(checkpointed)
    for net in (unet, checkpointed):
        quantise.quantise(net, kind, "cpu")
    recompute(checkpointed)
    alive: list[int] = []
    for net in (unet, checkpointed):
        tensors: list[Any] = []
        hooks = [m.register_forward_pre_hook(_noter(tensors)) for m in in_few_bits(net).values()]
        kept = nets.loss(net)
        alive.append(len([ref for ref in tensors if ref() is not None]))
        del kept
        for hook in hooks:
            hook.remove()
    assert alive[1] < alive[0] / 3
    torch.testing.assert_close(
        nets.gradients(checkpointed, ours), nets.gradients(unet, parameters), rtol=0, atol=0
    )


def _noter(tensors: list[Any]) -> Any:
    import weakref

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tensors.append(weakref.ref(args[0].untyped_storage()))

    return note


def test_int8_is_bitsandbytes_int8_and_survives_what_overflows_there() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = nn.Linear(64, 8).requires_grad_(False)
    weight = layer.weight.detach().clone()
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    quantise.quantise(nn.ModuleDict({"layer": layer}), "int8", "cpu")
    assert (layer.weight - codes).abs().max() <= 1  # it rounds from float16
    torch.testing.assert_close(layer.weight_scale * 127, scales, rtol=1e-3, atol=0)
    for kind in quantise.KINDS:
        huge = nn.Linear(64, 8).requires_grad_(False)
        huge.weight.data[0, 0] = 1e5
        quantise.quantise(nn.ModuleDict({"layer": huge}), kind, "cpu")
        restored = dequantised(huge, torch.float32)
        assert abs(float(restored[0, 0]) / 1e5 - 1) < 0.01
        assert torch.isfinite(restored).all()


def test_nf4_is_bitsandbytes_nf4_with_double_quantisation() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(quantise._dynamic_code("cpu"), functional.create_dynamic_map())
    layer = nn.Linear(128, 64).requires_grad_(False)
    weight = layer.weight.detach().clone()
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    quantise.quantise(nn.ModuleDict({"layer": layer}), "nf4", "cpu")
    torch.testing.assert_close(
        dequantised(layer, torch.float32), functional.dequantize_4bit(packed, state), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_the_adapters_file_is_as_ever_and_fits_the_plain_base(
    tiny_sd: Path, tmp_path: Path, kind: str
) -> None:
    unet, plain = nets.load(tiny_sd), nets.load(tiny_sd)
    parameters = nets.adapt(unet)
    quantise.quantise(unet, kind, "cpu")
    assert {p.dtype for p in parameters} == {torch.float32}
    saved = inject.tensors({"denoiser": unet})
    file.write(tmp_path / "adapter.safetensors", saved, file.Metadata(family="sd1", base_id="tiny"))
    read = file.read(tmp_path / "adapter.safetensors").tensors
    inject.attach_tensors({"denoiser": plain}, read)
    torch.testing.assert_close(inject.tensors({"denoiser": plain}), saved, rtol=0, atol=0)
    with inject.disabled({"denoiser": unet}), torch.no_grad():
        off = nets.loss(unet)
    assert off != nets.loss(unet)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_casting_and_moving_leave_what_is_stored(tiny_sd: Path, kind: str) -> None:
    unet = nets.load(tiny_sd)
    quantise.quantise(unet, kind, "cpu")
    name, layer = next(iter(in_few_bits(unet).items()))
    before = {key: getattr(layer, key).clone() for key in layer.stored_names}
    unet.requires_grad_(False)
    nn.Module.to(unet, torch.bfloat16)
    assert unet.conv_in.weight.dtype == torch.bfloat16, name
    for key, tensor in before.items():
        torch.testing.assert_close(getattr(layer, key).float(), tensor.float(), rtol=0, atol=0)
        assert getattr(layer, key).dtype == tensor.dtype


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_shapes_can_be_stored_and_trained_too(tiny_sd: Path, kind: str) -> None:
    """A prediction of memory runs the same code on shapes, and leaves nothing of them behind."""
    from diffusers import UNet2DConditionModel

    with ShapesOnly():
        config = UNet2DConditionModel.load_config(str(tiny_sd / "unet"))
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
        parameters = nets.adapt(unet)
        quantise.quantise(unet, kind, "cpu")
        recompute(unet, offload=True, offload_from_bytes=0)
        found = nets.gradients(unet, parameters)
        assert [g.shape for g in found] == [p.shape for p in parameters]
    assert quantise.kind_problem(kind, "cpu") == ""


def test_without_bitsandbytes_nf4_is_refused_and_int8_and_fp8_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    problem = quantise.kind_problem("nf4", "cpu")
    assert "pip install 'lorabooth[gpu]'" in problem
    with pytest.raises(RecipeError, match="nf4"):
        quantise.quantise(nn.Linear(2, 2), "nf4", "cpu")
    assert quantise.kind_problem("int8", "cpu") == quantise.kind_problem("fp8", "cpu") == ""


def test_a_device_that_cannot_is_told() -> None:
    assert "does not run on meta" in quantise.kind_problem("int8", "meta")
