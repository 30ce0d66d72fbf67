"""Star and sky in frames of their own: exact shifts, no invented sky, and a network whose velocities are built in."""
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from specnb.callbacks import NoiseAugmentation
from specnb.doppler import FrameAligner, LinearPart, align, fit_aligner, fit_part, principal_directions, shift_rows, template_lag
from specnb.learner import fit_resumable, load_bundle, save_bundle, spectrum_learner
from specnb.loader import ready_rows, spectrum_dataloaders
from specnb.nets import NetConfig, build_network, net_config
from specnb.prep import PrepRecipe
from specnb.simulate import sample_survey
from specnb.wave import log_grid, velocity_step


@pytest.fixture(scope="module")
def sky():
    "400 stars and a telluric band, 2,048 pixels."
    return sample_survey(400, 1, seed=3, wavelength=log_grid(6100, 6860, 2048), gap=None)


def small(n_pixels, **overrides): return net_config("doppler", n_pixels=n_pixels, n_latent=6, hidden=32, **overrides)


@pytest.mark.parametrize("pixels", [-9.5, -1., 0., 0.4, 30.25])
def test_a_shift_is_found_again(pixels):
    x = torch.arange(800.)
    rows = -sum(depth*torch.exp(-(x - place)**2/(2*width**2)) for depth, place, width in ((.5, 210., 2.), (.3, 333.3, 3.), (.8, 555.5, 1.6)))
    moved = shift_rows(rows.expand(3, -1), torch.full((3,), pixels), 1024)
    assert (template_lag(moved, rows, 40, 1024) - pixels).abs().max() < 0.003
    assert torch.allclose(shift_rows(moved, torch.full((3,), -pixels), 1024)[:, 60:-60], rows.expand(3, -1)[:, 60:-60], atol=1e-3)


def test_lags_survive_noise_and_a_row_of_nothing():
    torch.manual_seed(0)
    x = torch.arange(800.)
    rows = -torch.exp(-(x - 400)**2/18)
    noisy = shift_rows(rows.expand(200, -1), torch.linspace(-8, 8, 200), 1024) + 0.05*torch.randn(200, 800)
    assert (template_lag(noisy, rows, 40, 1024) - torch.linspace(-8, 8, 200)).abs().max() < 1.
    assert torch.isfinite(template_lag(torch.zeros(2, 800), rows, 40, 1024)).all()


def test_principal_directions_are_those_of_a_decomposition():
    torch.manual_seed(0)
    rows = torch.randn(60, 5) @ torch.randn(5, 100)
    rows = rows - rows.mean(0)
    ours, theirs = principal_directions(rows, 5), torch.linalg.svd(rows, full_matrices=False)[2][:5]
    assert torch.allclose((ours*theirs).sum(1).abs(), torch.ones(5), atol=1e-3)


def test_a_part_is_undone():
    torch.manual_seed(0)
    rows = torch.randn(300, 4) @ torch.randn(4, 100) + torch.randn(100) + 0.01*torch.randn(300, 100)
    part = fit_part(LinearPart(100, 4), rows, whitening=1.)
    assert (part.inverse(part(rows)) - rows).abs().max() < 0.1
    assert torch.allclose(part.weight, torch.full((4,), 0.25), atol=0.01)  # whitened, all components alike
    assert fit_part(LinearPart(100, 4), rows, whitening=0.).weight[0] > 0.3


def test_both_velocities_are_built_in(sky, tmp_path):
    learn = spectrum_learner(spectrum_dataloaders(sky, bs=64), small(2048))
    before = [p.clone() for p in (learn.model.aligner.star, learn.model.parts[0].synthesis)]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3)
    for old, new in zip(before, (learn.model.aligner.star, learn.model.parts[0].synthesis)): assert torch.equal(old, new)
    again = load_bundle(save_bundle(tmp_path, learn.model, wavelength=sky.wavelength, recipe=PrepRecipe())).model
    flux, ivar = (torch.tensor(v) for v in ready_rows(sky, PrepRecipe()))
    with torch.no_grad(): mean, logvar = again.encode(flux, ivar)
    assert abs(np.corrcoef(mean[:, 0], sky.radial_velocity)[0, 1]) > 0.98 and abs(np.corrcoef(mean[:, 1], sky.berv)[0, 1]) > 0.9
    assert torch.isfinite(logvar).all() and (logvar[:, :2] < -2).all()


