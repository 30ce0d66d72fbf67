"""Learner: determinism, resume, bundles under damage, fastai's own functions."""
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import SuggestionMethod
from safetensors.torch import load_file, save_file

from specnb.callbacks import DisentangleCallback, beta_at
from specnb.learner import (Checkpoint, fit_resumable, fit_starts, history_frame, load_bundle, load_checkpoint, run_identity, save_bundle, spectrum_learner)
from specnb.loader import spectrum_dataloaders
from specnb.nets import net_config
from specnb.objectives import OBJECTIVES, objective_settings
from specnb.prep import split_by_object
from specnb.simulate import sample_survey
from specnb.spectra import open_store, save_store
from specnb.wave import log_grid


@pytest.fixture(scope="module")
def dls(survey):
    return spectrum_dataloaders(survey, bs=32)


def fit(learn, folder=None, n_epoch=3, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return learn.fit_one_cycle(n_epoch, **kwargs) if folder is None else fit_resumable(learn, n_epoch, folder, **kwargs)


def equal_states(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_same_run_and_global_generator_untouched(dls):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    learners = [spectrum_learner(dls, "tiny", seed=s) for s in (1, 1, 2)]
    for learn in learners:
        fit(learn, n_epoch=2)
        torch.rand(3)
    assert equal_states(learners[0], learners[1]) and not equal_states(learners[0], learners[2])
    assert [float(v) for v in learners[0].recorder.losses] == [float(v) for v in learners[1].recorder.losses]
    torch.set_rng_state(before)
    fit(spectrum_learner(dls, "tiny"), n_epoch=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_trains_and_logs_its_terms(dls, objective):
    learn = spectrum_learner(dls, "tiny", objective)
    fit(learn, n_epoch=4, lr_max=5e-3)
    table = history_frame(learn)
    assert np.isfinite(table.drop(columns=["capacity", "dip", "mmd"], errors="ignore").to_numpy()).all()
    assert table.reconstruction.iloc[-1] < table.reconstruction.iloc[0]
    settings = objective_settings(objective)
    for name in ("capacity", "dip", "mmd"): assert (name in table) == bool(getattr(settings, name))
    assert table.beta.iloc[-1] == pytest.approx(beta_at(settings, 1.), rel=1e-3)
    assert len(learn.disentangle.node_kl) == 4 and learn.disentangle.node_kl[0].shape == (6,)


@pytest.mark.parametrize("reconstruction", ["l1", "l2", "chi2"])
def test_validation_loss_is_the_weighted_sum_of_its_terms(dls, reconstruction):
    learn = spectrum_learner(dls, "tiny", objective_settings("beta_tcvae", reconstruction=reconstruction))
    fit(learn, n_epoch=2)
    row = history_frame(learn).iloc[-1]
    assert row.valid_loss == pytest.approx(row.reconstruction + row.beta*(row.kl + 20*row.total_correlation), rel=1e-4)


def test_columns_do_not_pile_up_over_fits(dls):
    learn = spectrum_learner(dls, "tiny")
    fit(learn, n_epoch=1)
    names = list(learn.recorder.metric_names)
    fit(learn, n_epoch=1)
    assert list(learn.recorder.metric_names) == names and len(set(names)) == len(names)


def test_gradient_reaches_the_first_layer_and_one_batch_is_learned_by_heart(dls):
    flux, ivar, *_ = dls.one_batch()
    learn = spectrum_learner(dls, "tiny", "autoencoder")
    weight = next(learn.model.encoder.parameters())
    optimizer = torch.optim.Adam(learn.model.parameters(), 5e-3)
    learn.model.eval()
    for step in range(300):
        loss = learn.loss_func(learn.model(flux, ivar), flux, ivar)
        if step == 0: first = loss.item()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert weight.grad.abs().sum() > 0 and loss.item() < 0.3*first


def test_fastai_functions_work(dls, tmp_path):
    learn = spectrum_learner(dls, "tiny", path=tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(): found = learn.lr_find(suggest_funcs=SuggestionMethod.Valley, num_it=30, show_plot=False)
    assert 1e-7 < found.valley < 10
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    fit(learn, n_epoch=1)
    learn.show_results(max_n=2)
    with learn.no_bar(): preds, _ = learn.get_preds()
    assert preds[0].shape == (len(dls.valid.dataset), 512)
    with torch.no_grad(): alone = learn.model.eval()(*[torch.from_numpy(v[:3]) for v in dls.valid.dataset.cache])[0]
    torch.testing.assert_close(preds[0][:3], alone, atol=1e-5, rtol=1e-5)
    assert len(learn.validate()) == len(learn.recorder.metric_names) - 3
    learn.save("weights")
    learn.export("export.pkl")
    assert (tmp_path/"export.pkl").stat().st_size < 3e6 and len(learn.dls.train.dataset) > 0


def test_bfloat16_learns_and_codes_stay_close(dls):
    learners = [spectrum_learner(dls, "tiny", precision=p) for p in ("float32", "bfloat16")]
    for learn in learners: fit(learn, n_epoch=6, lr_max=5e-3)
    last = [history_frame(learn).valid_loss.iloc[-1] for learn in learners]
    assert last[1] == pytest.approx(last[0], rel=0.1) and last[1] < 0.9*history_frame(learners[1]).valid_loss.iloc[0]
    assert all(p.dtype == torch.float32 for p in learners[1].model.parameters())


def test_empty_sky_among_the_validation_spectra_does_not_swamp_the_divergence():
    "Noise about zero, whose median is next to nothing, in a model that never saw the like."
    ds = sample_survey(160, 1, 3, log_grid(5160, 5360, 1024))
    split = split_by_object(ds, 0.1, 0.1, 0)
    flux, sky = ds.flux.values.copy(), np.flatnonzero(split.values == "valid")[:2]
    flux[sky] = 1e-4 + 0.01 * np.random.default_rng(0).normal(size=(2, 1024))
    dls = spectrum_dataloaders(ds.assign(flux=(ds.flux.dims, flux, ds.flux.attrs)), split=split, bs=32, device="cpu")
    learn = spectrum_learner(dls, "demo")
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4)
    assert (history_frame(learn).kl < 1e4).all()


def test_nan_stops_before_the_step_and_names_the_spectra(dls):
    learn = spectrum_learner(dls, "tiny")
    learn.create_opt()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}

    class Spoil(Callback):
        def before_batch(self):
            flux = self.xb[0].clone()
            flux[5, 7], ivar = float("inf"), self.xb[1].clone()
            self.learn.xb, self.names = (flux, ivar), self.dl.batch_coord("spectrum_id").astype(str)
        def after_pred(self): self.learn.pred = tuple(p*float("nan") for p in self.learn.pred)

    spoil = Spoil()
    learn.add_cb(spoil)
    with pytest.raises(FloatingPointError) as caught: fit(learn, n_epoch=1)
    assert caught.value.spectrum_id[0] == spoil.names[5] and sorted(caught.value.spectrum_id) == sorted(spoil.names)
    assert all(name in str(caught.value) for name in spoil.names)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())


class Stop(Callback):
    "Ends the process, or the fit, at a moment of the third epoch."
    def __init__(self, when): self.when = when
    def after_backward(self):
        if self.when == "batch" and self.epoch == 2 and self.iter == 2: raise KeyboardInterrupt
    def after_train(self):
        if self.when == "train" and self.epoch == 2: raise KeyboardInterrupt
    def after_validate(self):
        if self.when == "validate" and self.epoch == 2: raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["batch", "train", "validate"])
