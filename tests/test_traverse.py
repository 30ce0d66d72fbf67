"""Traversals, responses, the Doppler score and the line test, against decoders whose derivative, shift and lines are known in closed form."""
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.ndimage import gaussian_filter1d
from scipy.stats import kstest

from specnb import traverse as T
from specnb.spectra import make_latents
from specnb.wave import SPEED_OF_LIGHT, doppler_factor, log_grid

WAVELENGTH = log_grid(5000, 5100, 4000)
CENTRES = np.sort(np.random.default_rng(5).uniform(5003, 5097, 60))
WIDTH = 6.0                                                                   # of the lines [km/s]


def absorption(velocity, depth=0.5, centres=CENTRES, width=WIDTH):
    "Gaussian lines in velocity, exactly shifted: analytic at every velocity."
    offset = SPEED_OF_LIGHT * (np.log(WAVELENGTH)[:, None] - np.log(centres) - np.log(doppler_factor(velocity)))
    return 1 - (depth * np.exp(-0.5 * (offset / width)**2)).sum(1)


def decode(z):
    "Node 0: 7.5 km/s a unit; node 1: depth of all lines; node 2: a tilt; node 3: nothing."
    tilt = np.linspace(-1, 1, len(WAVELENGTH))
    return np.stack([absorption(7.5 * c[0], 0.5 + 0.1 * c[1]) + 0.05 * c[2] * tilt for c in np.asarray(z)])


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-11), (np.float32, 2e-5)])
def test_response_of_a_linear_decoder_is_its_column(dtype, tolerance):
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(5, 200))
    def linear(z): return (1 + z @ columns).astype(dtype)
    z = rng.normal(size=(20, 5))
    for node in range(5):
        np.testing.assert_allclose(T.response(linear, z[node], node), columns[node], atol=tolerance)
    every = T.responses(linear, z, 3)
    np.testing.assert_allclose(every, columns * z.std(0)[:, None], atol=tolerance)


def test_response_beats_the_plain_difference_and_says_how_far_it_moved():
    def curved(z): return np.sin(3 * z)
    for step in (0.05, 0.1, 0.2):
        out = T.response(curved, np.zeros(3), 1, step)
        plain = np.sin(3 * step) / step
        assert abs(float(out[1]) - 3) < 0.1 * abs(plain - 3)
        assert out.attrs["error"] == pytest.approx(abs(plain - 3) / 3, rel=0.1)


def test_traverse_moves_one_node_and_only_that():
    z = np.array([0.3, -1, 0.5, 2])
    out = T.traverse(decode, z, 1, [-1, 0, 1], WAVELENGTH)
    for value, flux in zip(out["value"].values, out.values):
        np.testing.assert_array_equal(flux, decode([[0.3, value, 0.5, 2]])[0])
    assert out.dims == ("value", "wavelength") and out.attrs["node"] == 1 and out.wavelength.attrs["units"] == "Angstrom"
    assert T.traverse(decode, z, 3, [-5, 5], WAVELENGTH).std("value").max() == 0


def test_wavelength_and_node_names_come_from_where_they_are_known():
    class Decoder:
        wavelength = xr.DataArray(WAVELENGTH, dims="wavelength", attrs=dict(units="Angstrom", medium="air", frame="barycentric"))
        def __call__(self, z): return decode(z)
    z = xr.DataArray([0.1, 0, 0, 0], dims="latent", coords={"latent": ["velocity", "depth", "tilt", "dead"]})
    out = T.response(Decoder(), z, "velocity")
    assert out.wavelength.attrs["medium"] == "air" and out.attrs["node"] == "velocity"
    with pytest.raises(ValueError, match="no node 0"): T.response(Decoder(), z, 0)


def test_traversal_walks_between_quantiles_around_a_real_spectrum():
    rng = np.random.default_rng(1)
    latents = make_latents(rng.normal(size=(500, 4)), np.full((500, 4), 0.1), spectrum_id=[f"s{i}" for i in range(500)])
    out = T.traversal(decode, latents, "s7", 2, 5, (0.1, 0.9), WAVELENGTH)
    np.testing.assert_allclose(out["value"], np.quantile(latents["mean"].values[:, 2], np.linspace(0.1, 0.9, 5)))
    middle = latents["mean"].values[7].astype(float); middle[2] = out["value"].values[2]
    np.testing.assert_allclose(out[2], decode(middle[None])[0])
    scales = T.node_scales(latents)
    np.testing.assert_allclose(scales.posterior_sigma, 0.1, rtol=1e-6)


