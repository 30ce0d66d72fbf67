"""What training finds, and that it invents nothing: noise, a constant star, and the axes after training."""
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from specnb.dims import informative_nodes
from specnb.encode import decoder, encode
from specnb.learner import load_bundle, save_bundle, spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.nets import net_config
from specnb.prep import PrepRecipe, split_by_object
from specnb.simulate import sample_survey, simulate
from specnb.spectra import make_spectra
from specnb.wave import log_grid


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(ds, net, n_epoch, folder, seed=0):
    "Bundle of a network trained on 70 % of the stars, and the 20 % for the test."
    split = split_by_object(ds, 0.1, 0.2, seed)
    dls = spectrum_dataloaders(ds, split=split, bs=32, seed=seed, device="cpu")
    learn = spectrum_learner(dls, net, seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 3e-3)
    bundle = load_bundle(save_bundle(folder/"bundle", learn.model, wavelength=dls.train.dataset.wavelength, recipe=PrepRecipe()))
    return bundle, ds.isel(spectrum=np.flatnonzero(split.values == "test"))


def rank_correlation(codes, values): return np.array([abs(spearmanr(node, values)[0]) for node in codes.T])


def own_axes(bundle, codes):
    "The same codes on the axes that the network was trained on."
    with torch.no_grad(): return bundle.model.axes.inverse(torch.from_numpy(codes)).numpy()


def noisy(truth, sigma, n, seed):
    "Exposures of one flux, which differ by noise alone; every one counts as a star of its own."
    rng, names = np.random.default_rng(seed), [f"exposure {i}" for i in range(n)]
    wavelength = log_grid(5000, 5500, truth.size)
    flux = truth + sigma*rng.normal(size=(n, truth.size))
    return make_spectra(flux, np.tile(1/sigma**2, (n, 1)), wavelength, names, medium="air", frame="barycentric", coords={"object": names})


def nothing(): return np.ones(512), np.full(512, 1/30)


def constant_star():
    flux = simulate(dict(snr=[100.]), log_grid(5000, 5500, 512), seed=4, noise=False, gap=None).flux.values[0].astype(float)
    flux = flux/np.median(flux)
    return flux, np.sqrt(flux.clip(0.01))/50


def beyond_noise(bundle, ds, latents, sigma, seed=5, n_again=4):
    "Share of every node's variance that photon noise does not make: spectra are measured again with as much noise on top."
    rng, moved = np.random.default_rng(seed), []
    for _ in range(n_again):
        again = ds.assign(flux=ds.flux + (sigma*rng.normal(size=ds.flux.shape)).astype(np.float32))
        moved.append((encode(bundle, again, progress=False)["mean"].values - latents["mean"].values).var(0))
    return 1 - np.mean(moved, 0)/latents["mean"].values.var(0)


@pytest.fixture(scope="module", params=[nothing, constant_star], ids=lambda source: source.__name__)
def noise_alone(request, tmp_path_factory):
    "Network, test rows and codes of spectra that differ by noise alone."
    torch.set_num_threads(1)
    truth, sigma = request.param()
    bundle, held = trained(noisy(truth, sigma, 1500, 1), net_config("tiny"), 8, tmp_path_factory.mktemp("noise"), 1)
    return bundle, held, encode(bundle, held, progress=False), sigma


def test_no_node_holds_more_than_noise_where_nothing_varies(noise_alone):
    bundle, held, latents, sigma = noise_alone
    assert (beyond_noise(bundle, held, latents, sigma) < 0.4).all()
    assert (latents["mean"].values.var(0) > 0.01).any() # where the common criterion would have found nodes


def test_no_informative_node_where_nothing_varies(noise_alone):
    bundle, held, latents, _ = noise_alone
    judged = informative_nodes(latents, decode=decoder(bundle))
    assert judged.attrs["n_informative"] == 0, judged.to_dataframe().T.to_string()


def test_a_cause_is_found_among_the_same_noise(tmp_path):
    "The empty verdict above is not blindness: one weak cause in the same star, and one node."
    truth, sigma = constant_star()
    ds = noisy(truth, sigma, 1500, 0)
    rng = np.random.default_rng(9)
    strength = rng.uniform(-1, 1, 1500)
    pattern = np.interp(np.arange(512), np.arange(0, 512, 4), rng.normal(size=128))
    ds = ds.assign(flux=ds.flux + (0.02*strength[:, None]*pattern*truth).astype(np.float32)).assign_coords(strength=("spectrum", strength))
    bundle, held = trained(ds, net_config("tiny"), 8, tmp_path)
    latents = encode(bundle, held, progress=False)
    judged = informative_nodes(latents, decode=decoder(bundle))
    best = rank_correlation(latents["mean"].values, held.strength.values)
    assert best.max() > 0.9
    assert beyond_noise(bundle, held, latents, sigma)[best.argmax()] > 0.8
    assert judged.informative.values[best.argmax()] and judged.attrs["n_informative"] <= 2


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_axes_after_training_separate_gravity_and_metals(seed, tmp_path):
    ds = sample_survey(3000, seed=seed, wavelength=log_grid(3785, 6910, 1024))
    bundle, held = trained(ds, net_config("demo", n_pixels=1024), 8, tmp_path, seed)
    codes = encode(bundle, held, progress=False)["mean"].values
    assert bundle.model.axes.fitted
    own = own_axes(bundle, codes)
    for name in ("logg", "metallicity"): assert rank_correlation(codes, held[name].values).max() > rank_correlation(own, held[name].values).max() + 0.03
