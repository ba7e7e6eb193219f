"""A U-Net without its deep middle is the whole net, as long as that is given the same activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lorabooth.adapters import inject
from lorabooth.errors import RecipeError
from lorabooth.families.release import Released, assert_released
from lorabooth.memory import apply, hollow
from lorabooth.memory.meter_shapes import ShapesOnly
from lorabooth.pocket.unet import make_unet

ATTENTION = (r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)
WITH_CONVOLUTIONS = (
    *ATTENTION,
    r".*\.resnets\.\d+\.(conv1|conv2)",
    r".*\.(downsamplers|upsamplers)\.\d+\.conv",
)


def _sd(*, linear: bool = False, layers: int = 1) -> UNet2DConditionModel:
    """Four levels, as Stable Diffusion has them."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=layers,
        cross_attention_dim=16,
        attention_head_dim=[1, 1, 2, 2] if linear else 2,
        norm_num_groups=4,
        use_linear_projection=linear,
    )


def _pocket() -> UNet2DConditionModel:
    return make_unet()


NETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd1": _sd,
    "sd2": lambda: _sd(linear=True, layers=2),
    "pocket": _pocket,
}


def _frozen(name: str) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETS[name]()
    return net.requires_grad_(False).eval()


def _inputs(net: UNet2DConditionModel, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, net.config.in_channels, height, width, generator=generator)
    text = torch.randn(2, 5, net.config.cross_attention_dim, generator=generator)
    return x, torch.tensor([7, 800]), text


def _attach(net: nn.Module, patterns: tuple[str, ...]) -> inject.Attached:
    """With an effect."""
    attached = inject.attach({"denoiser": net}, [inject.Target("denoiser", patterns, 2, 2.0)], seed=0)
    with torch.no_grad():
        for index, weight in enumerate(attached.up_weights()):
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(index))
    return attached