def test_a_doppler_node_is_found_and_calibrated_to_a_thousandth():
    z = np.random.default_rng(2).normal(size=(4, 4))
    out = T.doppler_score(decode, z, wavelength=WAVELENGTH, step=0.05)
    assert float(out.correlation[0]) > 0.9999
    assert float(out.velocity_per_unit[0]) == pytest.approx(7.5, rel=2e-3)
    assert (np.abs(out.correlation.values[1:]) < 0.05).all()


def test_the_sign_is_that_of_recession():
    out = T.doppler_score(lambda z: decode(-np.asarray(z)), np.zeros(4), [0], WAVELENGTH)
    assert float(out.correlation[0]) < -0.999 and float(out.velocity_per_unit[0]) == pytest.approx(-7.5, rel=5e-3)


def test_bad_pixels_can_be_left_out():
    def spoiled(z):
        flux = decode(z); flux[:, :500] = 50 * np.asarray(z)[:, :1]
        return flux
    good = np.arange(len(WAVELENGTH)) >= 520
    assert abs(float(T.doppler_score(spoiled, np.zeros(4), [0], WAVELENGTH).correlation[0])) < 0.2
    assert float(T.doppler_score(spoiled, np.zeros(4), [0], WAVELENGTH, good=good).velocity_per_unit[0]) == pytest.approx(7.5, rel=5e-3)


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_shift_test_measures_the_velocity_of_far_moves(start):
    offsets = np.array([-4, -1, 0.5, 3])
    out = T.shift_test(decode, [start, 0, 0, 0], 0, offsets, WAVELENGTH, max_velocity=60)
    np.testing.assert_allclose(out.velocity, 7.5 * offsets, atol=0.02)
    assert out.explained.min() > 0.9999 and out.attrs["velocity_per_unit"] == pytest.approx(7.5, abs=0.005)
    still = T.shift_test(decode, [start, 0, 0, 0], 1, offsets, WAVELENGTH, max_velocity=60)
    assert still.explained.max() < 0.05 and np.abs(still.velocity).max() < 0.1
    dead = T.shift_test(decode, [start, 0, 0, 0], 3, offsets, WAVELENGTH, max_velocity=60)
    assert (dead.velocity == 0).all() and dead.explained.isnull().all()


def test_shift_spectrum_and_template_are_exact_on_analytic_lines():
    inner = slice(50, -50)
    shifted = T.shift_spectrum(WAVELENGTH, absorption(0), 20.0)
    np.testing.assert_allclose(shifted[inner], absorption(20.0)[inner], atol=2e-4)
    template = T.doppler_template(WAVELENGTH, absorption(0))
    np.testing.assert_allclose(template[inner], ((absorption(0.01) - absorption(-0.01)) / 0.02)[inner], atol=1e-4)
    np.testing.assert_allclose(T.doppler_template(WAVELENGTH, np.stack([absorption(0), 2 * absorption(0)]))[1], 2 * template)


def as_response(values, medium="air"): return xr.DataArray(values, dims="wavelength", coords={"wavelength": ("wavelength", WAVELENGTH, dict(units="Angstrom", medium=medium))})


def line_list(rng, n=20, species="ABCDE"):
    return pd.concat([pd.DataFrame(dict(species=s, wavelength=rng.uniform(5001, 5099, n))) for s in species], ignore_index=True)


def test_planted_species_is_named_and_others_are_not():
    rng = np.random.default_rng(3)
    lines = line_list(rng)
    planted = lines.wavelength[lines.species == "C"].to_numpy()
    noise = gaussian_filter1d(rng.normal(size=len(WAVELENGTH)), 3) * 0.3
    out = T.identify_lines(as_response(absorption(0, 0.2, planted) - 1 + noise), lines)
    assert out.index[0] == "C" and out.p_family["C"] == 0.001 and out.mean_response["C"] < -0.1
    assert (out.p_family.drop("C") > 0.05).all()
    moving = T.identify_lines(as_response(absorption(40.0, 0.2, planted) - 1 + noise), lines)
    assert moving.p_family["C"] > 0.05                                          # the star moves at 40 km/s, the list does not ...
    assert T.identify_lines(as_response(absorption(40.0, 0.2, planted) - 1 + noise), lines, velocity=40.0).p_family["C"] == 0.001