def test_resumed_run_is_bit_identical(dls, tmp_path, when):
    straight = spectrum_learner(dls, "tiny")
    expected = fit(straight, tmp_path/"straight", n_epoch=4)
    with pytest.raises(KeyboardInterrupt): fit(spectrum_learner(dls, "tiny", cbs=[Stop(when)]), tmp_path/"run", n_epoch=4)
    assert load_checkpoint(tmp_path/"run"/"checkpoint.pt")["epoch"] == 1
    torch.rand(17)
    resumed = spectrum_learner(dls, "tiny")
    history = fit(resumed, tmp_path/"run", n_epoch=4)
    assert equal_states(straight, resumed)
    assert list(history.epoch) == [0, 1, 2, 3] and list(history.valid_loss) == list(expected.valid_loss) and list(history.kl) == list(expected.kl)
    again = spectrum_learner(dls, "tiny")
    pd_again = fit(again, tmp_path/"run", n_epoch=4)
    assert list(pd_again.valid_loss) == list(expected.valid_loss) and equal_states(again, straight)


def test_resume_from_a_streamed_store_is_bit_identical(survey, tmp_path):
    store = open_store(save_store(survey, tmp_path/"spectra.zarr", chunk_rows=16))
    def loaders(): return spectrum_dataloaders(store, bs=32, memory_limit=0, buffer_rows=64)
    straight = spectrum_learner(loaders(), "tiny")
    fit(straight, tmp_path/"straight", n_epoch=3)
    with pytest.raises(KeyboardInterrupt): fit(spectrum_learner(loaders(), "tiny", cbs=[Stop("batch")]), tmp_path/"run", n_epoch=3)
    resumed = spectrum_learner(loaders(), "tiny")
    fit(resumed, tmp_path/"run", n_epoch=3)
    assert equal_states(straight, resumed)


