"""Encoding at scale and the decoder as a function."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from specnb.encode import check_grid, decoder, encode, encode_rows
from specnb.learner import load_bundle, save_bundle, spectrum_learner
from specnb.loader import ready_rows, spectrum_dataloaders
from specnb.prep import PrepRecipe
from specnb.spectra import open_store, save_store, validate_latents

RECIPE = PrepRecipe(wavelength_range=(5010., 5480.), mask_ranges=((5100., 5110.),))


@pytest.fixture(scope="module")
def bundle(survey, tmp_path_factory):
    dls = spectrum_dataloaders(survey, RECIPE, bs=32)
    learn = spectrum_learner(dls, "tiny")
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3)
    data = dls.train.dataset
    return load_bundle(save_bundle(tmp_path_factory.mktemp("bundle"), learn.model, wavelength=data.wavelength, recipe=data.recipe))


def test_latents_satisfy_the_contract_and_carry_everything(bundle, survey):
    latents = encode(bundle, survey, progress=False)
    validate_latents(latents)
    assert dict(latents.sizes) == dict(spectrum=survey.sizes["spectrum"], latent=6)
    assert list(latents.spectrum_id.values) == list(survey.spectrum_id.values) and latents.attrs["bundle"] == bundle.fingerprint
    assert set(survey.spec.factors) <= set(latents.coords) and latents.teff.attrs["role"] == "factor"
    assert (latents.sigma > 0).all() and np.isfinite(latents["mean"]).all()


def test_codes_equal_the_network_row_by_row(bundle, survey):
    latents = encode(bundle, survey, bs=7, progress=False)
    flux, ivar = ready_rows(survey, RECIPE)
    with torch.no_grad():
        for i in (0, 6, 7, 100, 239):
            f, w = torch.from_numpy(flux[i:i + 1]), torch.from_numpy(ivar[i:i + 1])
            mean, logvar = bundle.model.encode(f, w)
            made = bundle.model.decode(mean)
            chi2 = (w*(f - made)**2).sum()/(w > 0).sum()
            np.testing.assert_allclose(latents["mean"][i], mean[0], atol=2e-5)
            np.testing.assert_allclose(latents.sigma[i], (0.5*logvar[0]).exp(), rtol=1e-4)
            assert float(latents.chi2[i]) == pytest.approx(float(chi2), rel=1e-3)


@pytest.mark.parametrize("chunk_rows, bs", [(1, 16), (16, 5), (50, 64), (1000, 1000)])
def test_storage_and_batch_do_not_matter(bundle, survey, tmp_path, chunk_rows, bs):
    part = survey.isel(spectrum=slice(0, 60))
    store = open_store(save_store(part, tmp_path/"s.zarr", chunk_rows=chunk_rows))
    a, b = encode(bundle, store, bs=bs, progress=False), encode(bundle, part, progress=False)
    np.testing.assert_allclose(a["mean"], b["mean"], atol=2e-5)
    np.testing.assert_allclose(a.chi2, b.chi2, rtol=1e-3)
    assert list(a.spectrum_id.values) == list(b.spectrum_id.values)


def test_latents_survive_a_store(bundle, survey, tmp_path):
    latents = encode(bundle, survey, progress=False)
    again = open_store(save_store(latents, tmp_path/"latents.zarr"))
    np.testing.assert_array_equal(again["mean"].values, latents["mean"].values)
    assert again.attrs["bundle"] == bundle.fingerprint


def test_spectra_without_a_measurement_are_said_to_have_no_fit(bundle, survey):
    part = survey.isel(spectrum=slice(0, 4)).copy(deep=True)
    part.ivar[2] = 0
    part.flux[3, 10:20], part.ivar[3, 10:20] = np.nan, 0
    latents = encode(bundle, part, progress=False)
    assert np.isnan(latents.chi2[2]) and np.isfinite(latents.chi2[[0, 1, 3]]).all() and np.isfinite(latents["mean"]).all()


def test_foreign_grids_are_refused(bundle, survey):
    with pytest.raises(ValueError, match="pixels after preparation"): encode(bundle, survey.isel(wavelength=slice(0, 300)), progress=False)
    shifted = survey.assign_coords(wavelength=survey.wavelength + 0.3)
    with pytest.raises(ValueError, match="differs from the network's"): encode(bundle, shifted, progress=False)
    vacuum = survey.copy()
    vacuum.wavelength.attrs["medium"] = "vacuum"
    with pytest.raises(ValueError, match="medium 'vacuum'"): encode(bundle, vacuum, progress=False)
    check_grid(bundle, __import__("specnb.prep", fromlist=["prepare"]).prepare(survey, RECIPE).wavelength)


def test_decoder_equals_the_network_in_any_number(bundle):
    decode, rng = decoder(bundle, bs=3), np.random.default_rng(0)
    z = rng.normal(size=(10, 6))
    with torch.no_grad(): expected = bundle.model.decode(torch.from_numpy(z.astype(np.float32))).numpy()
    made = decode(z)
    assert made.dtype == np.float32 and made.shape == (10, len(bundle.wavelength))
    np.testing.assert_allclose(made, expected, atol=1e-5)
    np.testing.assert_allclose(decode(z[4]), expected[4:5], atol=1e-5)
    np.testing.assert_allclose(decode(z.tolist()), expected, atol=1e-5)
    assert decode(np.zeros((0, 6))).shape == (0, len(bundle.wavelength))


@pytest.mark.parametrize("z, message", [(np.zeros((2, 7)), "codes of 6 nodes"), (np.zeros((1, 2, 6)), "codes of 6 nodes"), (np.full((1, 6), np.inf), "not finite")])
def test_decoder_refuses_what_it_cannot_mean(bundle, z, message):
    with pytest.raises(ValueError, match=message): decoder(bundle)(z)


def test_encode_rows_leaves_its_input_alone(bundle, survey):
    flux, ivar = ready_rows(survey.isel(spectrum=slice(0, 3)), RECIPE)
    before = flux.copy(), ivar.copy()
    encode_rows(bundle.model, flux, ivar)
    assert np.array_equal(flux, before[0]) and np.array_equal(ivar, before[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_gpu_gives_the_same_codes(bundle, survey):
    cpu = encode(bundle, survey, progress=False)
    gpu = encode(replace(bundle, model=bundle.model), survey, device="cuda", progress=False)
    bundle.model.cpu()
    np.testing.assert_allclose(cpu["mean"], gpu["mean"], atol=1e-3)