def test_p_values_are_uniform_where_nothing_is_to_be_found():
    lines = line_list(np.random.default_rng(4))
    envelope, p, family = np.exp(np.linspace(1, -1, len(WAVELENGTH))), [], []
    for seed in range(200):
        nothing = gaussian_filter1d(np.random.default_rng(1000 + seed).normal(size=len(WAVELENGTH)) * envelope, 3)
        out = T.identify_lines(as_response(nothing), lines, n_permutations=199, seed=seed)
        p.append(out.p.sort_index().to_numpy()); family.append(out.p_family.min())
    p = np.array(p)
    assert kstest(p[:, 0], "uniform").pvalue > 0.01 and kstest(p[:, 3], "uniform").pvalue > 0.01
    assert 0.03 < (p < 0.05).mean() < 0.07
    assert np.mean(np.array(family) < 0.05) < 0.1


def test_a_dead_response_finds_nothing():
    out = T.identify_lines(as_response(np.zeros(len(WAVELENGTH))), line_list(np.random.default_rng(6)))
    assert (out.p == 1).all() and (out.ratio == 1).all()


def test_few_lines_are_flagged_not_hidden():
    out = T.identify_lines(as_response(absorption(0) - 1), pd.DataFrame(dict(species=["X"], wavelength=[5050.0])))
    assert out.flag["X"] == "fewer than 3 lines" and np.isfinite(out.p["X"])


def test_any_column_may_group_the_lines():
    lines = line_list(np.random.default_rng(7)).assign(excitation=lambda t: np.arange(len(t)) % 5)
    assert set(T.identify_lines(as_response(absorption(0) - 1), lines.assign(level=np.where(lines.excitation < 2, "low", "high")), by="level").index) == {"low", "high"}


def test_excitation_trend_is_found_when_planted_only():
    rng = np.random.default_rng(8)
    lines = pd.DataFrame(dict(species="Fe I", wavelength=np.linspace(5003, 5097, 40), excitation=rng.uniform(0, 5, 40)))
    centres, flux = lines.wavelength.to_numpy(), absorption(0, 0.4, np.linspace(5003, 5097, 40))
    for slope, low, high in ((-0.05, -1, -0.9), (0.0, -0.5, 0.5)):
        relative = 0.3 + slope * lines.excitation.to_numpy() + 0.01 * rng.normal(size=40)
        table = T.line_responses(as_response(1 - absorption(0, 0.4 * relative, centres)), flux, lines)
        trend = T.excitation_trend(table)
        assert low <= trend.spearman["Fe I"] <= high and (trend.p["Fe I"] < 0.01) == (slope != 0)


@pytest.mark.parametrize("call, message", [
    (lambda: T.traverse(decode, np.zeros((2, 4)), 0, [0.0]), "pick one spectrum"),
    (lambda: T.traverse(decode, [0, np.nan, 0, 0], 0, [0.0]), "NaN"),
    (lambda: T.traverse(decode, np.zeros(4), 4, [0.0]), "no node 4"),
    (lambda: T.traverse(lambda z: z[0], np.zeros(4), 0, [0.0, 1.0]), "must return"),
    (lambda: T.traverse(decode, np.zeros(4), 0, [0.0], WAVELENGTH[1:]), "3999 pixels"),
    (lambda: T.response(decode, np.zeros(4), 0, scale=-1.0), "must be positive"),
    (lambda: T.responses(decode, np.zeros((5, 4)), 9), "no spectrum 9"),
    (lambda: T.responses(decode, np.zeros((5, 4)), 0, per="sigma"), "use 'data'"),
    (lambda: T.traversal(decode, np.zeros((5, 4)), "s1", 0), "no spectrum_id 's1'"),
    (lambda: T.doppler_score(decode, np.zeros(4)), "pass wavelength="),
    (lambda: T.doppler_score(decode, np.zeros(4), wavelength=WAVELENGTH, good=np.ones(3)), "good has 3"),
    (lambda: T.shift_test(decode, np.zeros(4), 0, [1.0], WAVELENGTH, max_velocity=4000), "lower max_velocity"),
    (lambda: T.identify_lines(as_response(WAVELENGTH), pd.DataFrame(dict(wavelength=[5050.0]))), "no column"),
    (lambda: T.identify_lines(as_response(WAVELENGTH), pd.DataFrame(dict(wavelength=[6050.0], species="A"))), "no line of the list"),
    (lambda: T.identify_lines(as_response(WAVELENGTH), line_list(np.random.default_rng(0)), max_offset=5.0), "raise it"),
])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_air_is_not_compared_with_vacuum():
    lines = line_list(np.random.default_rng(9)); lines.attrs["medium"] = "vacuum"
    with pytest.raises(ValueError, match="convert with specnb.wave"): T.identify_lines(as_response(absorption(0)), lines)


