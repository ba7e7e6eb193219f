"""The loss equals a loop by hand in every combination, and does not depend on how a step is split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabooth.objective import loss, paths
from lorabooth.recipe import LossSection
from lorabooth.rng import generator_for


def by_hand(errors, level_weights, roles, lam, n_instance, n_class):
    instance = prior = 0.0
    for error, level_weight, is_instance in zip(errors, level_weights, roles, strict=True):
        if is_instance:
            instance += level_weight * error / n_instance
        else:
            prior += level_weight * error / n_class
    return instance + lam * prior, instance, prior


def example_weights(roles, lam):
    return torch.tensor([1.0 if role else lam for role in roles])


rows = st.lists(
    st.tuples(st.floats(0, 4), st.floats(0, 2), st.booleans()),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=rows, lam=st.sampled_from([0.0, 0.3, 1.0, 7.0]), more=st.tuples(st.integers(0, 5), st.integers(0, 5))
)
def test_loss_equals_a_loop_by_hand(rows, lam, more):
    errors, weights, roles = zip(*rows, strict=True)
    n_instance, n_class = sum(roles) + more[0], len(roles) - sum(roles) + more[1]
    terms = loss.step_loss(
        torch.tensor(errors),
        torch.tensor(weights),
        torch.tensor(roles),
        example_weights(roles, lam),
        n_instance=n_instance,
        n_class=n_class,
    )
    total, instance, prior = by_hand(errors, weights, roles, lam, n_instance, n_class)
    assert terms.total.item() == pytest.approx(total, rel=1e-5, abs=1e-6)
    assert terms.instance.item() == pytest.approx(instance, rel=1e-5, abs=1e-6)
    assert terms.prior.item() == pytest.approx(prior, rel=1e-5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(rows=rows, lam=st.sampled_from([0.0, 1.0, 2.5]), cut=st.integers(0, 9))
def test_shares_of_micro_batches_add_up(rows, lam, cut):
    """Accumulation and ranks: any split, ragged ones too, gives the loss of the whole."""
    errors, weights, roles = zip(*rows, strict=True)
    counts = {"n_instance": sum(roles), "n_class": len(roles) - sum(roles)}
    columns = (torch.tensor(errors), torch.tensor(weights), torch.tensor(roles), example_weights(roles, lam))
    whole = loss.step_loss(*columns, **counts)
    parts = [
        loss.step_loss(*(column[piece] for column in columns), **counts)
        for piece in (slice(0, cut), slice(cut, None))
    ]
    for name in ("total", "instance", "prior"):
        summed = sum(getattr(part, name).item() for part in parts)
        assert summed == pytest.approx(getattr(whole, name).item(), rel=1e-5, abs=1e-6)


def test_gradients_of_4x1_equal_1x4():
    torch.manual_seed(0)
    inputs, target = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    roles, lam = torch.tensor([True, False, True, False]), 0.5
    weight = example_weights(roles.tolist(), lam)
    gradients = []
    for size in (4, 1):
        linear = torch.nn.Linear(6, 3, dtype=torch.float64, bias=False)
        torch.nn.init.constant_(linear.weight, 0.1)
        for first in range(0, 4, size):
            piece = slice(first, first + size)
            errors = (linear(inputs[piece]) - target[piece]).square().flatten(1).mean(1)
            loss.step_loss(
                errors, torch.ones_like(errors), roles[piece], weight[piece], n_instance=2, n_class=2
            ).total.backward()
        gradients.append(linear.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_lambda_0_has_no_class_gradient_but_still_logs_the_prior():
    errors = torch.tensor([2.0, 3.0], requires_grad=True)
    roles = torch.tensor([True, False])
    terms = loss.step_loss(errors, torch.ones(2), roles, torch.tensor([1.0, 0.0]), n_instance=1, n_class=1)
    terms.total.backward()
    assert errors.grad.tolist() == [1.0, 0.0]
    assert terms.total.item() == 2.0
    assert terms.prior.item() == 3.0


@pytest.mark.parametrize("role", [True, False])
def test_one_role_alone_is_finite(role):
    errors = torch.tensor([2.0], requires_grad=True)
    terms = loss.step_loss(
        errors,
        torch.ones(1),
        torch.tensor([role]),
        torch.ones(1),
        n_instance=int(role),
        n_class=int(not role),
    )
    terms.total.backward()
    assert terms.total.item() == 2.0
    assert errors.grad.tolist() == [1.0]
    assert {terms.instance.item(), terms.prior.item()} == {2.0, 0.0}


def test_a_non_finite_example_shows_in_its_own_term_only():
    terms = loss.step_loss(
        torch.tensor([1.0, math.nan]),
        torch.ones(2),
        torch.tensor([True, False]),
        torch.ones(2),
        n_instance=1,
        n_class=1,
    )
    assert terms.instance.item() == 1.0
    assert math.isnan(terms.prior.item())
    assert math.isnan(terms.total.item())


def test_logged_terms_carry_no_graph():
    terms = loss.step_loss(
        torch.ones(1, requires_grad=True),
        torch.ones(1),
        torch.tensor([True]),
        torch.ones(1),
        n_instance=1,
        n_class=0,
    )
    assert terms.total.requires_grad
    assert not terms.instance.requires_grad
    assert not terms.prior.requires_grad


def test_error_is_float32_for_half_inputs_and_per_example():
    prediction = torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16)
    target = torch.zeros_like(prediction)
    target[1] = 299
    errors = loss.per_example_error(prediction, target)
    # 300 squared does not fit into float16.
    assert errors.dtype == torch.float32
    assert errors.tolist() == [90000.0, 1.0]


def test_no_weighting_is_one_everywhere():
    weigh = loss.weighting(LossSection(), "epsilon")
    assert weigh(torch.tensor([0.0, 3.0, math.inf])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_same_weight_on_x0_for_every_prediction(gamma):
    """arXiv 2303.09556: the weighted error is min(SNR, gamma) |x0 error|^2, whatever is predicted."""
    section = LossSection(weighting="min_snr", snr_gamma=gamma)
    x0 = torch.randn(7, 5, dtype=torch.float64, generator=generator_for(0, 0, 0, "x0"))
    eps = torch.randn(7, 5, dtype=torch.float64, generator=generator_for(0, 0, 0, "eps"))
    wrong_x0 = x0 + 0.1 * torch.randn(7, 5, dtype=torch.float64, generator=generator_for(0, 0, 0, "wrong"))
    s = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)[:, None]

    def weighted(prediction, got, target, snr):
        return loss.weighting(section, prediction)(snr[:, 0]) * (got - target).square().mean(1)

    expected_error = (wrong_x0 - x0).square().mean(1)
    a = (1 - s**2).sqrt()
    snr = a**2 / s**2
    expected = snr[:, 0].clamp(max=gamma) * expected_error
    x = a * x0 + s * eps
    torch.testing.assert_close(weighted("epsilon", paths.eps_from_x0(x, wrong_x0, a, s), eps, snr), expected)
    v = paths.v_from_pair(x0, eps, a, s)
    torch.testing.assert_close(weighted("v_prediction", paths.v_from_x0(x, wrong_x0, a, s), v, snr), expected)
    snr = ((1 - s) / s) ** 2
    x = (1 - s) * x0 + s * eps
    got = weighted("flow", paths.flow_from_x0(x, wrong_x0, s), eps - x0, snr)
    torch.testing.assert_close(got, snr[:, 0].clamp(max=gamma) * expected_error)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_min_snr_is_finite_from_pure_noise_to_clean(prediction):
    weigh = loss.weighting(LossSection(weighting="min_snr"), prediction)
    weights = weigh(torch.tensor([0.0, 1e-12, 1.0, 1e12, math.inf]))
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def test_min_snr_by_hand():
    snr = torch.tensor([0.5, 5.0, 20.0])
    section = LossSection(weighting="min_snr", snr_gamma=5.0)
    assert loss.weighting(section, "epsilon")(snr).tolist() == pytest.approx([1.0, 1.0, 0.25])
    assert loss.weighting(section, "v_prediction")(snr).tolist() == pytest.approx([0.5 / 1.5, 5 / 6, 5 / 21])
