"""The counter counts what an allocator is asked for: by hand, and beside torch's own profiler."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lorabooth.memory.host import HOST, SCRATCH, making
from lorabooth.memory.meter import Meter, Usage
from lorabooth.memory.meter_cuda import CudaArithmetic, libraries_bytes
from lorabooth.memory.meter_shapes import ShapesOnly, Uninitialised

WORLDS = pytest.mark.parametrize("world", [nullcontext, ShapesOnly], ids=["numbers", "shapes"])
World = Callable[[], AbstractContextManager[object]]


@WORLDS
def test_a_storage_counts_once_from_its_making_to_its_last_view(world: World) -> None:
    with world(), Meter() as meter:
        whole = torch.empty(1000)
        part = whole[10:20].view(2, 5).t()
        part.add_(1).mul_(2)
        assert meter.live_bytes == 4000
        del whole
        assert meter.live_bytes == 4000
        del part
        assert meter.live_bytes == 0
        assert meter.usage().peak_bytes == 4000


@WORLDS
def test_the_peak_is_split_at_its_own_moment(world: World) -> None:
    with world(), Meter() as meter:
        with meter.during("early"):
            gone = torch.empty(100, dtype=torch.uint8)
        with meter.during("late"):
            stays = torch.empty(30, dtype=torch.uint8)
        del gone
        with meter.during("after"):
            small = torch.empty(20, dtype=torch.uint8)
        assert dict(meter.usage().at_peak) == {"early": 100, "late": 30}
        assert dict(meter.live()) == {"late": 30, "after": 20}
        meter.reset_peak()
        assert meter.usage() == Usage(50, meter.live())
        del stays, small


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5000)), min_size=1, max_size=12))
def test_the_parts_add_up_whatever_was_made(made: list[tuple[str, int]]) -> None:
    with ShapesOnly(), Meter(granule_bytes=512) as meter:
        kept: list[Tensor] = []
        for index, (component, size) in enumerate(made):
            with meter.during(component):
                kept.append(torch.empty(size, dtype=torch.uint8))
            if index % 3 == 2:
                kept.pop(0)
        usage = meter.usage()
        assert sum(usage.at_peak.values()) == usage.peak_bytes
        assert meter.live_bytes == sum(-(-tensor.numel() // 512) * 512 for tensor in kept)
        assert usage.peak_bytes % 512 == 0


@WORLDS
def test_what_autograd_saves_lives_until_the_backward_pass(world: World) -> None:
    """exp keeps its output: by hand, 3 x 4000 bytes at the most (x is watched, y saved, gradients arrive)."""
    with world():
        x = torch.zeros(1000, requires_grad=True)
        with Meter() as meter:
            meter.watch("input", x)
            loss = x.exp().sum()
            assert dict(meter.live()) == {"input": 4000, "activations": 4004}
            loss.backward()  # type: ignore[no-untyped-call]
            assert dict(meter.live()) == {"input": 4000, "activations": 4004}
            # x, exp(x), the loss, its gradient (expanded: 4 bytes), the gradient of x
            assert meter.usage().peak_bytes == 4000 + 4000 + 4 + 4 + 4000


@WORLDS
def test_gradients_become_gradients_as_they_arrive(world: World) -> None:
    with world():
        layer = nn.Linear(10, 10)
        with Meter() as meter:
            meter.watch("weights", layer)
            with meter.gradients(layer.parameters()):
                layer(torch.ones(2, 10)).sum().backward()
            assert dict(meter.live()) == {"weights": 440, "gradients": 440}
            layer.zero_grad(set_to_none=True)
            assert dict(meter.live()) == {"weights": 440}


def test_what_nobody_watches_does_not_count_through_its_views() -> None:
    before = torch.empty(1000)
    with Meter() as meter:
        view = before[:10].view(-1)
        view.add_(1)
        assert meter.live_bytes == 0
        fresh = torch.tensor([1.0, 2.0])
        assert meter.live_bytes == 8
        del view, fresh


def test_a_storage_may_grow() -> None:
    with Meter() as meter:
        tensor = torch.empty(10)
        tensor.resize_(1000)
        assert meter.live_bytes == 4000
        del tensor
        assert meter.live_bytes == 0


def test_what_is_watched_again_changes_its_component_and_what_is_dropped_is_gone() -> None:
    with Meter() as meter:
        a, b = torch.empty(10), torch.empty(20)
        meter.watch("a", a)
        assert dict(meter.live()) == {"activations": 80, "a": 40}
        meter.drop(b)
        del b
        assert dict(meter.live()) == {"a": 40}
        del a


def test_what_is_made_for_the_host_counts_where_there_is_one_memory() -> None:
    for host_counts in (True, False):
        with ShapesOnly(), Meter(host_counts=host_counts) as meter:
            with making(HOST):
                away = torch.empty(10)
            with making(SCRATCH):
                unpacked = torch.empty(20)
            away.add_(1)
            expected = {SCRATCH: 80, HOST: 40} if host_counts else {SCRATCH: 80}
            assert dict(meter.live()) == expected
            del away, unpacked


def test_a_counter_that_is_gone_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[object] = []  # what a weak reference's callback raises is told to nobody else
    monkeypatch.setattr(sys, "unraisablehook", wrong.append)
    with Meter() as meter:
        kept = torch.empty(10)
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
    del kept
    assert not wrong


# --- beside an independent measure: torch's profiler reports every allocation of its CPU allocator


def profiled_peak_bytes(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["mlp", "transformer", "checkpointed"])
def test_the_peak_is_the_allocators_own(kind: str) -> None:
    """Nets whose kernels take nothing for themselves: equal to the byte."""
    net: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64))
    if kind == "transformer":
        net = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    x = torch.randn(4, 32, 64)

    def work() -> None:
        # The state of the random numbers, which a checkpoint may keep, is made past every mode.
        again = {"use_reentrant": False, "preserve_rng_state": False}
        out = checkpoint(net, x, **again) if kind == "checkpointed" else net(x)
        out.square().mean().backward()
        net.zero_grad(set_to_none=True)

    work()  # what torch makes once
    with Meter() as meter:
        work()
    assert meter.usage().peak_bytes == profiled_peak_bytes(work)


# --- shapes


def test_a_module_of_shapes_can_be_moved_and_cast() -> None:
    with ShapesOnly(), Meter() as meter:
        layer = nn.Linear(10, 10)
        layer.to("cpu").to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        assert meter.live_bytes == 220
        with Uninitialised():
            other = nn.Conv2d(3, 8, 3)
        assert meter.live_bytes == 220 + 4 * (8 * 3 * 9 + 8)
        del other


def attend(kernel: SDPBackend) -> dict[str, int]:
    """What attention keeps for the backward pass, beyond q, k and v."""
    with ShapesOnly(), Meter() as meter, sdpa_kernel([kernel]):
        q, k, v = (torch.empty(2, 4, 256, 8, requires_grad=True) for _ in range(3))
        meter.watch("qkv", q, k, v)
        with meter.during("kept"):
            out = F.scaled_dot_product_attention(q, k, v)
        kept = dict(meter.live())
        del out
        return kept


def test_attention_keeps_what_its_kernel_keeps() -> None:
    qkv = 2 * 4 * 256 * 8 * 4
    matrix = 2 * 4 * 256 * 256 * 4
    lean = attend(SDPBackend.FLASH_ATTENTION)
    assert lean == {"qkv": 3 * qkv, "kept": qkv + 2 * 4 * 256 * 4}  # the output and a log-sum-exp per query
    math = attend(SDPBackend.MATH)
    assert math["kept"] >= matrix + qkv  # softmax's output and the result, at least


# --- CUDA's arithmetic on shapes that are labelled "cpu"


def kept_by(op: Callable[[Tensor], Tensor], *, cuda: bool) -> tuple[torch.dtype, int]:
    """(dtype of the result, bytes that stay for the backward pass) of an op on 1000 bfloat16 numbers."""
    with ShapesOnly(), CudaArithmetic() if cuda else nullcontext(), Meter() as meter:
        x = torch.empty(10, 100, dtype=torch.bfloat16, requires_grad=True)
        meter.watch("x", x)
        with torch.autocast("cpu", torch.bfloat16):
            out = op(x)
        meter.drop(x)
        return out.dtype, meter.live_bytes


@pytest.mark.parametrize(
    ("op", "statistics_bytes"),
    [
        (lambda x: F.layer_norm(x, (100,)), 2 * 10 * 4),
        (lambda x: F.group_norm(x, 4), 2 * 10 * 4 * 4),
    ],
    ids=["layer_norm", "group_norm"],
)
def test_norms_run_and_keep_in_float32_under_cudas_autocast(
    op: Callable[[Tensor], Tensor], statistics_bytes: int
) -> None:
    dtype, kept = kept_by(op, cuda=True)
    assert dtype == torch.float32
    assert kept == 4000 + 4000 + statistics_bytes  # the widened input, the output, mean and 1/std
    dtype, kept = kept_by(op, cuda=False)
    assert dtype == torch.bfloat16
    assert kept < 4000


def test_ops_that_cuda_does_not_widen_stay() -> None:
    for op in (F.silu, F.gelu, lambda x: x + x):
        assert kept_by(op, cuda=True) == kept_by(op, cuda=False)
    assert kept_by(lambda x: x.softmax(-1), cuda=True)[0] == torch.float32
    assert kept_by(lambda x: x.pow(2), cuda=True)[0] == torch.float32


def test_nothing_is_widened_outside_of_autocast() -> None:
    with ShapesOnly(), CudaArithmetic():
        assert F.layer_norm(torch.empty(2, 8, dtype=torch.bfloat16), (8,)).dtype == torch.bfloat16


def test_what_is_recomputed_is_widened_too() -> None:
    """A checkpoint compares what it computes again with what it was: a mode that misses it fails."""
    with ShapesOnly(), CudaArithmetic():
        norm = nn.LayerNorm(8, dtype=torch.bfloat16)
        x = torch.empty(2, 8, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(norm, x, use_reentrant=False)
        assert out.dtype == torch.float32
        out.sum().backward()
        assert x.grad is not None


def test_the_workspace_of_cublas_is_by_capability() -> None:
    assert libraries_bytes("8.6") == 8_519_680  # what torch.cuda.memory_snapshot shows after one product
    assert libraries_bytes("9.0") == 32 << 20