def test_iron_of_a_real_star_is_found_at_its_velocity(shared_data):
    "The depth of a real HARPS spectrum as the response: the published Fe I list fits at one velocity, and not at others."
    from specnb.fits import read_spectrum
    table = pd.read_csv(shared_data / "reference" / "linelist_sousa_fe_ewsun.lst", sep=r"\s+", skiprows=[1])
    lines = pd.DataFrame(dict(wavelength=table["WL"], species=table["ele"], excitation=table["E.P."])); lines.attrs["medium"] = "air"
    path = sorted((shared_data / "harps_full").glob("*HD128621*s1d*")) or sorted((shared_data / "harps_full").glob("*s1d*"))
    spectrum = read_spectrum(path[0]).isel(spectrum=0).sel(wavelength=slice(5400, 6200))
    flux = spectrum.flux.astype(float)
    depth = (flux.rolling(wavelength=2001, center=True, min_periods=1).max() - flux) / float(flux.median())
    out = {v: T.identify_lines(depth, lines, velocity=v, width=4.0) for v in np.arange(-60, 61, 4.0)}
    best = max(out, key=lambda v: out[v].z["FeI"])
    assert out[best].p_family["FeI"] <= 0.01 and out[best].ratio["FeI"] > 1.5
    assert out[best].z["FeI"] > 2 * np.median([t.z["FeI"] for v, t in out.items() if abs(v - best) > 20])


def test_first_components_of_real_exposures_are_the_air_above_the_telescope(shared_data):
    "HD128621 around 6290 Angstrom, one star, many nights: what varies first are the oxygen lines, at the velocity of the Earth."
    from scipy.signal import find_peaks
    from specnb.fits import read_spectrum
    labels = pd.read_csv(shared_data / "labels" / "harps_timeseries_labels.csv")
    labels = labels[labels.object == "HD128621"].sort_values("mjd_obs").iloc[::2].reset_index(drop=True)
    spectra = [read_spectrum(shared_data / name) for name in labels.file]
    grid = spectra[0].wavelength.values
    flux = np.stack([np.interp(grid, s.wavelength.values, s.flux.values[0].astype(float)) for s in spectra])
    flux /= np.median(flux, axis=1, keepdims=True)
    mean = flux.mean(0)
    u, s, components = np.linalg.svd(flux - mean, full_matrices=False)
    z = (u * s)[:, :4]
    air = np.load(shared_data / "reference" / "telluric_transmission_5000_6950.npz")
    dips = find_peaks(1 - air["transmission"], height=0.03, distance=5)[0]
    lines = pd.DataFrame(dict(species="telluric", wavelength=air["wave_air_A"][dips].astype(float))); lines.attrs["medium"] = "air"
    typical = int(np.argsort(labels.berv)[len(labels) // 2])
    place = xr.DataArray(grid, dims="wavelength", attrs=dict(units="Angstrom", medium="air"))
    first = T.response(lambda codes: mean + codes @ components[:4], z[typical], 0, wavelength=place)
    berv = float(labels.berv[typical])
    assert T.identify_lines(first, lines, velocity=berv, width=3.0).p_family["telluric"] <= 0.01
    assert T.identify_lines(first, lines, velocity=berv + 150, width=3.0).p_family["telluric"] > 0.05
