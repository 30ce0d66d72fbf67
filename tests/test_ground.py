"""Storey 0 under inputs that a page does not show: hypothesis for the grids, faults for stores, physics for the simulator."""
import shutil
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specnb.prep import PrepRecipe, prepare, split_by_object
from specnb.simulate import FACTORS, sample_survey, simulate
from specnb.spectra import ContractError, estimate_ivar, fingerprint, make_spectra, open_store, save_store, validate
from specnb.wave import (SPEED_OF_LIGHT, air_to_vacuum, broaden, doppler_factor, doppler_shift, linear_grid, log_grid, pixel_edges, resample,
                         vacuum_to_air)

velocities = st.floats(-1e4, 1e4)


@given(velocities, velocities)
def test_doppler_factors_compose_relativistically(a, b):
    together = (a + b) / (1 + a * b / SPEED_OF_LIGHT**2)
    assert doppler_factor(a) * doppler_factor(b) == pytest.approx(doppler_factor(together), rel=1e-12)


@given(st.floats(2000, 30000), velocities)
def test_doppler_shift_is_inverted_by_the_opposite_velocity(wavelength, velocity):
    assert doppler_shift(doppler_shift(wavelength, velocity), -velocity) == pytest.approx(wavelength, rel=1e-13)


@given(st.floats(2500, 30000))
def test_air_to_vacuum_inverts_vacuum_to_air(wavelength):
    assert air_to_vacuum(vacuum_to_air(wavelength)) == pytest.approx(wavelength, rel=1e-12)


@st.composite
def two_grids(draw):
    make = lambda n: np.cumsum(np.array(draw(st.lists(st.floats(0.05, 2), min_size=n, max_size=n))))
    return 5000 + make(draw(st.integers(5, 40))), 5000 + draw(st.floats(-5, 5)) + make(draw(st.integers(4, 30)))


@settings(max_examples=150, deadline=None)
@given(two_grids(), st.integers(0, 2**31))
def test_resampling_equals_brute_force(grids, seed):
    old, new = grids
    rng = np.random.default_rng(seed)
    flux, ivar = rng.normal(size=len(old)), rng.choice([0, 1, 4.], len(old))
    got, got_ivar = resample(old, flux, ivar, new)
    a, b = pixel_edges(old), pixel_edges(new)
    for j in range(len(new)):
        overlap = np.clip(np.minimum(a[1:], b[j + 1]) - np.maximum(a[:-1], b[j]), 0, None) * (ivar > 0)
        total = overlap.sum()
        if abs(total / (b[j + 1] - b[j]) - 0.5) < 1e-6: continue  # on the border of the coverage rule
        if total > 0.5 * (b[j + 1] - b[j]):
            assert got[j] == pytest.approx((overlap * flux).sum() / total, abs=1e-6)
            used = overlap > 0
            assert got_ivar[j] == pytest.approx(total**2 / (overlap[used]**2 / ivar[used]).sum(), rel=1e-5)
        else:
            assert got_ivar[j] == 0 and got[j] == 0


def test_resampling_many_rows_equals_one_at_a_time(rng):
    old, new = linear_grid(5000, 5100, 0.1), log_grid(5002, 5090, 300)
    flux, ivar = rng.normal(size=(3, 2, len(old))), rng.uniform(0, 1, (3, 2, len(old)))
    together = resample(old, flux, ivar, new)
    for i in range(3):
        for j in range(2):
            alone = resample(old, flux[i, j], ivar[i, j], new)
            np.testing.assert_array_equal(together[0][i, j], alone[0])
            np.testing.assert_array_equal(together[1][i, j], alone[1])


def test_broadening_on_any_grid_agrees_with_the_logarithmic_one():
    linear, log = linear_grid(5000, 5050, 0.02), log_grid(5000, 5050, 2500)
    line = lambda w: 1 - 0.7 * np.exp(-0.5 * ((w - 5025) / 0.1)**2)
    a, b = broaden(linear, line(linear), 20_000), broaden(log, line(log), 20_000)
    assert np.abs(np.interp(linear[100:-100], log, b) - a[100:-100]).max() < 2e-3


@pytest.mark.parametrize("fraction", [0, 0.5, 0.99])
def test_estimated_noise_survives_missing_pixels(rng, fraction):
    flux = 10 + rng.normal(0, 0.5, 20_000)
    start = int(rng.integers(0, 100))
    flux[start:start + int(fraction * 19_000)] = 0
    ivar = estimate_ivar(flux)
    assert (ivar[flux == 0] == 0).all()
    assert np.median(ivar[ivar > 0]) == pytest.approx(4, rel=0.15)


