"""Numbers judged by their bits, wherever they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabooth.adapters.bits import PIECE_BYTES, scan
from lorabooth.checkpoints.header import read_header


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
    ],
)
def test_numbers_are_judged_by_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    largest = torch.finfo(dtype).max
    stored = {
        "large": torch.tensor([largest, -largest, 1.0], dtype=torch.float64).to(dtype),
        "zero": torch.tensor([0.0, -0.0]).to(dtype),
        "small": torch.tensor([0.0, torch.finfo(dtype).smallest_normal], dtype=torch.float64).to(dtype),
        "nan": torch.tensor([0.0, math.nan]).to(dtype),
        "empty": torch.zeros(0, dtype=dtype),
    }
    if dtype != torch.float8_e4m3fn:
        stored["infinite"] = torch.tensor([0.0, -math.inf]).to(dtype)
    save_file(stored, path)
    header = read_header(path)
    found = {key: scan(path, header.data_start, entry) for key, entry in header.entries.items()}
    assert found.pop("infinite", (False, True)) == (False, True)
    assert found == {
        "large": (True, True),
        "zero": (True, False),
        "small": (True, True),
        "nan": (False, True),
        "empty": (True, True),
    }


@pytest.mark.parametrize("place", [0, PIECE_BYTES // 4 - 1, PIECE_BYTES // 4, -1])
def test_a_nan_is_seen_wherever_it_is(place: int, tmp_path: Path) -> None:
    values = torch.zeros(PIECE_BYTES // 4 + 1000)
    values[place] = math.nan
    save_file({"a": values}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert scan(tmp_path / "a.safetensors", header.data_start, header.entries["a"]) == (False, True)
