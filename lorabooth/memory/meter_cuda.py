"""What CUDA does otherwise than a CPU, for counting a CUDA step over shapes labelled "cpu".

Modelled, with its source in torch:

- Autocast runs norms, powers, losses, upsampling and softmax in float32 (aten/src/ATen/autocast_mode.h,
  AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE; the CPU's list is shorter): `CudaArithmetic` widens their
  inputs, so that autograd keeps the float32 copies as it does on a GPU.
- Scaled dot product attention keeps q, k, v, the output and a float32 log-sum-exp per query
  (tools/autograd/derivatives.yaml, _scaled_dot_product_flash_attention and _efficient_attention); torch's
  flash kernel for the CPU, which shapes labelled "cpu" take, keeps the same.
- Sizes are rounded up to 512 bytes (c10/cuda/CUDACachingAllocator.h, kMinBlockSize).
- cuBLAS' workspace (`libraries_bytes`) and the context (`CONTEXT_BYTES`).

Not modelled: what kernels take and give back within one op (cuDNN's convolution workspaces, the float32
accumulator of flash attention's backward pass), the remainder of up to 1 MiB that the allocator leaves at the
end of a large block, and fragmentation. A plan's margin is for these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GRANULE_BYTES = 512
CONTEXT_BYTES = 512 << 20
"""Memory that a process's CUDA context and its loaded kernels take outside of torch's allocator.

A stated allowance, not a measurement: it differs by GPU, driver and torch build.
"""
_WORKSPACE_BYTES = (2 * 4096 + 8 * 16) << 10
_HOPPER_WORKSPACE_BYTES = 32 << 20
_NARROW = (torch.bfloat16, torch.float16)
# By name, because a function and a tensor's method of one name are the same op.
_NORMS = ("group_norm", "layer_norm", "rms_norm", "cosine_similarity", "renorm")
_POWERS = (
    "pow",
    "__pow__",
    "__rpow__",
    "exp",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "reciprocal",
    "rsqrt",
)
_LOSSES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "nll_loss")
_OTHERS = ("softplus", "logsumexp", "dist", "cdist", "pdist", "interpolate", "upsample")
_WIDENED = frozenset((*_NORMS, *_POWERS, *_LOSSES, *_OTHERS, "binary_cross_entropy_with_logits"))
_TOLD_FLOAT32 = frozenset({"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"})


def libraries_bytes(capability: str) -> int:
    """The workspace of cuBLAS, which comes from torch's allocator with the first matrix product and stays.

    Two buffers of 4096 KiB and eight of 16 KiB, and 32 MiB on compute capability 9.0
    (aten/src/ATen/cuda/CublasHandlePool.cpp; CUBLAS_WORKSPACE_CONFIG changes it).

    Args:
        capability: of the GPU, such as "8.6"; "" if it is not known.
    """
    return _HOPPER_WORKSPACE_BYTES if capability.startswith("9.") else _WORKSPACE_BYTES


class CudaArithmetic(TorchFunctionMode):
    """Inside, ops that CUDA's autocast runs in float32 do so under the CPU's autocast as well."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Widen the inputs where CUDA would."""
        options = dict(kwargs or {})
        if func is Tensor.backward:
            # A mode does not see what is called within a function that it has taken, and checkpoints compute
            # within `backward`. By its edge the loss is no tensor that a mode could take once more.
            with self:
                edge = get_gradient_edge(args[0])
                return torch.autograd.backward(edge, options.pop("gradient", None), **options)
        name = getattr(func, "__name__", "")
        if (name in _WIDENED or name in _TOLD_FLOAT32) and torch.is_autocast_enabled("cpu"):
            if name in _WIDENED:
                args, options = tree_map(_widen, (tuple(args), options))
            elif args and isinstance(args[0], Tensor) and args[0].dtype in _NARROW:
                options["dtype"] = options.get("dtype") or torch.float32
        return func(*args, **options)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
