"""Blends: exact ones equal adapters that live side by side, the others equal PEFT's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lorabooth.adapters import blend as blending
from lorabooth.adapters import file, formats, inject
from lorabooth.adapters.blend import Part, blend
from lorabooth.adapters.blend_files import blend_files
from lorabooth.adapters.metadata import Metadata
from lorabooth.errors import AdapterError, LoraboothError, RecipeError
from tests.adapters.conftest import ATTENTION, CONVOLUTIONS, difference, outputs

Q, K, C = "denoiser.mid_block.attentions.0.to_q", "denoiser.mid_block.attentions.0.to_k", "denoiser.conv_in"
T = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SHAPES = {Q: (12, (10,)), K: (12, (14,)), C: (8, (3, 3, 3)), T: (9, (7,))}


def adapter(seed: int, rank: int = 4, alpha: float = 3.0, modules: tuple[str, ...] = (Q, C, T)):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for module in modules:
        rows, kernel = SHAPES[module]
        ones = (1,) * (len(kernel) - 1)
        out[f"{module}.lora_A"] = torch.randn(rank, *kernel, generator=generator)
        out[f"{module}.lora_B"] = torch.randn(rows, rank, *ones, generator=generator)
        out[f"{module}.alpha"] = torch.tensor(alpha)
    return out


def delta(tensors, module):
    """The materialised effect in float64; 0 where the adapter lacks the module."""
    if f"{module}.alpha" not in tensors:
        return 0.0
    up, down = (tensors[f"{module}.{kind}"].double().flatten(1) for kind in ("lora_B", "lora_A"))
    return float(tensors[f"{module}.alpha"]) / down.shape[0] * up @ down


def exact_sum(parts, module):
    return sum(part.strength * delta(part.tensors, module) for part in parts)


PARTS = [
    Part(adapter(0), 0.7),
    Part(adapter(1, rank=2, alpha=4.0, modules=(C, T, K)), -0.5),
]
EQUAL = [Part(adapter(0), 0.7), Part(adapter(1, alpha=8.0, modules=(C, T, K)), -0.5)]


def test_cat_is_exact_and_adds_up_the_ranks():
    got = blend(PARTS, "cat")
    ranks = {module: rank for module, (rank, _) in formats.ranks_and_alphas(got.tensors).items()}
    assert ranks == {Q: 4, C: 6, T: 6, K: 2}
    for module in ranks:
        torch.testing.assert_close(delta(got.tensors, module), exact_sum(PARTS, module), rtol=1e-6, atol=1e-6)
    assert torch.equal(got.tensors[f"{Q}.lora_A"], PARTS[0].tensors[f"{Q}.lora_A"])
    assert 0 <= got.table.total.relative_error < 1e-7
    assert {row.name: row.old_ranks for row in got.table.rows}[C] == (2, 4)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_cat_equals_both_attached_live(sd1, trained, tmp_path, layout):
    """On attention, 1x1 and 3x3 convolutions, and the text encoder; ranks, alphas and modules differ."""
    a = trained(sd1.load(), rank=4, seed=1)
    b = trained(sd1.load(), patterns=(ATTENTION, CONVOLUTIONS), rank=6, alpha=2.0, seed=2)
    both = sd1.load()
    inject.attach_tensors(both, a, strength=0.7, name="a")
    inject.attach_tensors(both, b, strength=0.5, name="b")
    expected, plain = outputs(both), outputs(sd1.load())

    for name, tensors in (("a", a), ("b", b)):
        file.write(tmp_path / f"{name}.safetensors", tensors, Metadata(family="sd1"))
    given = [(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", 0.5)]
    blend_files(given, tmp_path / "c.safetensors", layout=layout)
    one = sd1.load()
    inject.attach_tensors(one, file.read(tmp_path / "c.safetensors").tensors)
    for got, want, without in zip(outputs(one), expected, plain, strict=True):
        assert difference(want, without) > 1e-2
        assert difference(got, want) < 1e-5


def test_svd_is_the_best_approximation_and_its_error_is_the_true_one():
    got = blend(PARTS, "svd", rank=3)
    squares = {"error": 0.0, "norm": 0.0}
    for row in got.table.rows:
        want, made = exact_sum(PARTS, row.name), delta(got.tensors, row.name)
        values = torch.linalg.svdvals(want)
        best = float(values[row.new_ranks[0] :].square().sum().sqrt())
        true = float((made - want).norm())
        assert row.new_ranks == (min(3, row.old_ranks[0] if row.name in (Q, K) else 3),) * 2
        assert true == pytest.approx(best, rel=1e-5, abs=1e-5)
        assert row.error == pytest.approx(true, rel=1e-5, abs=1e-6)
        assert row.norm == pytest.approx(float(want.norm()))
        squares["error"] += true**2
        squares["norm"] += float(want.norm()) ** 2
    total = math.sqrt(squares["error"] / squares["norm"])
    assert total > 0.05
    assert got.table.total.relative_error == pytest.approx(total, rel=1e-5)


def test_svd_at_full_rank_equals_cat():
    cat, svd = blend(PARTS, "cat"), blend(PARTS, "svd", rank=64)
    for row in svd.table.rows:
        want = delta(cat.tensors, row.name)
        assert float((delta(svd.tensors, row.name) - want).norm() / want.norm()) < 1e-6
        assert row.relative_error < 1e-6
    assert [row.new_ranks for row in svd.table.rows] == [row.new_ranks for row in cat.table.rows]


def test_a_linear_layer_and_a_1x1_convolution_are_the_same_map():
    flat = adapter(0, modules=(Q,))
    square = {k: v if v.dim() == 0 else v[..., None, None] for k, v in adapter(1, modules=(Q,)).items()}
    for first, second in ((flat, square), (square, flat)):
        parts = [Part(first, 0.7), Part(second, -0.5)]
        got = blend(parts, "cat").tensors
        assert got[f"{Q}.lora_A"].dim() == first[f"{Q}.lora_A"].dim()
        torch.testing.assert_close(delta(got, Q), exact_sum(parts, Q), rtol=1e-6, atol=1e-6)


def test_svd_takes_the_largest_rank_of_the_module_by_default():
    ranks = {row.name: row.new_ranks[0] for row in blend(PARTS, "svd").table.rows}
    assert ranks == {Q: 4, C: 4, T: 4, K: 2}


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(10, 12), nn.Linear(14, 12)
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(7, 9)


@pytest.mark.parametrize("strengths", [(0.7, 0.5), (0.9, -0.4), (0.3, 0.0)])
@pytest.mark.parametrize(
    ("method", "theirs"),
    [("linear", "linear"), ("ties", "ties"), ("magnitude_prune", "magnitude_prune"), ("cat", "cat")],
)
def test_the_arithmetic_is_pefts(method, theirs, strengths):
    from peft import LoraConfig, get_peft_model

    leaves = {"q": Q, "k": K, "conv": C, "fc": T}
    first, second = adapter(0, modules=(Q, C, T)), adapter(1, alpha=8.0, modules=(C, T, K))
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["q", "conv", "fc"])
    model = get_peft_model(_Net(), config, "one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=8, target_modules=["conv", "fc", "k"]))
    with torch.no_grad():
        for name, tensors in (("one", first), ("two", second)):
            for leaf, module in leaves.items():
                if f"{module}.alpha" in tensors:
                    layer = getattr(model.base_model.model, leaf)
                    layer.lora_A[name].weight.copy_(tensors[f"{module}.lora_A"])
                    layer.lora_B[name].weight.copy_(tensors[f"{module}.lora_B"])
    model.base_model.add_weighted_adapter(["one", "two"], list(strengths), "mix", theirs, density=0.4)

    density = 0.4 if method in blending.PRUNING else None
    got = blend([Part(first, strengths[0]), Part(second, strengths[1])], method, density=density).tensors
    assert sum(key.endswith(".alpha") for key in got) == 4
    for leaf, module in leaves.items():
        layer = getattr(model.base_model.model, leaf)
        up, down = layer.lora_B["mix"].weight.detach(), layer.lora_A["mix"].weight.detach()
        want = layer.scaling["mix"] * up.double().flatten(1) @ down.double().flatten(1)
        assert layer.scaling["mix"] == 1
        torch.testing.assert_close(delta(got, module), want, rtol=1e-5, atol=1e-5)
        if method != "cat":
            torch.testing.assert_close(got[f"{module}.lora_A"], down)
            torch.testing.assert_close(got[f"{module}.lora_B"], up)


def test_ties_by_hand():
    """One column: -3 loses to 4 + 2 by total magnitude; the two that agree are averaged."""

    def one(value: float):
        return {
            f"{Q}.lora_A": torch.full((1, 1), value),
            f"{Q}.lora_B": torch.ones(1, 1),
            f"{Q}.alpha": torch.tensor(1.0),
        }

    got = blend([Part(one(4.0)), Part(one(-3.0)), Part(one(2.0))], "ties", density=1.0).tensors
    assert got[f"{Q}.lora_A"].item() == 3
    assert got[f"{Q}.lora_B"].item() == 1


def test_magnitude_prune_keeps_the_largest_numbers():
    got = blend([Part(adapter(0))], "magnitude_prune", density=0.25).tensors[f"{Q}.lora_A"]
    source = adapter(0)[f"{Q}.lora_A"]
    kept = got != 0
    assert int(kept.sum()) == source.numel() // 4
    assert source[kept].abs().min() >= source[~kept].abs().max()


def test_dare_is_pefts_arithmetic_on_masks_of_its_own():
    """Numbers are kept with the probability `density` and divided by it (PEFT's random_pruning, rescaled)."""
    module = "denoiser.conv_in"
    generator = torch.Generator().manual_seed(5)
    source = {
        f"{module}.lora_A": torch.randn(8, 60, 3, 3, generator=generator),
        f"{module}.lora_B": torch.randn(500, 8, 1, 1, generator=generator),
        f"{module}.alpha": torch.tensor(2.0),
    }
    part = Part(source, -0.5)
    got = blend([part], "dare", density=0.3, seed=1).tensors
    root = math.sqrt(0.5 * 2.0 / 8)
    for kind, weight in (("lora_A", -root), ("lora_B", root)):
        ratio = got[f"{module}.{kind}"] / (source[f"{module}.{kind}"] * weight)
        kept = ratio != 0
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.3))
        assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.03)
    state = torch.get_rng_state()
    again = blend([part], "dare", density=0.3, seed=1).tensors
    other = blend([part], "dare", density=0.3, seed=2).tensors
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again[key], got[key]) for key in got)
    assert not torch.equal(other[f"{module}.lora_A"], got[f"{module}.lora_A"])
    twice = blend([part, part], "dare", density=0.3, seed=1).tensors
    assert not torch.equal(twice[f"{module}.lora_A"], 2 * got[f"{module}.lora_A"])


