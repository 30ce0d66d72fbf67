"""Independent axes: exact inverse, honest uncertainties, and no axis turned without a reason."""
import math
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from scipy.stats import spearmanr
from specnb.axes import IndependentAxes, fit_axes, pairwise_rotation, spacing_entropy
from specnb.learner import load_bundle, save_bundle, spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.nets import build_network, net_config
from specnb.prep import PrepRecipe


def random_axes(n=5, dead=(3,), seed=0, strength=0.6, hidden=16):
    torch.manual_seed(seed)
    axes = IndependentAxes(n, hidden)
    live = torch.ones(n); live[list(dead)] = 0
    axes.live.copy_(live)
    for name in ("inner", "outer", "inner_bias", "outer_bias"): getattr(axes, name).copy_(strength*torch.randn(getattr(axes, name).shape))
    nodes = live.nonzero()[:, 0]
    axes.linear[nodes[:, None], nodes] += 0.3*torch.randn(len(nodes), len(nodes))
    for name in ("centre", "out_centre"): getattr(axes, name).copy_(torch.randn(n)*live)
    for name in ("scale", "out_scale"): getattr(axes, name).copy_(1 + live*torch.rand(n))
    return axes


def causes(n, seed):
    "Two uniform causes, one normal, one exponential."
    rng = np.random.default_rng(seed)
    return np.stack((rng.uniform(-1.7, 1.7, n), rng.uniform(-1.7, 1.7, n), rng.normal(size=n), rng.exponential(size=n) - 1), 1)


def found(nodes, truth): return np.array([max(abs(spearmanr(nodes[:, j], truth[:, k])[0]) for j in range(nodes.shape[1])) for k in range(truth.shape[1])])


@pytest.mark.parametrize("seed", range(4))
def test_there_and_back(seed):
    axes, code = random_axes(seed=seed), 2*torch.randn(500, 5)
    assert (axes(code) - code).abs().max() > 0.5
    assert torch.allclose(axes.inverse(axes(code)), code, atol=2e-4)
    assert torch.allclose(axes(axes.inverse(code)), code, atol=2e-4)
    assert torch.equal(axes(code)[:, 3], code[:, 3])


def test_a_dead_node_has_no_say():
    axes, code = random_axes(), torch.randn(50, 5)
    other = code.clone(); other[:, 3] = 9.
    assert torch.equal(axes(code)[:, [0, 1, 2, 4]], axes(other)[:, [0, 1, 2, 4]])


def test_jacobian_and_volume_are_those_of_the_map():
    axes, code = random_axes(seed=5), torch.randn(30, 5)
    by_hand = axes.jacobian(code)
    automatic = torch.stack([torch.autograd.functional.jacobian(lambda x: axes(x[None])[0], row) for row in code])
    assert torch.allclose(by_hand, automatic, atol=1e-4)
    _, volume, _ = axes._bend(((code - axes.centre)/axes.scale) @ axes.linear.T)
    expected = torch.linalg.slogdet(automatic)[1]
    mine = volume + torch.linalg.slogdet(axes.linear)[1] - axes.scale.log().sum() - axes.out_scale.log().sum()
    assert torch.allclose(mine, expected, atol=1e-4)


@pytest.mark.parametrize("name, draw, truth", [("normal", torch.randn, 0.5*math.log(2*math.pi*math.e)), ("uniform", torch.rand, 0.)])
def test_entropy_approaches_the_truth(name, draw, truth):
    torch.manual_seed(1)
    errors = [abs(float(spacing_entropy(draw(n))) - truth) for n in (1000, 100_000)]
    assert errors[1] < 0.02 and errors[1] < errors[0]
    assert float(spacing_entropy(torch.tensor([1.0]*100))) < -8  # a constant has no entropy, and no infinity either


@pytest.mark.parametrize("seed", range(2))
def test_linear_mixtures_are_undone(seed):
    rng, truth = np.random.default_rng(seed), causes(5000, seed)
    mixed = truth @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    axes = fit_axes(torch.tensor(mixed[:4000]).float(), torch.full((4000, 4), -6.), seed=seed, n_steps=200)
    assert axes.fitted and (found(axes(torch.tensor(mixed[4000:]).float()).numpy(), truth[4000:]) > 0.98).all()
    assert axes.gains[0] > 0.1