def test_starts_resume_and_keep_the_lowest_validation_loss(dls, tmp_path):
    "The second call finds every start done; seeds that repeat count once."
    def make(seed):
        learn = spectrum_learner(dls, "tiny", seed=seed)
        learn.logger = lambda *row: None
        return learn.remove_cb(ProgressCallback)
    fit_resumable(make(4), 2, tmp_path/"start-4")
    kept, history, table = fit_starts(make, [4, 5, 5, 6], 2, tmp_path)
    assert list(table.seed) == [4, 5, 6] and table.kept.sum() == 1
    assert table.valid_loss[table.kept].item() == table.valid_loss.min()
    again, same, repeated = fit_starts(make, [4, 5, 6], 2, tmp_path)
    assert equal_states(kept, again) and repeated.equals(table) and list(same.valid_loss) == list(history.valid_loss)
    assert history.valid_loss.iloc[-1] == table.valid_loss.min()
    with pytest.raises(ValueError, match="no seeds"): fit_starts(make, [], 2, tmp_path)


@pytest.mark.parametrize("change, field", [(dict(seed=5), "seed"), (dict(objective="beta_vae"), "objective"), (dict(wd=0.5), "wd")])
def test_checkpoint_of_another_run_is_refused(dls, tmp_path, change, field):
    fit(spectrum_learner(dls, "tiny"), tmp_path, n_epoch=1)
    with pytest.raises(ValueError, match=f"belongs to another run: its {field}"): fit(spectrum_learner(dls, "tiny", **change), tmp_path, n_epoch=1)
    with pytest.raises(ValueError, match="its n_epoch is 1, not 2"): fit(spectrum_learner(dls, "tiny"), tmp_path, n_epoch=2)
    with pytest.raises(ValueError, match="its net"): fit(spectrum_learner(dls, net_config("tiny", n_latent=4)), tmp_path, n_epoch=1)


@pytest.mark.parametrize("keep", [0, 10, 3000, -1])
def test_damaged_checkpoint_is_named_and_left_alone(dls, tmp_path, keep):
    learn = spectrum_learner(dls, "tiny")
    fit(learn, tmp_path, n_epoch=1)
    path = tmp_path/"checkpoint.pt"
    raw = path.read_bytes()[:keep]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or not a checkpoint.*remove it"): fit(spectrum_learner(dls, "tiny"), tmp_path, n_epoch=1)
    assert path.read_bytes() == raw