def test_dare_that_keeps_all_is_linear():
    dare, linear = blend(EQUAL, "dare", density=1.0), blend(EQUAL, "linear")
    assert all(torch.equal(dare.tensors[key], linear.tensors[key]) for key in linear.tensors)


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "magnitude_prune"])
def test_the_printed_error_of_rough_methods_is_the_true_one(method):
    got = blend(EQUAL, method)
    for row in got.table.rows:
        true = float((delta(got.tensors, row.name) - exact_sum(EQUAL, row.name)).norm())
        assert row.error == pytest.approx(true, rel=1e-6, abs=1e-5)
    assert got.table.total.relative_error > 0.1


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_one_part_is_rescaled(method):
    got = blend([Part(adapter(0), -1.5)], method)
    for module in (Q, C, T):
        torch.testing.assert_close(
            delta(got.tensors, module), -1.5 * delta(adapter(0), module), rtol=1e-5, atol=1e-5
        )
    assert got.table.total.relative_error < 1e-6


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_an_adapter_less_itself_is_nothing(method):
    got = blend([Part(adapter(0), 1.0), Part(adapter(0), -1.0)], method)
    for module in (Q, C, T):
        assert float(delta(got.tensors, module).norm()) < 1e-5 * float(delta(adapter(0), module).norm())
    assert got.table.total.norm == 0


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_every_component_has_one_alpha(method):
    """So that kohya's layout is written as it is, and diffusers scales every module alike."""
    parts = EQUAL if method == "linear" else PARTS
    tensors = blend(parts, method).tensors
    alphas = formats.ranks_and_alphas(tensors)
    assert len({alpha for module, (_, alpha) in alphas.items() if module.startswith("denoiser")}) == 1
    levelled = formats.level_alphas(tensors)
    assert all(levelled[key] is tensors[key] for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_wanted_one_and_its_rounding_is_in_the_error(dtype):
    got = blend(PARTS, "cat", dtype=dtype)
    assert {t.dtype for key, t in got.tensors.items() if not key.endswith("alpha")} == {dtype}
    row = got.table.rows[1]
    true = float((delta(got.tensors, row.name) - exact_sum(PARTS, row.name)).norm())
    assert row.error == pytest.approx(true, rel=1e-3)
    assert (row.relative_error > 1e-5) is (dtype != torch.float32)


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "magnitude_prune"])
def test_unequal_ranks_need_cat_or_svd(method):
    with pytest.raises(AdapterError, match=r"'denoiser.conv_in' has ranks 4 and 2 \(2 such.*\n.*cat or svd"):
        blend(PARTS, method)