def _captured(net: UNet2DConditionModel, keep: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(activation, output) of the whole net without adapters."""
    with (
        torch.no_grad(),
        inject.disabled({"denoiser": net}),
        hollow.capture(net, keep, to_the_end=True) as seen,
    ):
        output = net(*inputs, return_dict=False)[0]
    return seen[0], output


@contextmanager
def _given(net: UNet2DConditionModel, keep: int, activation: Tensor):
    """The whole net, whose deep middle computes but sends up the given activation."""
    place = f"up_blocks.{len(net.up_blocks) - keep - 1}.upsamplers.0"
    handle = net.get_submodule(place).register_forward_pre_hook(lambda _, args: (activation, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("name", "keep"), [("sd1", 1), ("sd1", 2), ("sd1", 3), ("sd2", 2), ("pocket", 1)])
@pytest.mark.parametrize("size", [(16, 16), (17, 11)], ids=["even", "odd"])
def test_without_an_adapters_effect_the_output_is_the_whole_nets(
    name: str, keep: int, size: tuple[int, int]
) -> None:
    net = _frozen(name)
    inputs = _inputs(net, *size)
    activation, output = _captured(net, keep, inputs)
    assert activation.shape[1:] == hollow.stored_shape(net, keep, inputs[0].shape[1:])
    hollow.hollow_out(net, keep)
    assert activation.shape[1:] == hollow.stored_shape(net, keep, inputs[0].shape[1:])
    with torch.no_grad(), hollow.filled(net, activation):
        assert torch.equal(net(*inputs, return_dict=False)[0], output)
        # What stays is really used: another input, another output.
        other = net(inputs[0] + 1, *inputs[1:], return_dict=False)[0]
    assert not torch.allclose(other, output, atol=1e-3)


@pytest.mark.parametrize(("name", "keep"), [("sd1", 2), ("pocket", 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_net_with_its_deep_middle_given(
    name: str, keep: int, checkpointing: bool
) -> None:
    whole = _frozen(name)
    inputs = _inputs(whole)
    activation, _ = _captured(whole, keep, inputs)
    patterns = hollow.kept_patterns(whole, keep, WITH_CONVOLUTIONS)
    attached = _attach(whole, patterns)
    net = copy.deepcopy(whole).train()
    own = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if checkpointing:
        apply.enable_checkpointing(net)
    hollow.hollow_out(net, keep)
    with hollow.filled(net, activation):
        output = net(*inputs, return_dict=False)[0]
    output.square().mean().backward()
    with _given(whole, keep, activation):
        expected = whole(*inputs, return_dict=False)[0]
    expected.square().mean().backward()
    assert torch.equal(output, expected)
    theirs = attached.parameters()
    assert len(own) == len(theirs) > 20
    for mine, other in zip(own, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-6)
    assert sum(float(weight.grad.abs().max()) > 0 for weight in own) == len(own), "a factor gets no gradient"


def test_an_adapter_sits_on_layers_that_stay_under_the_whole_nets_names() -> None:
    keep = 2
    net, fresh = _frozen("sd1"), _frozen("sd1")
    attached = _attach(net, hollow.kept_patterns(net, keep, WITH_CONVOLUTIONS))
    everywhere = set(_attach(_frozen("sd1"), WITH_CONVOLUTIONS).modules)
    deep = ("down_blocks.2", "down_blocks.3", "mid_block", "up_blocks.0", "up_blocks.1.resnets")
    deep += ("up_blocks.1.attentions", "down_blocks.1.downsamplers")
    expected = {
        name for name in everywhere if not name.startswith(tuple(f"denoiser.{place}." for place in deep))
    }
    assert set(attached.modules) == expected
    assert "denoiser.up_blocks.1.upsamplers.0.conv" in expected
    hollow.hollow_out(net, keep)
    tensors = inject.tensors({"denoiser": net})
    inputs = _inputs(fresh)
    with torch.no_grad():
        before = fresh(*inputs, return_dict=False)[0]
        inject.attach_tensors({"denoiser": fresh}, tensors)
        assert not torch.allclose(fresh(*inputs, return_dict=False)[0], before, atol=1e-3)
    assert set(inject.tensors({"denoiser": fresh})) == set(tensors)


def test_what_is_taken_out_is_gone_and_counted() -> None:
    net = _frozen("sd1")
    _attach(net, hollow.kept_patterns(net, 2, ATTENTION))
    before = sum(parameter.numel() for parameter in net.parameters())
    gone = hollow.hollow_out(net, 2)
    after = sum(parameter.numel() for parameter in net.parameters())
    assert_released(Released(("deep middle",), gone.removed_bytes, gone.modules, gone.tensors))
    assert after == gone.kept_parameters
    assert before - after == gone.removed_parameters
    assert gone.removed_bytes == 4 * gone.removed_parameters
    assert not [path for path, _ in net.named_parameters() if path.startswith(("mid_block", "up_blocks.0"))]


def test_what_is_still_held_is_told() -> None:
    net = _frozen("sd1")
    held = net.mid_block
    gone = hollow.hollow_out(net, 2)
    with pytest.raises(RuntimeError, match="mid_block"):
        assert_released(Released(("deep middle",), gone.removed_bytes, gone.modules, gone.tensors))
    del held


def test_whole_for_a_while_it_is_the_whole_net_with_the_adapter() -> None:
    keep = 2
    net, full = _frozen("sd1"), _frozen("sd1")
    inputs = _inputs(net)
    activation, _ = _captured(net, keep, inputs)
    _attach(net, hollow.kept_patterns(net, keep, WITH_CONVOLUTIONS))
    with torch.no_grad():
        expected = net(*inputs, return_dict=False)[0]
        hollow.hollow_out(net, keep)
        with hollow.filled(net, activation):
            hollowed = net(*inputs, return_dict=False)[0]
        with hollow.whole(net, full):
            assert torch.equal(net(*inputs, return_dict=False)[0], expected)
        with hollow.filled(net, activation):
            assert torch.equal(net(*inputs, return_dict=False)[0], hollowed)
    del full
    with pytest.raises(RuntimeError, match=r"hollow\.filled"):
        net(*inputs)


def test_an_error_while_whole_leaves_it_hollow() -> None:
    net = _frozen("sd1")
    hollow.hollow_out(net, 1)
    left = sum(parameter.numel() for parameter in net.parameters())
    with pytest.raises(KeyError), hollow.whole(net, _frozen("sd1")):
        raise KeyError
    assert sum(parameter.numel() for parameter in net.parameters()) == left


def test_a_pass_can_end_where_the_activation_is_seen() -> None:
    net = _frozen("sd1")
    inputs = _inputs(net)
    expected, _ = _captured(net, 2, inputs)
    with (
        torch.no_grad(),
        hollow.capture(net, 2, to_the_end=False) as seen,
        pytest.raises(hollow.CapturedError),
    ):
        net(*inputs)
    assert torch.equal(seen[0], expected)
    net(*inputs)  # the hook is gone


def test_the_automatic_choice_leaves_most_of_the_published_bases_out() -> None:
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        sd21 = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    for net in (sd15, sd21):
        keep, reason = hollow.automatic_keep(net)
        assert keep == 2
        assert "82%" in reason
    assert hollow.stored_shape(sd15, 2, (4, 64, 64)) == (1280, 16, 16)
    assert hollow.automatic_keep(_frozen("pocket"))[0] == 1


@pytest.mark.parametrize(
    ("denoiser", "keep", "message"),
    [
        (nn.Linear(2, 2), "auto", "Linear is no U-Net"),
        (_sd(), 4, "4 of 4 levels"),
        (_sd(), 9, r"Give 1 to 3, or .auto"),
    ],
)
def test_what_has_no_inside_is_refused(denoiser: nn.Module, keep: int | str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        hollow.keep_of(denoiser, keep)
    assert caught.match(message)


def test_fake_modules_do() -> None:
    """As a prediction of memory runs it: shapes only."""
    with ShapesOnly():
        net = _sd().requires_grad_(False)
        x, level, text = torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5, 16)
        inject.attach(
            {"denoiser": net},
            [inject.Target("denoiser", hollow.kept_patterns(net, 2, ATTENTION), 2, 2.0)],
            seed=0,
        )
        gone = hollow.hollow_out(net, 2)
        activation = torch.zeros(2, *hollow.stored_shape(net, 2, x.shape[1:]))
        with hollow.filled(net, activation):
            net(x, level, text, return_dict=False)[0].sum().backward()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        assert trained
        assert all(parameter.grad is not None for parameter in trained)
    real = _frozen("sd1")
    assert gone.removed_parameters == hollow.hollow_out(real, 2).removed_parameters
