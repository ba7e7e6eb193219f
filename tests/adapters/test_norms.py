"""Norms from factors are those of the products; a sample keeps to its budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabooth.adapters import norms
from lorabooth.adapters.gather import gather
from lorabooth.adapters.inspect import inspect_path
from lorabooth.checkpoints import tensors as plain_reads
from lorabooth.checkpoints.header import read_header


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_norms_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    down, up = torch.randn(3, 10).to(dtype), torch.randn(7, 3).to(dtype)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    path = write(
        tmp_path / "a.safetensors",
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)},
    )
    found = inspect_path(path)
    assert found.blocks[0].norm == pytest.approx(float((up.double() @ down.double()).norm() / 2), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")]
)
def test_every_eight_bit_pattern_is_torch_s(dtype: torch.dtype, name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(dtype).float().numpy()
    np.testing.assert_array_equal(norms.decode(codes.numpy().tobytes(), name), wanted)


# ---- LyCORIS ----

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def test_loha(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(*s, generator=g) for s in ((12, 4), (4, 9), (12, 4), (4, 9)))
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(2.0)}
    found = inspect_path(
        write(tmp_path / "a.safetensors", {f"{STEM}.{key}": value for key, value in parts.items()})
    )
    assert (found.kind, found.modules, found.ranks) == ("LoHa", 1, (4, 4))
    assert found.targets == {"attention q": 1}
    assert found.blocks[0].name == "down_blocks.0"
    assert found.blocks[0].norm == pytest.approx(float(((a1 @ b1) * (a2 @ b2)).norm() / 2), rel=1e-5)


def test_a_large_loha_is_estimated_from_its_rows(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(*s, generator=g) for s in ((1024, 4), (4, 64), (1024, 4), (4, 64)))
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(4.0)}
    found = inspect_path(
        write(tmp_path / "a.safetensors", {f"{STEM}.{key}": value for key, value in parts.items()})
    )
    assert found.blocks[0].norm == pytest.approx(float(((a1 @ b1) * (a2 @ b2)).norm()), rel=0.15)


@pytest.mark.parametrize("factored", [False, True])
def test_lokr(factored: bool, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w1, a, b = (torch.randn(*s, generator=g) for s in ((3, 4), (8, 2), (2, 5)))
    w2 = {"lokr_w2_a": a, "lokr_w2_b": b} if factored else {"lokr_w2": a @ b}
    parts = {"lokr_w1": w1, **w2, "alpha": torch.tensor(1.0)}
    found = inspect_path(
        write(tmp_path / "a.safetensors", {f"{STEM}.{key}": value for key, value in parts.items()})
    )
    # Two whole factors have no rank, and LyCORIS then ignores alpha.
    wanted = float(torch.kron(w1, a @ b).norm()) * (0.5 if factored else 1.0)
    assert found.kind == "LoKr"
    assert found.blocks[0].norm == pytest.approx(wanted, rel=1e-5)


def test_tucker(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*s, generator=g) for s in ((4, 6, 1, 1), (4, 4, 3, 3), (10, 4, 1, 1)))
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    parts = {
        "lora_down.weight": down,
        "lora_mid.weight": mid,
        "lora_up.weight": up,
        "alpha": torch.tensor(4.0),
    }
    found = inspect_path(
        write(tmp_path / "a.safetensors", {f"{stem}.{key}": value for key, value in parts.items()})
    )
    whole = torch.einsum("ob,bckl,ci->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert found.kind == "Tucker LoRA"
    assert found.blocks[0].norm == pytest.approx(float(whole.norm()), rel=1e-5)


def test_full_difference(tmp_path: Path) -> None:
    diff = torch.randn(5, 7)
    found = inspect_path(write(tmp_path / "a.safetensors", {f"{STEM}.diff": diff}))
    assert found.kind == "full difference"
    assert found.blocks[0].norm == pytest.approx(float(diff.norm()), rel=1e-5)


def test_dora_is_named_and_its_norms_are_left_out(tmp_path: Path) -> None:
    parts = {"lora_down.weight": torch.randn(4, 6), "lora_up.weight": torch.randn(8, 4)}
    parts |= {"dora_scale": torch.randn(8, 1), "alpha": torch.tensor(4.0)}
    found = inspect_path(
        write(tmp_path / "a.safetensors", {f"{STEM}.{key}": value for key, value in parts.items()})
    )
    assert (found.kind, found.modules, found.ranks, found.sampled) == ("DoRA", 1, (4, 4), 0)
    assert found.blocks[0].norm is None
    assert any("DoRA" in note for note in found.notes)
    assert found.problems == ()


# ---- sampling ----


def many(path: Path) -> Path:
    """60 modules in 3 blocks, of two sizes."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(3):
        for layer in range(10):
            for leaf, width in (("attn1.to_q", 64), ("ff.net.2", 256)):
                module = f"unet.down_blocks.{block}.attentions.0.transformer_blocks.{layer}.{leaf}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(4, width, generator=g)
                tensors[f"{module}.lora_B.weight"] = torch.randn(64, 4, generator=g)
    return write(path, tensors)


def test_a_sample_keeps_to_its_budget_and_sees_all_blocks_and_kinds(tmp_path: Path) -> None:
    path = many(tmp_path / "a.safetensors")
    modules = list(gather(path, read_header(path)).modules.values())
    read = []

    def counting(file: Path, begin: int, end: int) -> bytearray:
        read.append(end - begin)
        return plain_reads.read_bytes(file, begin, end)

    found = norms.measure(modules, 40_000, counting)
    assert sum(read) == found.bytes_read <= 40_000
    assert 6 <= len(found.values) < len(modules) == 60
    seen = {(name.split(".")[2], name.rsplit(".", 1)[-1]) for name in found.values}
    assert seen == {(str(block), leaf) for block in range(3) for leaf in ("to_q", "2")}
    assert norms.measure(modules, 40_000).values == found.values
    whole = norms.measure(modules).values
    assert len(whole) == 60
    assert all(whole[name] == value for name, value in found.values.items())