def _nan():
    tensors = adapter(0)
    tensors[f"{Q}.lora_A"][1, 2] = math.nan
    return tensors


def _other_width():
    tensors = adapter(0)
    tensors[f"{Q}.lora_A"] = torch.zeros(4, 11)
    return tensors


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no adapter was given"),
        ([Part(adapter(0), math.inf)], "strength inf is not a finite"),
        ([Part(_nan())], "NaN or infinity"),
        ([Part({})], "holds no tensors"),
        ([Part(adapter(0)), Part(_other_width())], f"1 modules are shaped differently, e.g. {Q}"),
    ],
)
def test_bad_parts_are_refused(parts, message):
    with pytest.raises(AdapterError, match=message):
        blend(parts, "cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "not a way to blend"),
        ({"method": "cat", "rank": 3}, "only for svd"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "linear", "density": 0.5}, "means nothing"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "ties", "density": 1.1}, "above 0"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(RecipeError, match=message):
        blend(PARTS, **options)


# ---- files ----


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    facts = {"family": "sd1", "base_id": "some/base", "targets": "attn"}
    file.write(a, adapter(0), Metadata(**facts, base_sha256="a", trigger_words=("sks dog",), steps=9))
    file.write(b, PARTS[1].tensors, Metadata(**facts, base_sha256="b", trigger_words=("ink", "sks dog")))
    return a, b


