"""Callbacks: augmentations touch what they should and nothing else, resume bit by bit, and the live picture appears once."""
import json
import math
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from hypothesis import given, settings
from hypothesis import strategies as st

from specnb.callbacks import DisentangleCallback, LiveNodes, NoiseAugmentation, VelocityWhitening, beta_at, objective_terms, shift_pixels
from specnb.learner import fit_resumable, spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.objectives import dip_penalty, kl_per_node, objective_settings
from specnb.spectra import make_spectra, open_store, save_store
from specnb.wave import doppler_factor, doppler_shift, linear_grid, log_grid


def lines(wave, n=40, seed=0, frame="barycentric", **coords):
    "A stellar line that follows `velocity`, a telluric one that follows `berv` outside the observatory's frame."
    rng = np.random.default_rng(seed)
    berv, velocity = rng.uniform(-28, 28, n), rng.normal(0, 10, n)
    shift = -berv if frame == "topocentric" else 0*berv
    flux = 1 - 0.4*np.exp(-0.5*((wave - doppler_shift(5034., (velocity + shift)[:, None]))/0.15)**2)
    flux = flux*(1 - 0.7*np.exp(-0.5*((wave - doppler_shift(5030., (berv + shift)[:, None]))/0.15)**2))
    ivar = rng.uniform(50, 2e4, (n, 1))*np.ones_like(flux)
    ivar[:, 700:720] = 0
    return make_spectra(flux, ivar, wave, [f"s{i}" for i in range(n)], medium="air", frame=frame,
                        coords=dict(object=[f"star {i}" for i in range(n)], berv=berv, velocity=velocity) | coords)


GRID = log_grid(5010., 5060., 1024)
SPLIT = np.array(["train", "valid"])[np.arange(40) % 2]


def loaders(ds, **kwargs): return spectrum_dataloaders(ds, split=SPLIT, bs=8, device="cpu", **kwargs)


class Keep(Callback):
    "The batches that reach the network, with coordinates of their rows and the channels the loss compares with."
    order = 30
    def before_fit(self): self.seen, self.channels = {True: [], False: []}, {True: [], False: []}
    def before_batch(self): self.seen[self.training].append((*self.xb, *self.yb, torch.from_numpy(self.dl.batch_coord("velocity")), torch.from_numpy(self.dl.batch_coord("berv"))))
    def after_pred(self): self.channels[self.training].append(self.pred[5:7])


