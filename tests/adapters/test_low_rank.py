"""Low-rank algebra against the materialised matrices, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabooth.adapters import low_rank
from lorabooth.adapters.low_rank import Factors


def factors(out: int, rank: int, into: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(out, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, into, generator=generator, dtype=torch.float64),
    )


def distance(a: Factors, b: Factors) -> float:
    return low_rank.compare(a, b)[1]


def whole(f: Factors) -> torch.Tensor:
    return f.up.double() @ f.down.double()


sizes = st.integers(1, 12)


@given(out=sizes, rank=sizes, into=sizes, seed=st.integers(0, 99))
def test_decomposition_is_the_svd_of_the_product(out, rank, into, seed):
    f = factors(out, rank, into, seed)
    d = low_rank.decompose(f)
    k = min(out, rank, into)
    assert d.values.shape == (k,)
    torch.testing.assert_close(d.left * d.values @ d.right, whole(f))
    torch.testing.assert_close(d.left.T @ d.left, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(d.right @ d.right.T, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(d.values, torch.linalg.svdvals(whole(f))[:k])
    torch.testing.assert_close(low_rank.singular_values(f), d.values)


@given(out=sizes, rank=sizes, into=sizes, seed=st.integers(0, 99))
def test_norms_and_distances_without_the_product(out, rank, into, seed):
    a, b = factors(out, rank, into, seed), factors(out, 3, into, seed + 100)
    assert low_rank.norm(a) == low_rank.compare(a, b)[0] == pytest.approx(float(whole(a).norm()), rel=1e-9)
    assert distance(a, b) == pytest.approx(float((whole(a) - whole(b)).norm()), rel=1e-7)
    torch.testing.assert_close(whole(low_rank.stack([a, b.scaled(-2.0)])), whole(a) - 2 * whole(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_truncation_is_the_best_approximation_and_balanced(rank, dtype):
    f = factors(30, 8, 20)
    made = low_rank.best(f, rank, dtype)
    u, s, v = torch.linalg.svd(whole(f), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    close = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(whole(made), best, rtol=0, atol=close * float(s[0]))
    dropped = float(s[rank:].square().sum().sqrt())
    assert distance(f, made) == pytest.approx(dropped, rel=1e-6, abs=close * float(s[0]))
    torch.testing.assert_close(made.up.T @ made.up, made.down @ made.down.T, rtol=0, atol=1e-3)


def test_the_distance_of_what_is_equal_is_zero():
    f = factors(200, 16, 300)
    assert distance(f, f) == 0
    turned = torch.linalg.qr(factors(16, 16, 16, 1).up).Q
    assert distance(f, Factors(f.up @ turned, turned.T @ f.down)) < 1e-7 * low_rank.norm(f)
    assert low_rank.norm(low_rank.stack([f, f.scaled(-1.0)])) == 0


def test_rounding_of_one_factor_is_seen_exactly():
    f = factors(200, 16, 300)
    rounded = Factors(f.up.float().double(), f.down)
    true = float((whole(f) - whole(rounded)).norm())
    assert 0 < true < 1e-7 * low_rank.norm(f)
    assert distance(f, rounded) == pytest.approx(true, rel=1e-5)


def test_a_zero_product_decomposes_without_nan():
    zero = Factors(torch.zeros(6, 3, dtype=torch.float64), factors(6, 3, 5).down)
    made = low_rank.best(zero, 2)
    assert bool(made.up.isfinite().all() and made.down.isfinite().all())
    assert (low_rank.norm(zero), low_rank.norm(made)) == (0, 0)


@pytest.mark.parametrize("keep_down", [True, False])
@pytest.mark.parametrize("kernel", [(20,), (5, 2, 2)])
def test_stored_tensors_have_the_same_effect_whatever_the_alpha(kernel, keep_down):
    f = factors(7, 3, 20)
    made = low_rank.stored("denoiser.conv_in", f, kernel, 8.0, torch.float64, keep_down=keep_down)
    assert made["denoiser.conv_in.lora_A"].shape == (3, *kernel)
    assert made["denoiser.conv_in.lora_B"].shape == (7, 3, *(1,) * (len(kernel) - 1))
    assert float(made["denoiser.conv_in.alpha"]) == 8
    torch.testing.assert_close(whole(low_rank.delta(made, "denoiser.conv_in")), whole(f))
    assert torch.equal(made["denoiser.conv_in.lora_A"].flatten(1), f.down) is keep_down


def test_one_alpha_per_component():
    ranks = {"denoiser.a": 4, "denoiser.b": 4, "denoiser.c": 16, "text_encoder.a": 2, "text_encoder.b": 3}
    assert low_rank.common_alphas(ranks) == {
        **dict.fromkeys(["denoiser.a", "denoiser.b", "denoiser.c"], 4.0),
        **dict.fromkeys(["text_encoder.a", "text_encoder.b"], 3.0),
    }