def test_the_blended_file_says_what_is_true_of_both(two, tmp_path):
    out = tmp_path / "c.safetensors"
    report = blend_files([(two[0], 0.7), (two[1], -0.5)], out, method="svd", rank=2)
    got = file.read(out)
    meta = got.metadata
    assert (meta.family, meta.base_id, meta.base_sha256) == ("sd1", "some/base", "")
    assert (meta.targets, meta.steps, meta.trigger_words) == ("attn", 0, ("sks dog", "ink"))
    assert (meta.rank, meta.alpha) == (2, 2.0)
    assert (report.layout, got.layout, report.out) == ("kohya", "kohya", out)
    assert report.bytes_before == sum(path.stat().st_size for path in two)
    assert report.bytes_after == out.stat().st_size
    expected = blend(PARTS, "svd", rank=2)
    for module in (Q, C, T, K):
        torch.testing.assert_close(delta(got.tensors, module), delta(expected.tensors, module))
    assert report.to_dict()["total"]["relative_error"] == report.table.total.relative_error


def test_the_layout_can_be_chosen(two, tmp_path):
    blend_files([(two[0], 1.0)], tmp_path / "c.safetensors", layout="diffusers", dtype=torch.float16)
    got = file.read(tmp_path / "c.safetensors")
    assert got.layout == "diffusers"
    assert got.tensors[f"{Q}.lora_A"].dtype == torch.float16


def test_nothing_is_written_on_an_error(two, tmp_path):
    a, b = two
    other = tmp_path / "sdxl.safetensors"
    file.write(other, adapter(3), Metadata(family="sdxl"), "diffusers")
    (tmp_path / "folder.safetensors").mkdir()
    new, taken = tmp_path / "new.safetensors", tmp_path / "taken.safetensors"
    taken.write_bytes(b"kept")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for given, out, options, message in [
        ([(a, 1.0), (other, 1.0)], new, {}, "different families.*a.safetensors is for sd1, sdxl"),
        ([(a, 1.0), (b, 1.0)], new, {"method": "linear"}, "cat or svd"),
        ([(a, math.nan)], new, {}, "not a finite number"),
        ([(a, 1.0)], a, {"overwrite": True}, "one of the inputs"),
        ([(a, 1.0)], taken, {}, "exists"),
        ([(a, 1.0)], tmp_path / "c.bin", {}, "ends in .safetensors"),
        ([(a, 1.0)], tmp_path / "folder.safetensors", {"overwrite": True}, "is a folder"),
        ([(taken, 1.0)], new, {}, "taken"),
        ([(tmp_path / "none.safetensors", 1.0)], new, {}, "none.safetensors"),
        ([], new, {}, "no adapter"),
    ]:
        with pytest.raises(LoraboothError, match=message) as caught:
            blend_files(given, out, **options)
        assert caught.value.exit_code == (2 if message == "no folder" else 5)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_overwrite_replaces_another_file(two, tmp_path):
    out = tmp_path / "c.safetensors"
    out.write_bytes(b"old")
    blend_files([(two[0], 2.0)], out, overwrite=True)
    torch.testing.assert_close(delta(file.read(out).tensors, Q), 2 * delta(adapter(0), Q))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]