# ------------------------------------------------------------------ stores
def test_a_killed_write_leaves_the_old_store(tmp_path, survey, monkeypatch):
    store = save_store(survey, tmp_path / "a.zarr")
    before = fingerprint(open_store(store))
    monkeypatch.setattr(xr.Dataset, "to_zarr", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): save_store(survey.isel(spectrum=slice(3)), store, overwrite=True)
    assert fingerprint(open_store(store)) == before


def test_store_opens_with_plain_xarray(tmp_path, survey):
    store = save_store(survey, tmp_path / "a folder with spaces" / "s.zarr", chunk_rows=50)
    plain = xr.open_zarr(store, consolidated=False)
    np.testing.assert_array_equal(plain.flux.values, survey.flux.values)
    assert plain.flux.chunks[0][0] == 50
    assert plain.teff.attrs == survey.teff.attrs


def test_many_small_appends_equal_one_write(tmp_path, survey):
    store = tmp_path / "s.zarr"
    for start in range(0, 60, 7):
        save_store(survey.isel(spectrum=slice(start, min(start + 7, 60))), store, append=True, chunk_rows=16)
    xr.testing.assert_identical(open_store(store).compute(), survey.isel(spectrum=slice(60)))


def test_a_damaged_store_is_named(tmp_path, survey):
    store = save_store(survey.isel(spectrum=slice(4)), tmp_path / "s.zarr")
    (store / "zarr.json").write_text("{")
    with pytest.raises(ContractError, match="s.zarr"): open_store(store)
    shutil.rmtree(store)
    with pytest.raises(FileNotFoundError, match="s.zarr"): open_store(store)


def test_append_refuses_a_column_the_store_does_not_have(tmp_path, survey):
    store = save_store(survey.isel(spectrum=slice(4)), tmp_path / "s.zarr")
    new = survey.isel(spectrum=slice(4, 8)).assign_coords(colour=("spectrum", np.arange(4.)))
    with pytest.raises(ContractError, match="no column colour"): save_store(new, store, append=True)
    assert open_store(store).sizes["spectrum"] == 4


def test_nan_everywhere_becomes_unusable_not_an_error():
    ds = make_spectra(np.full((1, 10), np.nan), None, np.arange(10.) + 5000, "x", medium="air", frame="rest")
    assert float(ds.ivar.sum()) == 0 and np.isfinite(ds.flux.values).all()
    assert float(prepare(ds).ivar.sum()) == 0


@pytest.mark.parametrize("change, words", [
    (lambda d: d.drop_vars("spectrum_id"), "spectrum_id is missing"),
    (lambda d: d.assign_coords(spectrum_id=("spectrum", ["same"] * d.sizes["spectrum"])), "not unique"),
    (lambda d: d.assign_coords(wavelength=("wavelength", np.r_[np.nan, d.wavelength.values[1:]], d.wavelength.attrs)), "NaN"),
    (lambda d: d.assign_coords(wavelength=d.wavelength.astype("float32").assign_attrs(d.wavelength.attrs)), "float64"),
    (lambda d: d.rename(spectrum="row"), "transpose"),
])
def test_contract_violations_are_named(survey, change, words):
    with pytest.raises(ContractError, match=words): validate(change(survey))


# -------------------------------------------------------------- simulator
def test_a_spectrum_does_not_depend_on_its_company():
    grid = log_grid(5000, 5200, 400)
    factors = {n: np.linspace(0.9, 1.1, 70) * v if v else np.zeros(70) for n, (v, _) in FACTORS.items()}
    factors["airmass"] = np.linspace(1, 2, 70)
    all_rows, few = simulate(factors, grid, seed=4), simulate({n: v[:9] for n, v in factors.items()}, grid, seed=4, n_threads=1)
    np.testing.assert_allclose(all_rows.flux.values[:9], few.flux.values, rtol=3e-6)  # the same draw; sums of float32 in another order


def test_telluric_lines_keep_still_in_the_observatory_and_stellar_ones_in_the_barycentre():
    grid = log_grid(6275, 6330, 3000)
    make = lambda frame: simulate(dict(berv=[-25., 25.], water=[0., 0.], airmass=[2., 2.], vsini=[250., 250.]), grid, frame=frame, noise=False)
    lag = lambda f: (np.argmax([np.corrcoef(np.roll(f[0], k)[200:-200], f[1][200:-200])[0, 1] for k in range(-80, 81)]) - 80) * (np.log(grid[1] / grid[0]) * SPEED_OF_LIGHT)
    barycentric, topocentric = (make(f).spec.normalise().flux.values for f in ("barycentric", "topocentric"))
    assert lag(barycentric) == pytest.approx(50, abs=1) and lag(topocentric) == pytest.approx(0, abs=1)