def seen_with(ds, *cbs, n_epoch=1, seed=0):
    keep = Keep()
    learn = spectrum_learner(ds if hasattr(ds, "train") else loaders(ds), "tiny", seed=seed, cbs=[keep, *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, 1e-3)
    keep.net, keep.seen = learn.model, {k: [torch.cat(columns) for columns in zip(*batches)] for k, batches in keep.seen.items()}
    return keep


def line_place(flux, ivar, low, high, wave=GRID):
    "Centroid of the line within a window."
    window = (wave > low) & (wave < high)
    depth = torch.where(ivar > 0, flux.max() - flux, 0.)[:, window].double()
    return (depth*torch.from_numpy(wave[window])).sum(1)/depth.sum(1)


# shifting pixels ----------------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(shift=st.floats(-70, 70), seed=st.integers(0, 99), share=st.floats(0, 0.3))
def test_shift_is_the_cubic_convolution_of_valid_pixels(shift, seed, share):
    "Against the kernel of Keys [1981] as a function of distance, pixel by pixel."
    rng = np.random.default_rng(seed)
    flux, ivar = rng.normal(1, 0.2, (1, 60)), rng.uniform(0.5, 2, (1, 60))
    ivar[rng.random((1, 60)) < share] = 0
    flux[ivar == 0] = np.nan
    moved, moved_ivar = shift_pixels(torch.from_numpy(flux), torch.from_numpy(ivar), torch.tensor([shift], dtype=torch.float64))
    if abs(shift - round(shift)) < 1e-6: shift = round(shift)
    def kernel(x):
        x = abs(x)
        return 1.5*x**3 - 2.5*x**2 + 1 if x <= 1 else -0.5*x**3 + 2.5*x**2 - 4*x + 2 if x < 2 else 0.
    for i in range(60):
        near = [j for j in range(math.floor(i - shift) - 1, math.floor(i - shift) + 3) if kernel(i - shift - j) != 0]
        if any(j < 0 or j >= 60 or ivar[0, j] == 0 for j in near):
            assert moved[0, i] == 0 and moved_ivar[0, i] == 0
            continue
        assert moved[0, i].item() == pytest.approx(sum(kernel(i - shift - j)*flux[0, j] for j in near), abs=1e-5)
        a, f = math.floor(i - shift), (i - shift) % 1
        variance = 1/ivar[0, a] if f == 0 else (1 - f)/ivar[0, a] + f/ivar[0, a + 1]
        assert moved_ivar[0, i].item() == pytest.approx(1/variance, rel=1e-5)


def test_shift_there_and_back_and_beyond_the_end():
    flux, ivar = torch.rand(5, 100) + 0.5, torch.rand(5, 100) + 0.5
    whole = torch.tensor([0., 7., -7., 40., -99.])
    there = shift_pixels(flux, ivar, whole)
    back = shift_pixels(*there, -whole)
    kept = back[1] > 0
    assert torch.equal(back[0][kept], flux[kept]) and torch.equal(kept.sum(1), 100 - whole.abs().long())
    gone = shift_pixels(flux, ivar, torch.tensor([100., -100., 1e6, 250.5, -1e5]))
    assert (gone[0] == 0).all() and (gone[1] == 0).all()


@pytest.mark.parametrize("width", [1.2, 2., 5.])
def test_a_known_shift_is_recovered(width):
    pixel, shift = torch.arange(300.), torch.linspace(-20, 20, 97, dtype=torch.float64)
    flux = (1 - 0.8*torch.exp(-0.5*((pixel - 150)/width)**2)).expand(97, 300)
    moved, ivar = shift_pixels(flux, torch.ones(97, 300), shift)
    depth = torch.where(ivar > 0, 1 - moved, 0.).double()
    assert ((depth*pixel).sum(1)/depth.sum(1) - 150 - shift).abs().max() < 0.01


def test_white_noise_keeps_most_of_its_variance_and_the_weight_all_of_it():
    noise, ivar = torch.randn(2000, 40, generator=torch.Generator().manual_seed(0)), torch.full((2000, 40), 3.)
    moved, moved_ivar = shift_pixels(noise, ivar, torch.full((2000,), 0.5))
    assert moved[:, 5:-5].var().item() == pytest.approx(2*(9/16)**2 + 2*(1/16)**2, rel=0.03)  # linear: 0.5
    assert torch.allclose(moved_ivar[:, 5:-5], torch.tensor(3.))


# virtual velocities -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("distribution, scale, spread", [("normal", 12., 12.), ("uniform", 40., 40/math.sqrt(3))])
def test_both_lines_move_by_the_same_velocity(distribution, scale, spread):
    flux, ivar, target, target_ivar, velocity, berv = seen_with(lines(GRID), VelocityWhitening(scale, distribution), n_epoch=12).seen[True]
    assert torch.equal(flux, target) and torch.equal(ivar, target_ivar) and (flux[ivar == 0] == 0).all()
    assert (ivar[:, (GRID > 5027) & (GRID < 5037)] > 0).all()
    star = 299792.458*np.log(line_place(flux, ivar, 5032, 5036)/5034) - velocity
    air = 299792.458*np.log(line_place(flux, ivar, 5028, 5032)/5030) - berv
    step = 299792.458*np.log(GRID[1]/GRID[0])
    assert len(star) == 240 and (star - air).abs().max() < 0.05*step
    if distribution == "uniform": assert 0.9*scale < star.abs().max() <= scale + 0.05*step
    assert star.std().item() == pytest.approx(spread, rel=0.15) and abs(star.mean().item()) < 0.2*spread


@pytest.mark.parametrize("store, frame, where", [("barycentric", "topocentric", 0.), ("topocentric", "topocentric", 0.), ("topocentric", "barycentric", 1.), ("barycentric", "barycentric", 1.),
                                                 ("barycentric", None, 1.), ("topocentric", None, 0.)])
def test_frames(store, frame, where):
    "With no velocity drawn, the telluric line lies at rest in the observatory, and at berv in the barycentre."
    flux, ivar, *_, velocity, berv = seen_with(lines(GRID, frame=store), VelocityWhitening(0., frame=frame)).seen[True]
    step = 5030*np.log(GRID[1]/GRID[0])
    expected = 5030*doppler_factor(where*berv.numpy())
    assert np.abs(line_place(flux, ivar, 5028.5, 5031.5).numpy() - expected).max() < 0.05*step
    expected = 5034*doppler_factor(velocity.numpy() - (1 - where)*berv.numpy())
    assert np.abs(line_place(flux, ivar, 5032.5, 5035.5).numpy() - expected).max() < 0.05*step


def test_scale_zero_in_the_stores_frame_and_validation_change_nothing():
    plain, still, moving = (seen_with(lines(GRID), *cbs) for cbs in ((), (VelocityWhitening(0.),), (VelocityWhitening(30.), NoiseAugmentation())))
    for a, b in zip(plain.seen[True], still.seen[True]): assert torch.equal(a, b)
    for a, b in zip(plain.seen[False], moving.seen[False]): assert torch.equal(a, b)
    for a, b in zip(plain.net.state_dict().values(), still.net.state_dict().values()): assert a.shape == b.shape


def test_input_and_target_that_differ_move_together():
    class Other(Callback):
        order = 19
        def before_batch(self): self.learn.yb = (2*self.yb[0], self.yb[1].clone())
    flux, ivar, target, target_ivar, *_ = seen_with(lines(GRID), Other(), VelocityWhitening(30.)).seen[True]
    assert torch.allclose(target, 2*flux) and torch.equal(ivar, target_ivar) and not torch.equal(flux[0], seen_with(lines(GRID)).seen[True][0][0])


def test_streamed_store_moves_the_same_rows_by_their_own_berv(tmp_path):
    store = open_store(save_store(lines(GRID), tmp_path/"s.zarr", chunk_rows=8))
    flux, ivar, *_, berv = seen_with(loaders(store, memory_limit=0, buffer_rows=16), VelocityWhitening(0., frame="topocentric")).seen[True]
    assert np.abs(line_place(flux, ivar, 5028.5, 5031.5).numpy() - 5030).max() < 0.05*5030*np.log(GRID[1]/GRID[0]) and berv.std() > 5


@pytest.mark.parametrize("change, arguments, message", [
    (lambda ds: ds, dict(scale=-1.), "use a velocity >= 0"), (lambda ds: ds, dict(distribution="flat"), "use 'normal' or 'uniform'"), (lambda ds: ds, dict(frame="rest"), "or None"),
    (lambda ds: lines(linear_grid(5010., 5060., 0.05)), {}, "not uniform in log wavelength .*log_grid"),
    (lambda ds: ds.drop_vars("berv"), dict(frame="topocentric"), "no coordinate 'berv'"),
    (lambda ds: ds.assign_coords(berv=ds.berv.where(ds.berv > 0)), dict(frame="topocentric"), "training spectra have no berv"),
    (lambda ds: ds.assign_coords(wavelength=ds.wavelength.assign_attrs(frame="rest")), dict(frame="topocentric"), "rest frame of each star")])
def test_what_cannot_be_moved_is_refused(change, arguments, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        ds = change(lines(GRID))
        learn = spectrum_learner(loaders(ds), "tiny", cbs=[VelocityWhitening(**arguments)])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)


# noise --------------------------------------------------------------------------------------------------------------------------------------------

def test_noise_lowers_the_signal_to_noise_ratio_as_promised():
    flux, ivar, target, target_ivar, *_ = seen_with(lines(GRID), NoiseAugmentation(0.25, 0.9), n_epoch=10).seen[True]
    valid = target_ivar > 0
    assert torch.equal(valid, ivar > 0) and (flux[~valid] == 0).all()
    factor = (ivar/target_ivar).sqrt()
    spread = torch.where(valid, (factor - factor[:, :1]).abs(), 0.)
    assert spread.max() < 1e-5 and 0.25 <= factor[:, 0].min() < 0.3 and 0.8 < factor[:, 0].max() <= 0.9
    assert factor[:, 0].log().mean().item() == pytest.approx(0.5*(math.log(0.25) + math.log(0.9)), abs=0.1)
    pull = ((flux - target)/(1/ivar - 1/target_ivar).sqrt())[valid]
    assert pull.std().item() == pytest.approx(1, abs=0.01) and abs(pull.mean().item()) < 0.02


def test_the_loss_compares_with_the_clean_spectrum_under_noise_and_velocity():
    keep = seen_with(lines(GRID), NoiseAugmentation(0.2, 0.5), VelocityWhitening(30.))
    flux, ivar, target, target_ivar, *_ = keep.seen[True]
    channels, weight = (torch.cat(columns) for columns in zip(*keep.channels[True]))
    clean, clean_weight = keep.net.frontend(target, target_ivar)
    clean = keep.net.frontend.emphasise(clean)
    assert torch.equal(channels, clean) and torch.equal(weight, clean_weight)
    assert not torch.equal(channels, keep.net.frontend.emphasise(keep.net.frontend(flux, ivar)[0]))
    valid = torch.cat(keep.seen[False][:1]), keep.seen[False][1]
    assert torch.equal(torch.cat([c[0] for c in keep.channels[False]]), keep.net.frontend.emphasise(keep.net.frontend(*valid)[0]))


def test_factor_one_adds_nothing_and_bounds_are_checked():
    plain, still = seen_with(lines(GRID)), seen_with(lines(GRID), NoiseAugmentation(1., 1.))
    for a, b in zip(plain.seen[True], still.seen[True]): assert torch.equal(a, b)
    for bounds in ((0., 1.), (0.5, 0.4), (0.5, 1.1), (float("nan"), 1.)):
        with pytest.raises(ValueError, match="use 0 < lowest <= highest <= 1"): NoiseAugmentation(*bounds)


def test_augmented_run_is_the_same_twice_and_after_a_resume(tmp_path):
    class Stop(Callback):
        def after_train(self):
            if self.epoch == 2: raise KeyboardInterrupt
    def learner(*cbs): return spectrum_learner(loaders(lines(GRID)), "tiny", cbs=[VelocityWhitening(20., frame="topocentric"), NoiseAugmentation(), *cbs])
    def fit(learn, folder):
        with learn.no_bar(), learn.no_logging(): return fit_resumable(learn, 4, tmp_path/folder)
    straight, again = learner(), learner()
    history = fit(straight, "a")
    fit(again, "b")
    with pytest.raises(KeyboardInterrupt): fit(learner(Stop()), "c")
    torch.rand(11)
    resumed = learner()
    after = fit(resumed, "c")
    for other in (again, resumed): assert all(torch.equal(a, b) for a, b in zip(straight.model.state_dict().values(), other.model.state_dict().values()))
    assert list(after.valid_loss) == list(history.valid_loss)


# nodes --------------------------------------------------------------------------------------------------------------------------------------------

def test_nodes_frame_follows_the_validation_set_and_a_resume(tmp_path):
    class Stop(Callback):
        def after_train(self):
            if self.epoch == 2: raise KeyboardInterrupt
    def fit(learn, folder):
        with learn.no_bar(), learn.no_logging(): fit_resumable(learn, 4, tmp_path/folder)
    straight = spectrum_learner(loaders(lines(GRID)), "tiny")
    fit(straight, "a")
    table = straight.disentangle.nodes_frame()
    assert list(table.columns) == ["epoch", "node", "kl", "activity"] and list(table.groupby("epoch").node.count()) == [6]*4 and list(table.epoch.unique()) == [0, 1, 2, 3]
    with torch.no_grad(): mean, logvar = straight.model.eval().encode(*(torch.from_numpy(values) for values in straight.dls.valid.dataset.cache))
    last = table[table.epoch == 3]
    assert last.kl.to_numpy() == pytest.approx(kl_per_node(mean, logvar).numpy(), rel=1e-4)
    assert last.activity.to_numpy() == pytest.approx(np.var(mean.double().numpy(), 0), rel=1e-4)
    with straight.no_bar(): straight.validate()
    assert len(straight.disentangle.nodes_frame()) == 24

    broken = spectrum_learner(loaders(lines(GRID)), "tiny", cbs=[Stop()])
    with pytest.raises(KeyboardInterrupt): fit(broken, "b")
    broken.disentangle.nodes_frame().to_csv(tmp_path/"nodes.csv", index=False)
    resumed = spectrum_learner(loaders(lines(GRID)), "tiny")
    fit(resumed, "b")
    assert list(resumed.disentangle.nodes_frame().epoch.unique()) == [2, 3]
    whole = resumed.disentangle.nodes_frame(pd.read_csv(tmp_path/"nodes.csv"))
    pd.testing.assert_frame_equal(whole, table, check_exact=False, rtol=1e-6, check_dtype=False)
    pd.testing.assert_frame_equal(resumed.disentangle.nodes_frame(table), whole, rtol=1e-6, check_dtype=False) # epochs that were trained again come once
    with resumed.no_bar(), resumed.no_logging(): resumed.fit(1)
    assert list(resumed.disentangle.nodes_frame().epoch.unique()) == [2, 3, 4]


def test_nodes_frame_before_a_fit_is_empty():
    table = DisentangleCallback().nodes_frame()
    assert len(table) == 0 and list(table.columns) == ["epoch", "node", "kl", "activity"]


def fake_notebook(monkeypatch):
    "A kernel that counts what it is shown."
    shown = []
    display = types.ModuleType("IPython.display")
    display.Image = lambda data: data
    display.display = lambda png, display_id, update: shown.append((png, display_id, update))
    ipython = types.ModuleType("IPython")
    ipython.get_ipython, ipython.display, ipython.version_info = (lambda: types.SimpleNamespace(kernel=object())), display, (9, 0)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_live_picture_is_replaced_and_nothing_stays_open(monkeypatch):
    shown, open_before = fake_notebook(monkeypatch), plt.get_fignums()
    learn = spectrum_learner(loaders(lines(GRID)), "tiny", cbs=[LiveNodes()])
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
        assert [update for *_, update in shown] == [False, True, True] and len({name for _, name, _ in shown}) == 1
        assert all(png[:4] == b"\x89PNG" for png, *_ in shown) and len({png for png, *_ in shown}) == 3
        learn.validate()
        assert len(shown) == 3
        learn.fit(2)
    assert [update for *_, update in shown[3:]] == [False, True] and shown[3][1] != shown[0][1]
    assert plt.get_fignums() == open_before
    assert [row["epoch"] for row in learn.live_nodes.rows] == [0, 1, 2, 3, 4]
    assert learn.live_nodes.rows[-1]["reconstruction"] == learn.recorder.values[-1][2]


def test_live_nodes_are_silent_in_a_script_and_change_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    learners = [spectrum_learner(loaders(lines(GRID)), "tiny", path=tmp_path, cbs=cbs) for cbs in ([], [LiveNodes()])]
    for learn in learners:
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert capsys.readouterr().out.strip() == ""
    assert all(torch.equal(a, b) for a, b in zip(*(learn.model.state_dict().values() for learn in learners)))
    assert len(learners[1].live_nodes.figure().axes) == 5
    with learners[1].no_bar(): learners[1].lr_find(num_it=10, show_plot=False)
    assert len(learners[1].live_nodes.rows) == 2
    learners[1].export("learner.pkl")
    assert (tmp_path/"learner.pkl").exists()


def test_saved_notebook_holds_the_last_picture_once(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    source = """
from specnb.callbacks import LiveNodes
from specnb.learner import spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.simulate import sample_survey
from specnb.wave import log_grid
ds = sample_survey(30, seed=1, wavelength=log_grid(5000, 5500, 512))
learn = spectrum_learner(spectrum_dataloaders(ds, bs=8), "tiny", cbs=[LiveNodes()])
with learn.no_bar(), learn.no_logging(): learn.fit(3)
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for output in book.cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and len(json.dumps(pictures[0])) < 60_000


# terms and schedules ------------------------------------------------------------------------------------------------------------------------------

def test_schedules_equal_their_formulas():
    for fraction in (0.3, 1.):
        for p in (0., 0.1, 0.25, 0.9):
            x = min(p/fraction, 1)
            expected = dict(geometric=1e-2*(1e-4/1e-2)**x, linear=1e-2 + x*(1e-4 - 1e-2), cosine=1e-4 + (1e-2 - 1e-4)*(1 + math.cos(math.pi*x))/2)
            for name, value in expected.items():
                assert beta_at(objective_settings(beta_start=1e-2, beta_end=1e-4, schedule=name, schedule_fraction=fraction), p) == pytest.approx(value, rel=1e-9)
    assert beta_at(objective_settings(beta_end=3e-4, schedule_fraction=0.), 0.) == 3e-4


def test_terms_carry_the_weights_of_their_papers():
    rng = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(16, 3, generator=rng), torch.randn(16, 3, generator=rng) - 2
    z, kl = mean + 0.1, kl_per_node(mean, logvar).sum()
    terms = objective_terms(objective_settings("capacity", beta_end=5e-3, beta_start=5e-3, capacity=20., schedule_fraction=0.5), 0.25, mean, logvar, z, 100)
    assert terms["capacity"][0] == pytest.approx(abs(kl.item() - 10)) and terms["capacity"][1] == 5e-3 and terms["kl"][1] == 0
    assert objective_terms(objective_settings("capacity"), 1., mean, logvar, z, 100)["capacity"][0] == pytest.approx(abs(kl.item() - 25))
    terms = objective_terms(objective_settings("beta_tcvae"), 1., mean, logvar, z, 100)
    assert terms["kl"][0] == kl and [terms[name][1] for name in ("kl", "total_correlation")] == pytest.approx([2e-4, 20*2e-4])
    both = {name: objective_terms(objective_settings(name), 1., mean, logvar, z, 100)["dip"] for name in ("dip_vae", "dip_vae_i")}
    assert both["dip_vae"][1] == both["dip_vae_i"][1] == pytest.approx(20*2e-4)
    assert both["dip_vae"][0] == dip_penalty(mean, logvar, "ii", 1.) and both["dip_vae_i"][0] == dip_penalty(mean, logvar, "i", 10.)
    assert objective_terms(objective_settings("mmd"), 1., mean, logvar, z, 100)["mmd"][1] == pytest.approx(1e-2)
