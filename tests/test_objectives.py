"""Objectives against independent implementations and analytic truths."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

from specnb import objectives as O


def codes(n=40, latent=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(n, latent, generator=rng, dtype=torch.float64), torch.randn(n, latent, generator=rng, dtype=torch.float64) - 1
    return mean, logvar, mean + (0.5*logvar).exp()*torch.randn(n, latent, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("name", ["masked_l1", "masked_l2", "masked_chi2"])
def test_masked_pixels_change_neither_value_nor_gradient(name):
    rng = torch.Generator().manual_seed(1)
    target, ivar = torch.randn(4, 50, generator=rng), torch.rand(4, 50, generator=rng)
    ivar[:, 10:20] = 0
    weight = ivar if name == "masked_chi2" else (ivar > 0).float()
    function, values, gradients = getattr(O, name), [], []
    for spoiled in (0., 1e6, float("nan"), float("inf")):
        output = torch.zeros(4, 50, requires_grad=True)
        value = function(output, torch.where(ivar > 0, target, spoiled), weight)
        value.backward()
        values.append(value.item())
        gradients.append(output.grad.clone())
    assert np.isfinite(values).all() and len(set(values)) == 1
    for gradient in gradients:
        assert torch.isfinite(gradient).all() and (gradient[:, 10:20] == 0).all() and gradient.abs().sum() > 0


def test_masked_terms_equal_numpy():
    rng = np.random.default_rng(0)
    out, target, ivar = rng.normal(size=(3, 20)), rng.normal(size=(3, 20)), rng.uniform(0.5, 2, (3, 20))
    ivar[0, :7] = 0
    valid = ivar > 0
    t = [torch.from_numpy(a) for a in (out, target, ivar)]
    assert O.masked_l2(t[0], t[1], (t[2] > 0)).item() == pytest.approx(((out - target)[valid]**2).mean())
    assert O.masked_l1(t[0], t[1], (t[2] > 0)).item() == pytest.approx(np.abs((out - target)[valid]).mean())
    assert O.masked_chi2(*t).item() == pytest.approx((ivar*(out - target)**2)[valid].mean())


def test_kl_equals_numerical_integral():
    mean, logvar = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    x = np.linspace(-12, 12, 200_001)
    s = math.exp(-0.2)
    q, p = (np.exp(-0.5*((x - m)/w)**2)/(w*math.sqrt(2*math.pi)) for m, w in ((0.7, s), (0., 1.)))
    integral = np.trapezoid(q*(np.log(np.maximum(q, 1e-300)) - np.log(p)), x)
    assert O.kl_per_node(mean, logvar).item() == pytest.approx(integral, abs=1e-6)


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_decomposition_equals_loops(estimator):
    "The vectorised estimator against the formula of the paper written as loops."
    mean, logvar, z = codes(7, 2)
    n_data, b = 1000, 7
    def density(i, j, k):
        s2 = math.exp(logvar[j, k])
        return math.exp(-0.5*(z[i, k] - mean[j, k])**2/s2)/math.sqrt(2*math.pi*s2)
    def weight(i, j):
        if estimator == "weighted": return 1/(n_data*b)
        if i == j: return 1/n_data
        return (n_data - (b - 1))/(n_data*(b - 1)) if j == (i + 1) % b else 1/(b - 1)
    log_qz = [math.log(sum(weight(i, j)*density(i, j, 0)*density(i, j, 1) for j in range(b))) for i in range(b)]
    log_nodes = [sum(math.log(sum(weight(i, j)*density(i, j, k) for j in range(b))) for k in range(2)) for i in range(b)]
    expected = np.mean(np.array(log_qz) - np.array(log_nodes))
    assert O.total_correlation(z, mean, logvar, n_data, estimator).item() == pytest.approx(expected, rel=1e-6)


def test_total_correlation_is_larger_for_dependent_codes_and_pushes_apart():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(400, 1, generator=rng)
    logvar = torch.full((400, 2), -3.)
    dependent = torch.cat([a, a + 0.3*torch.randn(400, 1, generator=rng)], 1)
    independent = torch.cat([a, torch.randn(400, 1, generator=rng)], 1)
    values = [O.total_correlation(m, m, logvar, 400, "stratified").item() for m in (dependent, independent)]
    assert values[0] > values[1] + 0.5
    angle = torch.tensor(0.6, requires_grad=True)
    uniform = (torch.rand(600, 2, generator=rng) - 0.5)*3.4
    rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    rotated = uniform @ rotation
    O.total_correlation(rotated, rotated, torch.full((600, 2), -3.), 600, "stratified").backward()
    assert angle.grad > 0 # turning back towards the axes lowers it


def test_dip_and_mmd_are_zero_in_expectation_on_the_prior():
    rng = torch.Generator().manual_seed(3)
    z, prior = torch.randn(3000, 4, generator=rng), torch.randn(3000, 4, generator=rng)
    assert abs(O.mmd(z, prior).item()) < 1e-3 < O.mmd(z + 0.5, prior).item()
    tiny = torch.full_like(z, -30.)
    assert O.dip_penalty(z, tiny, "i").item() < 0.02 and O.dip_penalty(z, tiny, "ii").item() < 0.02
    with pytest.raises(ValueError, match="use 'i' or 'ii'"): O.dip_penalty(z, tiny, "iii")


def test_mmd_does_not_change_under_rotation():
    rng = torch.Generator().manual_seed(3)
    z, prior = torch.rand(200, 3, generator=rng)*3, torch.randn(200, 3, generator=rng)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=rng))
    assert O.mmd(z @ q, prior @ q).item() == pytest.approx(O.mmd(z, prior).item(), abs=1e-5)


def test_batches_of_one_and_two_give_finite_terms():
    for n in (1, 2):
        mean, logvar, z = codes(n)
        for estimator in ("weighted", "stratified"):
            assert all(torch.isfinite(part) for part in O.decompose_kl(z, mean, logvar, 100, estimator))
        assert torch.isfinite(O.dip_penalty(mean, logvar)) and torch.isfinite(O.mmd(z, torch.randn_like(z)))


def test_batch_larger_than_the_data_set_is_finite():
    mean, logvar, z = codes(40)
    assert torch.isfinite(O.total_correlation(z, mean, logvar, 10, "stratified"))


@pytest.mark.parametrize("name", sorted(O.OBJECTIVES))
def test_named_objectives_survive_json(name):
    objective = O.objective_settings(name)
    assert O.objective_from_json(O.objective_to_json(objective)) == objective


@pytest.mark.parametrize("change, message", [(dict(beta_end=-1.), "finite number >= 0"), (dict(beta_end=float("nan")), "finite number >= 0"),
                                             (dict(schedule_fraction=2.), "between 0 and 1"), (dict(schedule="step"), "is not known"),
                                             (dict(estimator="exact"), "is not known"), (dict(beta_end=0.), "use schedule='linear'")])
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message): O.objective_settings("beta_tcvae", **change)


def test_json_of_another_version_is_refused():
    values = json.loads(O.objective_to_json(O.Objective()))
    with pytest.raises(ValueError, match="lacks \\['beta_end'\\]"): O.objective_from_json(json.dumps({k: v for k, v in values.items() if k != "beta_end"}))
    with pytest.raises(ValueError, match="unknown fields \\['zeta'\\]"): O.objective_from_json(json.dumps(values | {"zeta": 1}))


# formulas against their sources -------------------------------------------------------------------------------------------------------------------

def finite(seed=0, n=6, latent=2):
    "A data set small enough to enumerate."
    mean, logvar, _ = codes(n, latent, seed)
    return mean, logvar, mean + (0.5*logvar).exp()*torch.randn(n, latent, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)


def exact_parts(mean, logvar, z):
    "The three parts of the divergence by their definition over the whole data set."
    pairwise = torch.distributions.Normal(mean[None], (0.5*logvar[None]).exp()).log_prob(z[:, None])
    log_qz, log_nodes = pairwise.sum(2).exp().mean(1).log(), pairwise.exp().mean(1).log().sum(1)
    own = torch.diagonal(pairwise.sum(2))
    prior = torch.distributions.Normal(0., 1.).log_prob(z).sum(1)
    return [part.mean().item() for part in (own - log_qz, log_qz - log_nodes, log_nodes - prior)]


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_stratified_density_is_unbiased_over_every_batch(batch):
    mean, logvar, z = finite()
    density = torch.distributions.Normal(mean[None], (0.5*logvar[None]).exp()).log_prob(z[:, None]).sum(2).exp()
    for estimator, unbiased in (("stratified", True), ("weighted", False)):
        weight, total, count = O.log_importance(batch, 6, estimator).exp(), torch.zeros(6, dtype=torch.float64), 0
        for picked in map(list, itertools.permutations(range(6), batch)):
            total[picked] += (weight*density[picked][:, picked]).sum(1)
            count += 1
        ratio = total/(count*batch/6)/density.mean(1)
        assert np.allclose(ratio, 1, atol=1e-6) == unbiased
        if not unbiased: assert (ratio < 0.9).all()


@pytest.mark.parametrize("seed", range(5))
def test_stratified_total_correlation_is_less_biased(seed):
    mean, logvar, z = finite(seed)
    exact, bias = exact_parts(mean, logvar, z)[1], {}
    for estimator in ("stratified", "weighted"):
        values = [O.total_correlation(z[i], mean[i], logvar[i], 6, estimator).item() for i in map(list, itertools.permutations(range(6), 4))]
        bias[estimator] = np.mean(values) - exact
    assert abs(bias["stratified"]) < 0.3 < 1 < bias["weighted"]
    assert abs(bias["weighted"] - math.log(6)) < 0.4 # (nodes - 1) ln N, with two nodes


def test_a_batch_that_is_the_data_set_gives_the_definition():
    "Every part, not their sum alone; a stratified row of a full batch weighs every posterior by 1/N."
    mean, logvar, z = finite(3, n=40)
    parts = O.decompose_kl(z, mean, logvar, 40, "stratified")
    weight = O.log_importance(40, 40, "stratified").exp()
    expected = exact_parts(mean, logvar, z)
    assert weight[0, 0] == pytest.approx(1/40) and weight[0, 1] == pytest.approx(1/(40*39)) and weight[-1, 0] == weight[0, 1] and weight[0, 2] == pytest.approx(1/39)
    assert [p.item() for p in parts] == pytest.approx(expected, abs=0.1)
    weighted = [p.item() for p in O.decompose_kl(z, mean, logvar, 40, "weighted")]
    assert weighted == pytest.approx([expected[0] + math.log(40), expected[1] + math.log(40), expected[2] - 2*math.log(40)], abs=1e-5)


@pytest.mark.parametrize("kind, diagonal", [("i", 1.), ("i", 10.), ("ii", 1.), ("ii", 3.)])
def test_dip_equals_numpy(kind, diagonal):
    mean, logvar, _ = codes(30, 4)
    covariance = np.cov(mean.numpy().T) + (np.diag(np.exp(logvar.numpy()).mean(0)) if kind == "ii" else 0)
    expected = sum(covariance[i, j]**2 for i in range(4) for j in range(4) if i != j) + diagonal*sum((covariance[i, i] - 1)**2 for i in range(4))
    assert O.dip_penalty(mean, logvar, kind, diagonal).item() == pytest.approx(expected, rel=1e-9)


def test_mmd_equals_loops_over_distinct_pairs():
    z, _, prior = codes(9, 3)
    prior = prior[:7]
    for width in (None, 0.8):
        def kernel(a, b): return math.exp(-((a - b)**2).sum().item()/(2*(3 if width is None else width**2)))
        within_z = np.mean([kernel(z[i], z[j]) for i in range(9) for j in range(9) if i != j])
        within_prior = np.mean([kernel(prior[i], prior[j]) for i in range(7) for j in range(7) if i != j])
        across = np.mean([kernel(a, b) for a in z for b in prior])
        assert O.mmd(z, prior, width).item() == pytest.approx(within_z + within_prior - 2*across, abs=1e-9)


def test_capacity_pulls_from_both_sides():
    for values, quota in (([1., 2.], 5.), ([4., 3.], 5.)):
        kl = torch.tensor(values, requires_grad=True)
        penalty = O.capacity_penalty(kl, quota)
        penalty.backward()
        assert penalty.item() == 2 and (kl.grad == (1. if sum(values) > quota else -1.)).all()


def test_kl_per_node_is_an_average_and_keeps_the_nodes_apart():
    mean, logvar, _ = codes(11, 3)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5*logvar).exp()), torch.distributions.Normal(0., 1.))
    assert torch.allclose(O.kl_per_node(mean, logvar), expected.mean(0))


def test_fields_that_came_later_leave_old_json_as_it_was():
    old = json.loads(O.objective_to_json(O.Objective()))
    assert not {"dip_kind", "dip_diagonal"} & set(old) and O.objective_from_json(json.dumps(old)) == O.Objective()
    new = O.objective_settings("dip_vae_i")
    assert json.loads(O.objective_to_json(new))["dip_kind"] == "i" and O.objective_from_json(O.objective_to_json(new)) == new
    with pytest.raises(ValueError, match="dip_kind='iii' is not known"): O.objective_settings(dip_kind="iii")
    with pytest.raises(ValueError, match="capacity=-1.0: use a finite"): O.objective_settings("capacity", capacity=-1.)


def test_weighted_mean_and_density_equal_numpy_and_torch():
    rng = np.random.default_rng(4)
    values, weight = rng.normal(size=(3, 2, 9)), rng.uniform(0.2, 3, (3, 2, 9))
    weight[1, 0, :4] = 0
    assert O.masked_mean(torch.from_numpy(values), torch.from_numpy(weight)).item() == pytest.approx(np.average(values, weights=weight))
    out, target = rng.normal(size=(2, 3, 2, 9))
    assert O.masked_l2(*map(torch.from_numpy, (out, target, weight))).item() == pytest.approx(np.average((out - target)**2, weights=weight))
    mean, logvar, z = codes(9)
    assert torch.allclose(O.log_normal_density(z, mean, logvar), torch.distributions.Normal(mean, (0.5*logvar).exp()).log_prob(z))