def test_curved_mixtures_need_the_bend():
    truth = causes(6000, 7)
    curved = truth.copy()
    curved[:, 1] += 0.3*truth[:, 0]**2
    curved[:, 3] *= np.exp(0.25*truth[:, 0])
    mixed = torch.tensor(curved @ np.array([[1, .4, .1, 0], [-.3, 1, 0, .2], [.1, -.1, 1, 0], [0, -.2, 0, 1]])).float()
    axes = fit_axes(mixed[:5000], torch.full((5000, 4), -6.))
    assert axes.gains[1] > axes.gains[0] + 0.05
    assert (found(axes(mixed[5000:]).numpy(), truth[5000:]) > 0.97).all()


@pytest.mark.parametrize("seed", range(3))
def test_independent_nodes_are_left_alone(seed):
    torch.manual_seed(seed)
    assert not fit_axes(torch.randn(4000, 4), torch.full((4000, 4), -6.), n_steps=200).fitted


def test_two_normal_causes_follow_the_posterior():
    torch.manual_seed(2)
    turn = torch.tensor([[.8, .6], [-.6, .8]], dtype=torch.float64)
    posterior = turn @ torch.diag(torch.tensor([1e-3, .2], dtype=torch.float64)) @ turn.T
    rotation = pairwise_rotation(torch.randn(6000, 2, dtype=torch.float64) @ turn.T, posterior, diagonality=0.1)
    assert (rotation @ turn).abs().max(1).values.min() > 0.999


def test_a_bundle_carries_its_axes(tmp_path):
    torch.manual_seed(0)
    model = build_network(net_config("tiny")).eval()
    model.fit_frontend([(torch.rand(8, 512) + 0.5, torch.ones(8, 512))])
    model.axes.load_state_dict(random_axes(6, (2, 5), hidden=32).state_dict())
    flux = torch.rand(4, 512) + 0.5
    save_bundle(tmp_path/"b", model, wavelength=np.linspace(5000, 5100, 512), recipe=PrepRecipe(), medium="air", frame="barycentric")
    again = load_bundle(tmp_path/"b").model
    with torch.no_grad():
        assert again.axes.fitted
        for ours, theirs in zip(model.encode(flux), again.encode(flux)): assert torch.equal(ours, theirs)
        mean = model.encode(flux)[0]
        assert torch.equal(model.decode(mean), again.decode(mean))
        plain = build_network(net_config("tiny")); plain.load_state_dict(model.state_dict() | {f"axes.{k}": v for k, v in IndependentAxes(6, 32).state_dict().items()})
        assert not torch.allclose(plain.eval().encode(flux)[0], mean)
        assert torch.allclose(plain.decode(plain.encode(flux)[0]), model.decode(mean), atol=1e-3)  # what is decoded does not depend on the axes


class Stop(Callback):
    "Ends a fit in its second batch."
    def after_step(self):
        if self.iter == 1: raise CancelFitException


def test_axes_belong_to_finished_trainings(survey, monkeypatch):
    "Fitted after a whole fit, dropped when the next begins, and touched by neither a search nor a fit that was cut short."
    calls = []
    monkeypatch.setattr("specnb.learner.align_axes", lambda learn: calls.append(learn.model.axes.fitted))
    learn = spectrum_learner(spectrum_dataloaders(survey, bs=16), net_config("tiny", n_pixels=survey.sizes["wavelength"]))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        assert calls == [False]
        learn.model.axes.load_state_dict(random_axes(6, (2,), hidden=32).state_dict())
        learn.lr_find(num_it=5, show_plot=False)
        assert calls == [False] and learn.model.axes.fitted
        learn.fit_one_cycle(1, cbs=Stop())
        assert calls == [False] and not learn.model.axes.fitted
        learn.fit_one_cycle(1)
        assert calls == [False, False]


def test_networks_without_axes_are_left_alone(survey, monkeypatch):
    monkeypatch.setattr("specnb.learner.align_axes", lambda learn: pytest.fail("aligned"))
    for net in (net_config("paper_scaled", n_pixels=survey.sizes["wavelength"], n_latent=4), net_config("tiny", n_pixels=survey.sizes["wavelength"], axes_hidden=0)):
        learn = spectrum_learner(spectrum_dataloaders(survey, bs=32), net)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