def test_failure_while_a_checkpoint_is_written_keeps_the_previous_one(dls, tmp_path, monkeypatch):
    learn = spectrum_learner(dls, "tiny")
    fit(learn, tmp_path, n_epoch=1)
    before = (tmp_path/"checkpoint.pt").read_bytes()
    def disk_full(state, part):
        Path(part).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", disk_full)
    checkpoint = Checkpoint(tmp_path/"checkpoint.pt", {})
    checkpoint.learn = learn
    checkpoint.before_fit()
    with pytest.raises(OSError, match="No space left"): checkpoint.after_epoch()
    assert (tmp_path/"checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


KILLED = textwrap.dedent("""
    import os, resource, signal, sys, torch
    torch.set_num_threads(1)
    from fastai.callback.core import Callback
    from specnb.learner import fit_resumable, save_bundle, spectrum_learner
    from specnb.loader import spectrum_dataloaders
    from specnb.spectra import make_spectra
    folder, word = sys.argv[1:]
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    class Kill(Callback):
        def after_backward(self):
            if word == "step" and self.epoch == 2 and self.iter == 1: die()
    if word == "write": # in the middle of the eleventh checkpoint
        whole, written = torch.save, []
        def cut(state, part):
            written.append(part)
            whole(state, part)
            if len(written) == 11: open(part, "r+b").truncate(1000); die()
        torch.save = cut
    if word == "full": # no file may grow beyond a few kilobytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        class Full(Callback):
            def before_batch(self):
                if self.epoch == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    flux = 1 + 0.2*torch.rand(80, 128, generator=torch.Generator().manual_seed(0)).numpy()
    dls = spectrum_dataloaders(make_spectra(flux, 0*flux + 100, torch.linspace(5000, 5100, 128).double().numpy(), [f"s{i}" for i in range(80)],
                                            medium="air", frame="rest"), split=["train"]*60 + ["valid"]*20, bs=16)
    learn = spectrum_learner(dls, "tiny", cbs=[Kill(), *([Full()] if word == "full" else [])])
    with learn.no_bar(), learn.no_logging(): history = fit_resumable(learn, 4, folder, every=None if word == "epochs" else 0.)
    print(sum(float(p.double().sum()) for p in learn.model.parameters()).hex(), *[float(v).hex() for v in history.to_numpy().ravel()])
""")


def test_killed_process_resumes(tmp_path):
    "SIGKILL in a step or while a checkpoint is written, or a full disk; then the same script again: weights and history as in a run that was left alone, bit by bit."
    def start(folder, word):
        return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path/folder), word], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"})
    straight = start("straight", "epochs")
    ended = {word: start(word, word) for word in ("step", "write", "full")}
    expected, errors = straight.communicate(timeout=300)
    assert straight.returncode == 0 and expected.startswith(("0x", "-0x")), errors
    for word, process in ended.items():
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == (1 if word == "full" else -signal.SIGKILL), errors
        if word == "full": assert "could not be written" in errors and "the checkpoint before it is intact" in errors
        state = load_checkpoint(tmp_path/word/"checkpoint.pt")
        assert (state["epoch"], state["within"]) == (1, None) if word == "full" else state["within"]["batches"] > 0
    for process in [start(word, "go") for word in ended]:
        found, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and found == expected, errors


@pytest.fixture(scope="module")
def saved(dls, tmp_path_factory):
    learn = spectrum_learner(dls, "tiny")
    fit(learn, n_epoch=1)
    data = dls.train.dataset
    path = save_bundle(tmp_path_factory.mktemp("bundles")/"with a space", learn.model, wavelength=data.wavelength, recipe=data.recipe,
                       objective=learn.disentangle.objective, extra=dict(seed=0, store="abc"))
    return learn, path


def test_bundle_round_trip(saved, dls):
    learn, path = saved
    bundle = load_bundle(path)
    flux, ivar, *_ = dls.valid.one_batch()
    learn.model.eval()
    with torch.no_grad():
        for a, b in zip(bundle.model(flux, ivar), learn.model(flux, ivar)): assert torch.equal(a, b)
        z = torch.randn(3, 6)
        assert torch.equal(bundle.model.decode(z), learn.model.decode(z))
    assert bundle.config == learn.model.config and bundle.objective == learn.disentangle.objective and bundle.recipe == dls.train.dataset.recipe
    assert np.array_equal(bundle.wavelength, dls.train.dataset.wavelength) and bundle.wavelength.dtype == np.float64
    assert (bundle.medium, bundle.frame, bundle.extra) == ("air", "barycentric", dict(seed=0, store="abc"))
    assert bundle.fingerprint == load_bundle(path).fingerprint and len(bundle.fingerprint) == 16
    assert not bundle.model.training and sorted(f.name for f in path.iterdir()) == ["config.json", "model.safetensors"]


