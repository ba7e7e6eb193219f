"""What the adapter adds to a forward and backward pass: peft's own forward, and the lean one that is used.

    python benchmarks/lora_overhead.py

"base" is the frozen network with a gradient that enters where the first adapted block does, so that all
three go backward through the same layers. On the CPU a 70 M UNet at 256 px in fp32; on a GPU, where there
is one, SD1.5's size at 512 px in bf16. A batch of two, adapters on attention. In each round all
three run in turn; the overhead is the median over the rounds of their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from peft.tuners.lora.layer import Linear  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.facts import machine_facts  # noqa: E402
from benchmarks.model_folder import CHANNELS  # noqa: E402
from benchmarks.published import configs  # noqa: E402
from lorabooth.adapters import inject  # noqa: E402
from lorabooth.adapters.lean_forward import LeanLinear  # noqa: E402
from lorabooth.memory.meter_shapes import ShapesOnly  # noqa: E402

TARGETS = (r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",)
SMALL = {
    "sample_size": 32,
    "block_out_channels": CHANNELS,
    "layers_per_block": 1,
    "cross_attention_dim": 512,
    "attention_head_dim": 8,
}


@contextmanager
def gradient_from_the_first_block(unet: Any) -> Iterator[None]:
    """A gradient enters where the first adapted layer is, as with an adapter, without one."""
    block = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    handle = block.register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def peft_forward(unet: Any) -> Iterator[None]:
    """Peft's own forward."""
    lean = [module for module in unet.modules() if type(module) is LeanLinear]
    for module in lean:
        module.__class__ = Linear
    try:
        yield
    finally:
        for module in lean:
            module.__class__ = LeanLinear


def measure(device: str, resolution_px: int, rank: int, rounds: int) -> dict[str, Any]:
    """Median seconds of each kind, in turns."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(SMALL if device == "cpu" else configs("sd15")["unet"])
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    unet.requires_grad_(False).to(device, dtype)
    side = resolution_px // 8
    x = torch.randn(2, 4, side, side).to(device, dtype)
    text = torch.randn(2, 77, unet.config.cross_attention_dim).to(device, dtype)
    level = torch.tensor([10, 500], device=device)
    attached = inject.attach(
        {"denoiser": unet}, [inject.Target("denoiser", TARGETS, rank, float(rank))], seed=0
    )
    autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()

    def seconds() -> float:
        for parameter in attached.parameters():
            parameter.grad = None
        began = time.perf_counter()
        with autocast:
            loss = unet(x, level, text).sample.float().square().mean()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def base() -> float:
        with inject.disabled({"denoiser": unet}), gradient_from_the_first_block(unet):
            return seconds()

    def peft() -> float:
        with peft_forward(unet):
            return seconds()

    kinds: dict[str, Callable[[], float]] = {"base": base, "peft": peft, "lean": seconds}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(rounds + 2):
        for kind, run in kinds.items():
            taken = run()
            if round_ >= 2:
                found[kind].append(taken)
    median = {kind: statistics.median(times) for kind, times in found.items()}
    return {
        "device": device,
        "resolution_px": resolution_px,
        "rank": rank,
        "precision": str(dtype).removeprefix("torch."),
        "unet_parameters": sum(p.numel() for p in unet.parameters()) - attached.n_parameters,
        "adapted_layers": attached.n_modules,
        **{f"{kind}_s": value for kind, value in median.items()},
        **{
            f"{kind}_overhead": statistics.median(
                one / base - 1 for one, base in zip(found[kind], found["base"], strict=True)
            )
            for kind in ("peft", "lean")
        },
    }


class _Kernels(TorchDispatchMode):
    """Counts operations that launch something: views and questions do not."""

    QUIET = frozenset(
        [
            "view",
            "t",
            "transpose",
            "expand",
            "detach",
            "slice",
            "split",
            "split_with_sizes",
            "_unsafe_view",
            "unsqueeze",
            "permute",
            "select",
            "alias",
            "as_strided",
            "_reshape_alias",
            "chunk",
            "empty",
            "empty_like",
            "device",
            "new_empty",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launched += func.overloadpacket.__name__ not in self.QUIET
        return func(*args, **(kwargs or {}))


def kernels(rank: int) -> dict[str, Any]:
    """Operations of a forward and backward pass of SD1.5's size in bf16, on shapes alone: needs no device.

    On a fast GPU a step at batch 1 + 1 waits for launches, so that their number is what an adapter costs.
    """
    with ShapesOnly():
        unet: Any = UNet2DConditionModel.from_config(configs("sd15")["unet"]).requires_grad_(False)
        unet.to(torch.bfloat16)
        target = inject.Target("denoiser", TARGETS, rank, float(rank))
        attached = inject.attach({"denoiser": unet}, [target], seed=0)
        x = torch.empty(2, 4, 64, 64, dtype=torch.bfloat16)
        text = torch.empty(2, 77, 768, dtype=torch.bfloat16)

        def count() -> int:
            for parameter in attached.parameters():
                parameter.grad = None
            with _Kernels() as counted:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = unet(x, torch.empty(2), text).sample.float().square().mean()
                loss.backward()
            return counted.launched

        with inject.disabled({"denoiser": unet}), gradient_from_the_first_block(unet):
            base = count()
        with peft_forward(unet):
            peft = count()
        lean = count()
    return {"size": "sd15", "rank": rank, "base": base, "peft_more": peft - base, "lean_more": lean - base}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--resolution", type=int, default=256, help="on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lora_overhead.json")
    args = parser.parse_args()
    rows = [measure("cpu", args.resolution, rank, args.rounds) for rank in args.ranks]
    if torch.cuda.is_available():
        rows += [measure("cuda", 512, rank, 4 * args.rounds) for rank in args.ranks]
    result = {
        "what": "seconds of forward and backward on a batch of two; overhead of the adapter over the base",
        "machine": machine_facts(),
        "rounds": args.rounds,
        "rows": rows,
        "operations": kernels(16),
        "gpu": "measured" if torch.cuda.is_available() else "not measured",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
