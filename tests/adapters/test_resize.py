"""Smaller adapters: the best of their rank, within the energy or the size that was asked for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabooth.adapters import file, formats, inject, outputs
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.resize import canonical_size, resize
from lorabooth.adapters.resize_file import resize_file
from lorabooth.errors import AdapterError, LoraboothError, RecipeError
from tests.adapters.conftest import difference
from tests.adapters.conftest import outputs as predictions

Q, C = "denoiser.mid_block.attentions.0.to_q", "denoiser.conv_in"
T = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SHAPES = {Q: (40, (30,)), C: (24, (3, 3, 3)), T: (50, (20,))}
META = Metadata(family="sd1", base_id="some/base", trigger_words=("sks dog",), steps=7)


def adapter(ranks: dict[str, int] | None = None, *, decay: float = 0.6, dtype: torch.dtype = torch.float32):
    """Factors whose singular values fall by `decay`; alphas that are not the rank."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for module, rank in (ranks or {Q: 8, C: 8, T: 6}).items():
        rows, kernel = SHAPES[module]
        ones = (1,) * (len(kernel) - 1)
        fall = (decay ** torch.arange(rank)).view(-1, *(1,) * len(kernel))
        out[f"{module}.lora_A"] = (torch.randn(rank, *kernel, generator=generator) * fall).to(dtype)
        out[f"{module}.lora_B"] = torch.randn(rows, rank, *ones, generator=generator).to(dtype)
        out[f"{module}.alpha"] = torch.tensor(5.0)
    return out


def delta(tensors, module):
    up, down = (tensors[f"{module}.{kind}"].double().flatten(1) for kind in ("lora_B", "lora_A"))
    return float(tensors[f"{module}.alpha"]) / down.shape[0] * up @ down


def ranks_of(tensors):
    return {module: rank for module, (rank, _) in formats.ranks_and_alphas(tensors).items()}


def test_at_full_rank_the_effect_is_the_same():
    got = resize(adapter(), rank=64)
    assert ranks_of(got.tensors) == {Q: 8, C: 8, T: 6}
    for module in SHAPES:
        torch.testing.assert_close(delta(got.tensors, module), delta(adapter(), module), rtol=1e-5, atol=1e-5)
    assert got.table.total.relative_error < 1e-6


def test_the_live_adapter_predicts_the_same(sd1, trained):
    source = trained(sd1.load(), rank=4, seed=1)
    expected, got, plain = sd1.load(), sd1.load(), sd1.load()
    inject.attach_tensors(expected, source)
    inject.attach_tensors(got, resize(source, energy=1.0).tensors)
    for a, b, c in zip(predictions(got), predictions(expected), predictions(plain), strict=True):
        assert difference(c, b) > 1e-2
        assert difference(a, b) < 1e-5


def test_a_rank_gives_the_best_approximation_and_its_true_error():
    got = resize(adapter(), rank=3)
    errors = 0.0
    for row in got.table.rows:
        want = delta(adapter(), row.name)
        values = torch.linalg.svdvals(want)
        true = float((delta(got.tensors, row.name) - want).norm())
        assert row.new_ranks == (3, 3)
        assert true == pytest.approx(float(values[3:].square().sum().sqrt()), rel=1e-5)
        assert row.error == pytest.approx(true, rel=1e-6)
        errors += true**2
    assert got.table.total.error == pytest.approx(math.sqrt(errors))


def test_factors_are_balanced():
    got = resize(adapter({Q: 8}), rank=4).tensors
    up, down = got[f"{Q}.lora_B"].double(), got[f"{Q}.lora_A"].double()
    torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.999, 1.0])
def test_energy_is_kept_by_the_smallest_rank(energy):
    got = resize(adapter(), energy=energy)
    for module, rank in ranks_of(got.tensors).items():
        squares = torch.linalg.svdvals(delta(adapter(), module)).square()
        total = float(squares.sum())
        assert float(squares[:rank].sum()) >= energy * total * (1 - 1e-12)
        assert rank == 1 or float(squares[: rank - 1].sum()) < energy * total
    assert got.table.total.relative_error <= math.sqrt(1 - energy) + 1e-6
    if energy == 0.9:
        assert len({row.new_ranks for row in got.table.rows}) > 1


@settings(max_examples=15)
@given(share=st.floats(0.05, 1.2))
def test_a_size_is_never_exceeded_and_used_up(share):
    source = adapter()
    whole = canonical_size(source)
    smallest = canonical_size(resize(source, rank=1).tensors)
    limit = max(smallest, int(share * whole))
    got = resize(source, max_bytes=limit)
    size = canonical_size(got.tensors)
    assert size <= limit
    dearest = max(4 * (rows + math.prod(kernel)) for rows, kernel in SHAPES.values())
    assert limit - size < dearest + 64 or ranks_of(got.tensors) == ranks_of(source)


def test_a_size_is_spent_where_the_energy_is():
    source = adapter()
    source[f"{Q}.lora_B"] = source[f"{Q}.lora_B"] * 100
    got = resize(source, max_bytes=canonical_size(source) * 2 // 3)
    ranks = ranks_of(got.tensors)
    assert ranks[Q] == 8
    assert min(ranks.values()) < 6
    # No other ranks of this size keep more: moving one rank elsewhere loses energy or needs more bytes.
    even = resize(source, rank=4)
    assert got.table.total.relative_error < even.table.total.relative_error


def test_too_small_a_size_says_what_is_possible():
    smallest = canonical_size(resize(adapter(), rank=1).tensors)
    with pytest.raises(AdapterError, match=f"rank 1 in each of its 3 modules it is {smallest:,} bytes"):
        resize(adapter(), max_bytes=smallest - 1)
    assert set(ranks_of(resize(adapter(), max_bytes=smallest).tensors).values()) == {1}


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.9}, {"max_bytes": 100_000}])
def test_a_zero_module_stays_zero(rule):
    source = adapter()
    source[f"{Q}.lora_B"] = torch.zeros_like(source[f"{Q}.lora_B"])
    got = resize(source, **rule)
    assert all(bool(tensor.isfinite().all()) for tensor in got.tensors.values())
    assert float(delta(got.tensors, Q).norm()) == 0
    row = got.table.rows[0]
    assert (row.name, row.norm, row.relative_error) == (Q, 0, 0)
    if "rank" not in rule:
        assert row.new_ranks == (1, 1)