def test_velocity_read_by_cross_correlation_is_the_planted_one():
    grid = linear_grid(5160, 5260, 0.02)
    planted = np.array([0., -40., 12.5, 33.])
    flux = simulate(dict(radial_velocity=planted), grid, noise=False, gap=None).spec.normalise().flux.values
    trial = np.arange(-60, 60, 0.25)
    read = [trial[np.argmax([np.corrcoef(np.interp(grid[200:-200], grid * doppler_factor(v), flux[0]), f[200:-200])[0, 1] for v in trial])] for f in flux]
    np.testing.assert_allclose(read, planted, atol=0.3)


def test_survey_repeats_by_seed_and_factors_are_independent():
    grid = log_grid(5000, 5050, 64)
    a, b, c = (sample_survey(500, seed=s, wavelength=grid, random_labels=2) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.flux.values, b.flux.values)
    assert (a.teff.values != c.teff.values).all()
    table = np.corrcoef(np.stack([a[n].values for n in [*FACTORS, "random_1", "random_2"]]))
    assert np.abs(table - np.eye(len(table))).max() < 5 / np.sqrt(500)


def test_the_sun_looks_like_the_sun(shared_data):
    "Mg b region against HARPS light reflected by Ganymede: the strong lines agree in place and depth."
    from astropy.io import fits
    with fits.open(shared_data / "stars_5160_5360" / "Sun-Ganymede_HARPS_iraf.fits") as f:
        header, real = f[0].header, f[0].data.astype(float)
    wave = header["CRVAL1"] + header["CDELT1"] * np.arange(len(real))
    grid = linear_grid(5164, 5187, 0.02)
    model = simulate({}, grid, noise=False, gap=None).flux.values[0]
    model, real = (broaden(grid, f / np.percentile(f, 95), 3000) for f in (model, np.interp(grid, wave, real)))
    assert np.corrcoef(model[50:-50], real[50:-50])[0, 1] > 0.8


# ------------------------------------------------------------ preparation
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5), st.floats(0.01, 0.45), st.floats(0.01, 0.45))
def test_split_keeps_objects_whole(survey, seed, valid, test):
    split = split_by_object(survey, valid, test, seed)
    assert split.to_series().groupby(survey.object.values).nunique().max() == 1
    assert set(np.unique(split)) <= {"train", "valid", "test"}


def test_split_shares_are_those_asked_for():
    ids = [f"s{i}" for i in range(20_000)]
    ds = make_spectra(np.ones((20_000, 2)), np.ones((20_000, 2)), [1., 2.], ids, medium="air", frame="rest", coords={"object": ids})
    share = split_by_object(ds, 0.1, 0.2).to_series().value_counts(normalize=True)
    assert share["valid"] == pytest.approx(0.1, abs=0.01) and share["test"] == pytest.approx(0.2, abs=0.01)


def test_lazy_and_eager_preparation_agree(survey):
    recipe = PrepRecipe(wavelength_range=(5050, 5450), mask_ranges=((5100, 5110),), min_median=100, pad_to=600)
    lazy, eager = prepare(survey.chunk(spectrum=7, wavelength=100), recipe), prepare(survey, recipe)
    xr.testing.assert_allclose(lazy.compute(), eager)


@pytest.mark.parametrize("name, mended", [("log g", "log_g"), ("[Fe/H]", "Fe_H"), ("a\tb", "a_b")])
def test_a_name_that_a_store_would_lose_is_refused(tmp_path, name, mended):
    from specnb.spectra import make_latents
    ds = make_spectra(np.ones((2, 9)), np.ones((2, 9)), np.linspace(5000, 5001, 9), ["a", "b"], medium="air", frame="rest").assign_coords({name: ("spectrum", [1.0, 2.0])})
    for bad, path in ((ds, tmp_path / "s.zarr"), (make_latents(np.ones((2, 2)), spectrum_id=["a", "b"]).assign_coords({name: ("spectrum", [1.0, 2.0])}), tmp_path / "l.zarr")):
        with pytest.raises(ContractError) as caught: save_store(bad, path)
        assert repr(name) in str(caught.value) and f"rename({{{name!r}: {mended!r}}})" in str(caught.value) and not path.exists()
        save_store(bad.rename({name: mended}), path)
        assert np.array_equal(open_store(path)[mended], [1.0, 2.0])