def test_further_training_of_a_bundle_keeps_its_front_end(saved, dls):
    bundle = load_bundle(saved[1])
    centre = bundle.model.frontend.centre.clone()
    learn = spectrum_learner(dls, bundle.model)
    fit(learn, n_epoch=1)
    assert torch.equal(learn.model.frontend.centre, centre)


def copy_of(path, tmp_path):
    for file in path.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_flipped_byte_and_every_truncation_is_found(saved, tmp_path):
    path = copy_of(saved[1], tmp_path)
    raw = (path/"model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, 7, 8, len(raw) - 1, *rng.integers(0, len(raw), 20)]:
        (path/"model.safetensors").write_bytes(raw[:position] + bytes([raw[position] ^ (1 << int(rng.integers(8)))]) + raw[position + 1:])
        with pytest.raises(ValueError, match="model.safetensors is damaged.*copy the bundle again"): load_bundle(path)
    for keep in (0, 5, 1000, len(raw) - 1):
        (path/"model.safetensors").write_bytes(raw[:keep])
        with pytest.raises(ValueError, match="model.safetensors is damaged"): load_bundle(path)
    (path/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"): load_bundle(path)


@pytest.mark.parametrize("change, message", [
    (dict(format_version=99), "bundle format 99, this is specnb .* use the version that wrote it"),
    (dict(format="other"), "not the description of a bundle"),
    (dict(sha256=None), "checksum differs"),
    (dict(net={"depth": 3}), "does not describe these weights.*unknown fields"),
    (dict(recipe={"colour": "red"}), "does not describe these weights.*colour"),
    (dict(objective={"gamma": 1}), "does not describe these weights.*unknown fields"),
])
def test_changed_descriptions_are_refused(saved, tmp_path, change, message):
    path = copy_of(saved[1], tmp_path)
    config = json.loads((path/"config.json").read_text())
    (path/"config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message): load_bundle(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "specnb-bundle", "format_version": 1}', "\udcff"])
def test_broken_descriptions_are_refused(saved, tmp_path, text):
    path = copy_of(saved[1], tmp_path)
    (path/"config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.json"): load_bundle(path)


def test_weights_of_another_network_are_refused_even_with_a_right_checksum(saved, tmp_path):
    import hashlib
    path = copy_of(saved[1], tmp_path)
    tensors = load_file(path/"model.safetensors")
    for spoiled in ({k: v for k, v in tensors.items() if "decoder" not in k}, tensors | {"model.extra": torch.zeros(2)},
                    tensors | {"model.encoder.mean.weight": torch.zeros(3, 3)}):
        save_file(spoiled, path/"model.safetensors")
        config = json.loads((path/"config.json").read_text())
        config["sha256"] = hashlib.sha256((path/"model.safetensors").read_bytes()).hexdigest()
        (path/"config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="does not describe these weights"): load_bundle(path)


def test_bundle_needs_a_grid_that_fits(saved, tmp_path):
    learn, _ = saved
    data = learn.dls.train.dataset
    with pytest.raises(ValueError, match="needs medium and frame"): save_bundle(tmp_path/"a", learn.model, wavelength=data.wavelength.values, recipe=data.recipe)
    with pytest.raises(ValueError, match="the grid has 511 pixels, the network 512"): save_bundle(tmp_path/"a", learn.model, wavelength=data.wavelength[1:], recipe=data.recipe)
    assert not (tmp_path/"a").exists()


def test_paper_network_fits_a_bundle(tmp_path):
    from specnb.nets import build_network
    from specnb.prep import PrepRecipe
    model = build_network(net_config("paper_scaled", n_pixels=500))
    path = save_bundle(tmp_path/"b", model, wavelength=np.linspace(5000, 5100, 500), medium="air", frame="rest", recipe=PrepRecipe())
    again = load_bundle(path)
    assert again.objective is None and again.frame == "rest"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.model.state_dict().values()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trains_on_a_gpu(survey, precision):
    dls = spectrum_dataloaders(survey, bs=32, device="cuda")
    learn = spectrum_learner(dls, "tiny", precision=precision)
    fit(learn, n_epoch=4, lr_max=5e-3)
    table = history_frame(learn)
    assert table.valid_loss.iloc[-1] < table.valid_loss.iloc[0] and next(learn.model.parameters()).is_cuda