def test_ranks_may_differ_and_a_rank_above_the_layers_own_is_dropped():
    source = adapter({Q: 35, C: 2, T: 5}, decay=1.0)
    got = resize(source, rank=40)
    assert ranks_of(got.tensors) == {Q: 30, C: 2, T: 5}
    assert got.table.total.relative_error < 1e-6
    alphas = formats.ranks_and_alphas(got.tensors)
    assert len({alphas[Q][1], alphas[C][1]}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    source = adapter(dtype=dtype)
    kept = resize(source, rank=4).tensors
    assert {t.dtype for key, t in kept.items() if not key.endswith("alpha")} == {dtype}
    assert kept[f"{Q}.alpha"].dtype == torch.float32
    cast = resize(source, rank=4, dtype=torch.float16).tensors
    assert cast[f"{Q}.lora_A"].dtype == torch.float16


def test_several_dtypes_become_float32():
    source = adapter()
    source[f"{Q}.lora_A"] = source[f"{Q}.lora_A"].half()
    assert resize(source, rank=4).tensors[f"{Q}.lora_A"].dtype == torch.float32


@pytest.mark.parametrize(
    "rule",
    [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"energy": math.nan}],
)
def test_exactly_one_sensible_rule(rule):
    with pytest.raises(RecipeError, match=r"exactly one|at least 1|at most 1"):
        resize(adapter(), **rule)


def test_bad_tensors_are_refused():
    source = adapter()
    source[f"{Q}.lora_A"][0, 0] = math.nan
    with pytest.raises(AdapterError, match="NaN or infinity"):
        resize(source, rank=2)
    source = adapter()
    del source[f"{Q}.lora_A"]
    with pytest.raises(AdapterError, match="has no lora_A"):
        resize(source, rank=2)
    with pytest.raises(AdapterError, match="no tensors"):
        resize({}, rank=2)


# ---- files ----


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    file.write(path, adapter(), META, dtype=torch.float16)
    return path


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("limit", [6_000, 7_777, 9_001, 12_000, 20_000])
def test_the_file_is_never_larger_than_asked_for(tmp_path, layout, limit):
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file.write(path, adapter({Q: 12, C: 12, T: 12}), META, layout)
    report = resize_file(path, out, max_bytes=limit)
    assert report.bytes_after == out.stat().st_size <= limit
    got = file.read(out)
    assert got.layout == layout
    dearest = max(4 * (rows + math.prod(kernel)) for rows, kernel in SHAPES.values())
    assert limit - report.bytes_after < dearest + 300 or set(ranks_of(got.tensors).values()) == {12}


def test_the_measured_size_is_the_written_one(source, tmp_path):
    out = tmp_path / "b.safetensors"
    resize_file(source, out, rank=3)
    got = file.read(out)
    assert outputs.written_size(got.tensors, META, "kohya", torch.float16) == out.stat().st_size


def test_metadata_and_dtype_are_kept(source, tmp_path):
    out = tmp_path / "b.safetensors"
    report = resize_file(source, out, rank=3)
    got = file.read(out)
    assert (got.metadata.family, got.metadata.base_id, got.metadata.steps) == ("sd1", "some/base", 7)
    assert (got.metadata.trigger_words, got.metadata.rank, got.metadata.alpha) == (("sks dog",), 3, 3.0)
    assert got.tensors[f"{Q}.lora_A"].dtype == torch.float16
    assert (report.bytes_before, report.bytes_after) == (source.stat().st_size, out.stat().st_size)
    expected = resize(file.read(source).tensors, rank=3).table.total.relative_error
    assert report.table.total.relative_error == expected > 0
    kept = resize_file(source, tmp_path / "c.safetensors", rank=3, dtype=torch.float32)
    assert kept.bytes_after > report.bytes_after


def test_an_adapter_of_unknown_family_is_written_in_diffusers_layout(tmp_path):
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file.write(source, adapter({T: 6}), Metadata(), "diffusers")
    assert (resize_file(source, out, rank=2).layout, file.read(out).layout) == ("diffusers", "diffusers")


def test_nothing_is_written_on_an_error(source, tmp_path):
    taken, broken = tmp_path / "taken.safetensors", tmp_path / "broken.safetensors"
    taken.write_bytes(b"kept")
    broken.write_bytes(source.read_bytes()[:-1])
    new = tmp_path / "new.safetensors"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, out, options, message in [
        (source, source, {"rank": 2, "overwrite": True}, "one of the inputs"),
        (source, taken, {"rank": 2}, "exists"),
        (source, tmp_path / "new.pt", {"rank": 2}, "ends in .safetensors"),
        (source, new, {"max_bytes": 100}, "cannot be as small as 100 bytes"),
        (source, new, {}, "exactly one"),
        (broken, new, {"rank": 2}, "broken"),
    ]:
        with pytest.raises(LoraboothError, match=message) as caught:
            resize_file(path, out, **options)
        assert caught.value.exit_code == (2 if message == "exactly one" else 5)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    resize_file(source, taken, rank=2, overwrite=True)
    assert set(ranks_of(file.read(taken).tensors).values()) == {2}