def test_moving_node_0_moves_star_lines_by_the_velocity_it_says(sky):
    model = spectrum_learner(spectrum_dataloaders(sky, bs=64), small(2048)).model.eval()
    flux, ivar = (torch.tensor(v) for v in ready_rows(sky, PrepRecipe()))
    with torch.no_grad():
        z = model.encode(flux, ivar)[0][:50]
        moved = z.clone(); moved[:, 0] += 30/model.config.velocity_step/model.shift_scale[0]
        shifts = [model.project(model.decode(code), None)[:, 0]*model.shift_scale[0]*model.config.velocity_step for code in (z, moved)]
    assert abs(float((shifts[1] - shifts[0]).median()) - 30) < 3


def test_without_telluric_lines_there_is_no_second_frame():
    quiet = sample_survey(300, 1, seed=6, wavelength=log_grid(4500, 4600, 512), gap=None)
    model = spectrum_learner(spectrum_dataloaders(quiet, bs=64), small(512)).model.eval()
    flux, ivar = (torch.tensor(v) for v in ready_rows(quiet, PrepRecipe()))
    with torch.no_grad(): mean, _ = model.encode(flux, ivar)
    assert not model.aligner.sky.any() and not mean[:, 1].any() and torch.isfinite(mean).all()


def test_kept_projections_are_those_of_the_network(sky):
    "With them or without, the same losses to rounding; with augmentations, nothing is kept."
    losses = []
    for keep in (True, False):
        learn = spectrum_learner(spectrum_dataloaders(sky, bs=64), small(2048))
        if not keep: learn.remove_cb(learn.keep_projections)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
        losses.append([float(loss) for loss in learn.recorder.losses])
    assert np.allclose(*losses, rtol=1e-4)
    assert not hasattr(spectrum_learner(spectrum_dataloaders(sky, bs=64), small(2048), cbs=NoiseAugmentation()), "keep_projections")


def test_a_resumed_run_is_the_same_run(sky, tmp_path):
    weights = []
    for stops in ((2,), (1, 2)):
        for n in stops:
            learn = spectrum_learner(spectrum_dataloaders(sky, bs=64), small(2048))
            if n < 2:
                class Stop(Callback):
                    def before_epoch(self):
                        if self.epoch == 1: raise KeyboardInterrupt
                learn.add_cb(Stop())
            with learn.no_bar(), learn.no_logging():
                try: fit_resumable(learn, 2, tmp_path/str(len(stops)))
                except KeyboardInterrupt: assert n < 2
        weights.append(learn.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


def test_wrong_settings_are_named(sky):
    with pytest.raises(ValueError, match="n_latent >= 3"): spectrum_learner(spectrum_dataloaders(sky, bs=64), net_config("doppler", n_pixels=2048, n_latent=2))
    with pytest.raises(ValueError, match="velocity_step"): build_network(NetConfig(family="doppler"))


def test_first_learned_nodes_start_as_components_of_the_continuum():
    "A sample of 1,000 or more gives the first learned nodes a start that the decoder undoes; a smaller one leaves them to the training."
    ds = sample_survey(1100, seed=8, wavelength=log_grid(5000, 6900, 1024))
    flux, ivar = (torch.tensor(v) for v in ready_rows(ds, PrepRecipe()))
    torch.manual_seed(0)
    network = build_network(small(1024, velocity_step=50.)).eval()
    few = build_network(small(1024, velocity_step=50.)).eval()
    network.fit_frontend([(flux, ivar)]); few.fit_frontend([(flux[:900], ivar[:900])])
    assert not few.unmixing.any() and network.unmixing.any() and network.n_start == 3
    with torch.no_grad():
        rows = network.project(flux, ivar)
        mean = network.encode(rows)[0][:, 2:5]
        scores = rows[:, -network.components[2]:]
    assert torch.allclose(torch.corrcoef(mean.T), torch.eye(3), atol=0.02) # independent, so without correlation
    rebuilt = mean @ network.mixing
    assert (rebuilt - scores)[:, :3].square().mean() < 0.05*scores[:, :3].square().mean()
