"""What this machine is, in facts that may be shown to anyone: names, sizes, versions; no paths, no users."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "lorabooth",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
    "xformers",
    "numpy",
    "pillow",
)


@dataclass(frozen=True, slots=True)
class Device:
    """One device that tensors can live on.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        name: what its maker calls it.
        total_bytes: its memory.
        free_bytes: what of it is free now.
        capability: compute capability such as "9.0", or "".
        bf16: whether bfloat16 arithmetic is native.
    """

    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: str
    bf16: bool


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, "absent" for those not installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def default_device() -> str:
    """Where work runs unless told otherwise: "cuda", else "mps", else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_facts(device: object = "") -> dict[str, str | int | bool]:
    """`describe_device` as a JSON object, for run.json."""
    return asdict(describe_device(device))


def describe_device(device: object = "") -> Device:
    """Facts of one device, by default of the one that work would run on.

    Args:
        device: a torch.device, or "cpu", "cuda", "cuda:1", "mps"; empty for `default_device()`.
    """
    import psutil  # type: ignore[import-untyped]
    import torch

    place = torch.device(str(device) or default_device())
    if place.type == "cuda":
        free, total = torch.cuda.mem_get_info(place)
        properties = torch.cuda.get_device_properties(place)
        native_bf16 = properties.major >= 8 or bool(torch.version.hip)
        capability = f"{properties.major}.{properties.minor}"
        return Device("cuda", properties.name, int(total), int(free), capability, native_bf16)
    memory = psutil.virtual_memory()
    # Apple's GPU shares the machine's memory; it computes in float16 and float32.
    name = platform.processor() or platform.machine()
    if place.type == "mps":
        return Device("mps", f"Apple GPU ({name})", int(memory.total), int(memory.available), "", False)
    threads = torch.get_num_threads()
    bf16 = _cpu_has_bf16()
    return Device("cpu", f"{name}, {threads} threads", int(memory.total), int(memory.available), "", bf16)


def _cpu_has_bf16() -> bool:
    """Whether products of bfloat16 matrices have instructions of their own (AVX-512 BF16 or AMX)."""
    import torch

    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def devices() -> list[Device]:
    """All devices: the GPUs first, the CPU last."""
    import torch

    found = [describe_device(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(describe_device("mps"))
    return [*found, describe_device("cpu")]


def mismatches() -> list[str]:
    """Why a GPU of this machine is not used or will not work, each with what to do; empty if all is well."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return []
        if torch.version.cuda is None:
            return [
                "There is an NVIDIA driver here, but this torch is a CPU build. Reinstall torch for CUDA: "
                "https://pytorch.org/get-started/locally/"
            ]
        return [
            f"There is an NVIDIA driver here, and torch is built for CUDA {torch.version.cuda}, but sees no "
            "GPU: the driver may be older than that, or the GPU is hidden. Update the driver, or install a "
            "torch built for an older CUDA."
        ]
    built_for = torch.cuda.get_arch_list()
    problems = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # Kernels of the same major and a lower minor version run too; PTX ("compute_") is compiled here.
        runs = any(
            arch.startswith("compute_") or (_major_minor(arch)[0] == major and _major_minor(arch)[1] <= minor)
            for arch in built_for
        )
        if built_for and not runs and not torch.version.hip:
            problems.append(
                f"{torch.cuda.get_device_name(index)} is of capability {major}.{minor}; this torch is "
                f"built for {', '.join(built_for)}. Install a torch built for it."
            )
    return problems


def _major_minor(arch: str) -> tuple[int, int]:
    """Architecture name to capability: "sm_90a" -> (9, 0)."""
    digits = "".join(c for c in arch if c.isdigit())
    return (int(digits[:-1]), int(digits[-1])) if len(digits) >= 2 else (0, 0)
