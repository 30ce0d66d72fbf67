"""The simulator: hidden causes, populations, catalogues and abundances as promised; its physics against formulas, and against real spectra where they lie beside the checkout."""
import re
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import voigt_profile
from scipy.stats import spearmanr
import specnb.lines
import specnb.observe
from specnb.simulate import (EXTRA_FACTORS, FACTORS, HIDDEN, LABEL_ERRORS, line_opacity, named_lines, reported, rotation_transform, sample_factors, sample_survey,
                             simulate, telluric_transmission)
from specnb.spectra import open_store, save_store, validate
from specnb.wave import SPEED_OF_LIGHT, broaden, doppler_factor, linear_grid, log_grid

BLUE, MG = log_grid(3900, 4000, 400), linear_grid(5160, 5190, 0.02)


def clean(grid, **factors):
    "One noiseless spectrum without the gap, as row 0, so that the unrecorded slope is the same in all of them."
    abundances = factors.pop("abundances", None)
    return simulate(factors, grid, abundances=abundances, noise=False, gap=None).spec.normalise().flux.values[0].astype(float)


# ------------------------------------------------------- the default survey
def test_default_population_is_the_one_that_recipes_were_tuned_on():
    table = sample_factors(3, exposures=2, seed=7)
    rng = np.random.default_rng([7, 1])
    expected = dict(radial_velocity=rng.normal(0, 35, 3), teff=rng.uniform(4200, 6800, 3), logg=rng.uniform(2, 5, 3), metallicity=rng.uniform(-1, 0.4, 3),
                    vsini=np.exp(rng.uniform(np.log(1), np.log(30), 3)))
    for name, values in expected.items(): np.testing.assert_array_equal(table[name].values, values.repeat(2))
    assert set(table) == {*FACTORS, "berv", "object", "mjd_obs", "spectrum_id"}


@pytest.mark.parametrize("options", [dict(hidden=("activity", "epoch", "companion")), dict(hidden="epoch")])
def test_hidden_causes_leave_every_other_draw_alone(options):
    plain, more = sample_factors(50, 3, 4), sample_factors(50, 3, 4, **options)
    pd.testing.assert_frame_equal(plain, more[plain.columns])
    alone, together = sample_factors(50, 3, 4, hidden="companion"), sample_factors(50, 3, 4, hidden=("activity", "companion"))
    pd.testing.assert_frame_equal(alone, together[alone.columns])


def test_default_survey_carries_nothing_that_was_not_asked_for():
    ds = sample_survey(3, seed=1, wavelength=BLUE)
    assert set(ds.spec.factors) == set(FACTORS) and not ds.spec.labels
    assert not any("hidden" in c.attrs for c in ds.coords.values())


# ------------------------------------------------------------ hidden causes
def test_hidden_truths_travel_and_are_told_apart(tmp_path):
    ds = sample_survey(12, exposures=2, seed=3, wavelength=BLUE, hidden=tuple(HIDDEN), labels="teff", random_labels=1)
    back = open_store(save_store(ds, tmp_path / "s.zarr"))
    truths = {n for names in HIDDEN.values() for n in names}
    for one in (ds, back):
        assert {n for n, c in one.coords.items() if c.attrs.get("hidden")} == truths <= set(one.spec.factors)
        assert truths.isdisjoint(reported(one)) and {"label_teff", "random_1", *FACTORS} == set(reported(one))


def test_activity_can_be_found_at_44_km_per_second_a_pixel():
    ds = sample_survey(300, seed=5, hidden="activity").spec.normalise()
    flux = lambda centre, half: ds.flux.sel(wavelength=slice(centre - half, centre + half)).mean("wavelength").values
    shift = doppler_factor(ds.radial_velocity.values)
    core = np.array([float(f.interp(wavelength=3933.66 * s)) for f, s in zip(ds.flux, shift)])
    index = core / (flux(3901, 8) + flux(4001, 8))
    assert spearmanr(index, ds.activity.values).statistic > 0.85
    assert (np.abs(spearmanr(np.column_stack([ds.activity.values, *[ds[n].values for n in FACTORS]])).statistic[0, 1:]) < 0.2).all()


def test_activity_belongs_to_the_star_with_a_scatter_from_night_to_night():
    table = sample_factors(400, 4, 2, hidden="activity")
    log = np.log(table.activity.values.reshape(400, 4))
    assert log.std(1, ddof=1).mean() == pytest.approx(0.15 * 0.921, rel=0.1)  # 0.921: mean of the sample deviation of four normals
    assert log.mean(1).std() > 0.9 and table.activity.between(0.02, 3).all()


def test_chromospheric_emission_is_wider_in_giants_and_stays_in_its_lines():
    grid = log_grid(3785, 6910, 60_000)
    ratio = {g: clean(grid, logg=g, activity=1.) - clean(grid, logg=g) for g in (4.4, 2.0)}
    width = {}
    for g, r in ratio.items():
        k = np.abs(grid - 3933.66) < 4
        width[g] = np.trapezoid(r[k], grid[k]) / r[k].max()
        lines = np.min(np.abs(grid[:, None] - np.array([3933.66, 3968.47, 6562.80])), 1) < 8
        assert np.abs(r[~lines]).max() < 2e-3
    assert width[2.0] / width[4.4] == pytest.approx(10**(0.15 * 2.4), rel=0.15)


def test_epoch_changes_the_response_on_one_day_and_no_line():
    table = sample_factors(500, 2, 1, hidden="epoch")
    assert set(table.epoch) == {0., 1.} and table[table.epoch == 0].mjd_obs.max() < table[table.epoch == 1].mjd_obs.min()
    assert table.epoch.mean() == pytest.approx(0.5, abs=0.05)
    grid = log_grid(4000, 6800, 20_000)
    ratio = clean(grid, epoch=1.) / clean(grid)
    assert np.abs(np.diff(ratio)).max() < 1e-3 and 0.02 < ratio.std() < 0.08


def test_a_companion_shows_a_second_velocity():
    grid = linear_grid(5380, 5480, 0.02)
    alone, double = clean(grid, teff=6000.), clean(grid, teff=6000., companion=0.3, companion_velocity=70.)
    second = clean(grid, teff=6000. * 0.3**(1 / 8), logg=4.6)
    trial = np.arange(20, 120, 1.)
    inner, left = slice(200, -200), (double - alone)[200:-200]
    score = [np.corrcoef(np.interp(grid[inner], grid * doppler_factor(v), second), left)[0, 1] for v in trial]
    assert trial[np.argmax(score)] == pytest.approx(70, abs=2)
    np.testing.assert_array_equal(clean(grid, companion=0., companion_velocity=50.), clean(grid))


def test_half_of_the_stars_have_companions_and_only_they_move():
    table = sample_factors(1000, 3, 9, hidden="companion")
    assert table.groupby("object").companion.nunique().max() == 1
    assert (table.companion > 0).mean() == pytest.approx(0.5, abs=0.06)
    assert (table.companion_velocity[table.companion == 0] == 0).all() and table.companion_velocity[table.companion > 0].std() > 20
    assert table.companion.max() <= 0.6


def test_a_row_does_not_depend_on_its_company_whatever_is_switched_on():
    table = sample_factors(70, 1, 6, population="solar_neighbourhood", hidden=tuple(HIDDEN))
    given_factors = {n: table[n].values for n in [*FACTORS, *EXTRA_FACTORS, "berv"]}
    together = simulate(given_factors, BLUE, seed=2)
    few = simulate({n: v[:5] for n, v in given_factors.items()}, BLUE, seed=2, n_threads=1)
    np.testing.assert_allclose(together.flux.values[:5], few.flux.values, rtol=5e-6, atol=1e-3)


@pytest.mark.parametrize("call, words", [
    (lambda: sample_factors(3, hidden="flares"), "unknown hidden cause flares; known are activity, epoch, companion"),
    (lambda: sample_factors(3, population="cluster"), "unknown population 'cluster'; known are independent, solar_neighbourhood"),
    (lambda: sample_survey(3, wavelength=BLUE, labels=("snr",)), "no catalogue reports snr"),
    (lambda: sample_survey(3, wavelength=BLUE, labels=("mass",)), "no catalogue reports mass"),
    (lambda: sample_survey(3, wavelength=BLUE, labels="teff", missing_labels=1.2), "no share between 0 and 1"),
    (lambda: simulate(dict(activity=[-1.]), BLUE), "activity = -1.0 lies outside 0..20"),
    (lambda: simulate(dict(epoch=[2.]), BLUE), "epoch = 2.0 lies outside"),
    (lambda: simulate(dict(companion=[np.nan]), BLUE), "companion = nan"),
    (lambda: simulate(dict(radial_velocity=[5000.]), BLUE), "radial_velocity = 5000.0 lies outside"),
    (lambda: simulate({}, BLUE, abundances={"Mg": 9.}), "abundance_Mg = 9.0 lies outside"),
    (lambda: simulate({}, BLUE, abundances={"H": 1.}), "no lines of 'H'"),
    (lambda: simulate(dict(mass=[1.]), BLUE), "unknown factor mass; known are .*activity"),
])
def test_faults_are_named(call, words):
    with pytest.raises(ValueError, match=words): call()


# --------------------------------------------------------------- population
@pytest.fixture(scope="module")
def near():
    return sample_factors(20_000, seed=8, population="solar_neighbourhood")


def test_neighbourhood_has_the_known_relations(near):
    dwarf = near.logg > 4
    mass_from_gravity = near.logg - 4.44 - np.log10(near.mass)  # = -2 log radius
    radius = 10**(-mass_from_gravity / 2)
    luminosity = radius**2 * (near.teff / 5777)**4
    slope = np.polyfit(np.log10(near.mass[dwarf]), np.log10(luminosity[dwarf]), 1)[0]
    assert 3.5 < slope < 5.5  # mass-luminosity relation of F, G and K dwarfs
    clump = (near.logg - 2.45).abs() < 0.2
    assert 4600 < near.teff[clump].median() < 5000 and 1.2 < np.log10(luminosity[clump]).median() < 2.2
    assert 0.15 < (~dwarf).mean() < 0.3


def test_neighbourhood_kinematics_and_metals(near):
    assert near.metallicity.median() == pytest.approx(-0.05, abs=0.03)
    assert near.metallicity.skew() < -0.5  # a metal-poor tail
    bins = pd.cut(near.metallicity, [-3, -1, -0.5, 0, 0.5])
    dispersion = near.groupby(bins, observed=True).radial_velocity.std()
    assert (np.diff(dispersion) < 0).all() and 20 < dispersion.iloc[-1] < 35 and dispersion.iloc[0] > 60
    assert near[["metallicity", "alpha"]].corr("spearman").iloc[0, 1] < -0.7


def test_neighbourhood_rotation_and_brightness(near):
    dwarf = near.logg > 4
    speed = near[dwarf].groupby(pd.cut(near.teff[dwarf], [4000, 5500, 6200, 6600, 8500]), observed=True).vsini.median()
    assert speed.iloc[0] < 4 and speed.iloc[1] < 4 and speed.iloc[2] > 5 and speed.iloc[3] > 25
    assert near[["snr", "magnitude"]].corr("spearman").iloc[0, 1] < -0.85


def test_neighbourhood_can_be_simulated():
    ds = sample_survey(40, exposures=2, seed=8, wavelength=MG, population="solar_neighbourhood", labels=("mass", "alpha"))
    validate(ds)
    assert ds.mass.attrs["role"] == "factor" and ds.magnitude.attrs["role"] == "label" and ds.label_mass.attrs["units"] == "solMass"
    assert np.isfinite(ds.flux.values).all()


# ---------------------------------------------------------------- catalogue
def test_labels_belong_to_stars_and_are_missing_star_by_star():
    ds = sample_survey(3000, exposures=2, seed=1, wavelength=log_grid(5000, 5010, 8), labels=("teff", "radial_velocity"), missing_labels=0.4)
    for name in ("teff", "radial_velocity"):
        label = ds[f"label_{name}"]
        assert label.attrs["role"] == "label" and label.attrs["units"] == ds[name].attrs["units"]
        np.testing.assert_array_equal(label.values[::2], label.values[1::2])
        error = (label - ds[name]).values[::2]
        assert np.isnan(error).mean() == 0.4 and np.nanstd(error) == pytest.approx(LABEL_ERRORS[name], rel=0.06) and abs(np.nanmean(error)) < LABEL_ERRORS[name] / 10
    np.testing.assert_array_equal(ds.label_teff.isnull(), ds.label_radial_velocity.isnull())


def test_faint_stars_are_missed_more_often_and_noise_can_be_turned_off():
    ds = sample_survey(3000, seed=1, wavelength=log_grid(5000, 5010, 8), labels="logg", missing_labels=0.4, label_noise=0)
    lost = ds.label_logg.isnull().values
    faint = ds.snr.values < np.median(ds.snr.values)
    assert lost[faint].mean() > 1.5 * lost[~faint].mean() > 0.1
    np.testing.assert_array_equal(ds.label_logg.values[~lost], ds.logg.values[~lost])
    everything = sample_survey(10, seed=1, wavelength=log_grid(5000, 5010, 8), labels="logg", missing_labels=1.)
    assert everything.label_logg.isnull().all()


def test_a_label_does_not_change_when_another_is_asked_for():
    grid = log_grid(5000, 5010, 8)
    one, two = (sample_survey(50, seed=1, wavelength=grid, labels=names, missing_labels=0.3) for names in (("teff",), ("logg", "teff")))
    np.testing.assert_array_equal(one.label_teff.values, two.label_teff.values)
    np.testing.assert_array_equal(one.flux.values, two.flux.values)


# --------------------------------------------------------------- abundances
def test_an_abundance_multiplies_the_opacity_of_its_element_alone():
    for species, moves in (("Mg I", True), ("Ti II", True), ("Fe I", False), ("H I", False), ("Na I", False)):
        assert specnb.lines._excess(species, dict(alpha=0.3)) == (0.3 if moves else 0.)
    assert specnb.lines._excess("Mg I", dict(alpha=0.3, abundance_Mg=0.2)) == pytest.approx(0.5)
    assert line_opacity("Ca I", 2.5, 5000., 4., -1., 0.4) == pytest.approx(line_opacity("Ca I", 2.5, 5000., 4., -1.) + 0.4)


def test_abundance_of_one_element_shows_in_its_own_lines():
    grid = linear_grid(6150, 6170, 0.02)
    change = {e: np.abs(clean(grid, abundances={e: 0.4}) - clean(grid)) for e in ("Ca", "Na")}
    at = lambda e, w: change[e][np.abs(grid - w) < 0.08].max()
    assert at("Ca", 6162.17) > 0.03 and at("Ca", 6166.44) > 0.03 and at("Ca", 6160.75) < 0.01
    assert at("Na", 6160.75) > 0.03 and at("Na", 6166.44) < 0.01
    np.testing.assert_array_equal(clean(grid, abundances={"Ca": 0.}), clean(grid))


# ------------------------------------------------------------------ physics
@given(st.floats(-3, 4), st.floats(0.01, 0.5))
@settings(max_examples=40, deadline=None)
def test_line_profiles_are_voigt_functions(log_eta, damping):
    width = 1.9
    velocity = np.arange(-200, 200, 0.1)
    template = np.zeros(len(velocity), np.float32)
    specnb.lines.add_line(template, velocity / SPEED_OF_LIGHT, 0., 10**log_eta, width, damping)
    expected = voigt_profile(velocity, width / np.sqrt(2), damping * width) * width * np.sqrt(np.pi)  # both have unit area times width sqrt(pi)
    inside = template > 0
    np.testing.assert_allclose(template[inside], (10**log_eta * expected)[inside], rtol=2e-5)
    assert template[~inside].size == 0 or (10**log_eta * expected)[~inside].max() < 2e-2 * max(1, 10**log_eta) * damping  # what is cut off


def test_curve_of_growth_against_quadrature():
    velocity = np.arange(-4000, 4000, 0.1)
    for log_eta in (-2, 0, 1.5, 4):
        template = np.zeros(len(velocity), np.float32)
        specnb.lines.add_line(template, velocity / SPEED_OF_LIGHT, 0., 10.**log_eta, 1.9, .03)
        eta = 10.**log_eta * voigt_profile(velocity, 1.9 / np.sqrt(2), .03 * 1.9) * 1.9 * np.sqrt(np.pi)
        expected = np.trapezoid(specnb.lines._DEPTH * eta / (1 + eta), velocity)
        assert specnb.lines._depth(template).sum() * 0.1 == pytest.approx(expected, rel=0.03)


@given(st.floats(0.1, 300), st.floats(1e-5, 1.3))
@settings(max_examples=60, deadline=None)
def test_rotation_looked_up_equals_rotation_computed(vsini, frequency):
    frequencies = np.linspace(0, frequency, 50)
    np.testing.assert_allclose(specnb.observe._rotation_kernel(frequencies, np.array([vsini])), rotation_transform(frequencies, vsini)[None], atol=5e-7)


@given(st.floats(-3, 3), st.integers(1, 3000))
@settings(max_examples=30, deadline=None)
def test_phase_factors(angle, n):
    np.testing.assert_allclose(specnb.observe._phase(np.array([angle]), n)[0], np.exp(-1j * angle * np.arange(n)), atol=1e-6)


def test_rotation_equals_integration_over_a_disc():
    "Gray's transform against a sum over a limb-darkened disc rotating at v sin i."
    vsini, x = 20., np.linspace(-1, 1, 801)
    X, Y = np.meshgrid(x, x); mu2 = 1 - X**2 - Y**2
    weight = np.where(mu2 > 0, 1 - 0.6 + 0.6 * np.sqrt(np.clip(mu2, 0, None)), 0)
    for frequency in (0.005, 0.02, 0.05):
        disc = (weight * np.cos(2 * np.pi * frequency * vsini * X)).sum() / weight.sum()
        assert rotation_transform(np.array([frequency]), vsini)[0] == pytest.approx(disc, abs=2e-3)


possible = st.fixed_dictionaries({}, optional=dict(
    radial_velocity=st.floats(-400, 400), teff=st.floats(3500, 9000), logg=st.floats(0, 5.5), metallicity=st.floats(-4, 1), vsini=st.floats(0, 300), water=st.floats(0, 100),
    airmass=st.floats(1, 10), snr=st.floats(1, 1e4), alpha=st.floats(-1, 1.5), activity=st.floats(0, 20), epoch=st.floats(0, 1), companion=st.floats(0, 1),
    companion_velocity=st.floats(-400, 400), berv=st.floats(-40, 40)))


@given(possible, st.sampled_from(["barycentric", "topocentric"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_possible_star_gives_a_valid_spectrum(factors, frame, noise):
    ds = simulate(factors, log_grid(3900, 6900, 128), frame=frame, noise=noise)
    validate(ds)
    usable = ds.ivar.values > 0
    assert usable.mean() > 0.9 and np.isfinite(ds.flux.values).all()
    if not noise: assert ds.flux.values[usable].min() > -1e-3 * ds.flux.values.max()
    for name, value in factors.items(): assert float(ds[name][0]) == value


# -------------------------------------------------------------------- files
def test_a_survey_can_be_written_as_files_that_astropy_and_our_reader_open(tmp_path):
    from astropy.io import fits
    from specnb.eso import write_adp, write_s1d
    from specnb.fits import read_spectrum
    survey = sample_survey(2, exposures=2, seed=4, wavelength=linear_grid(5150, 5200, 0.02), hidden="activity")
    for i, name in enumerate(survey.spectrum_id.values):
        one = survey.isel(spectrum=[i])
        table, image = write_adp(one, tmp_path / f"ADP.{name}.fits"), write_s1d(one, tmp_path / f"HARPS.{name}_s1d_A.fits")
        with fits.open(table) as f: columns = {n.upper(): np.ravel(f[1].data[n]) for n in f[1].columns.names}
        np.testing.assert_array_equal(columns["FLUX"].astype("f4"), one.flux.values[0])
        np.testing.assert_allclose(columns["WAVE"], one.wavelength.values, rtol=1e-12)
        with fits.open(image) as f: header, pixels = f[0].header, f[0].data
        np.testing.assert_array_equal(pixels.astype("f4"), one.flux.values[0])
        np.testing.assert_allclose(header["CRVAL1"] + header["CDELT1"] * np.arange(len(pixels)), one.wavelength.values, atol=1e-6)
        for path in (table, image):
            back = read_spectrum(path)
            np.testing.assert_array_equal(back.flux.values, one.flux.values)
            np.testing.assert_allclose(back.wavelength.values, one.wavelength.values, atol=1e-6)
            assert back.object.item() == one.object.item() and back.mjd_obs.item() == pytest.approx(one.mjd_obs.item(), abs=1e-6)


# -------------------------------------------------- against the real world
def reference_lines(shared_data):
    "Lines of Sousa et al. 2008 (iron) and Neves et al. 2009 (other elements): wavelength, excitation, log gf, species, solar equivalent width [mA]."
    rows = []
    for name in ("linelist_sousa_fe_ewsun.lst", "linelist_elements_neves2009.lst"):
        for line in (shared_data / "reference" / name).read_text().splitlines()[2:]:
            wave, _, excitation, log_gf, element, width = line.split()[:6]
            stage = re.fullmatch(r"([A-Z][a-z]?)(II|I|2)", element)
            rows.append((float(wave), float(excitation), float(log_gf), f"{stage[1]} {stage[2].replace('2', 'II')}", float(width)))
    return pd.DataFrame(rows, columns=["wavelength", "excitation", "log_gf", "species", "width"])


def shared_lines(shared_data):
    "Pairs of a named line and its entry in the reference lists."
    reference, pairs = reference_lines(shared_data), []
    for line in named_lines().itertuples():
        same = reference[(reference.species == line.species) & ((reference.wavelength - line.wavelength).abs() < 0.06)]
        if len(same): pairs.append((line, same.iloc[0]))
    return pairs


def test_named_lines_agree_with_the_reference_lists(shared_data):
    pairs = shared_lines(shared_data)
    difference = np.array([a.log_gf - b.log_gf for a, b in pairs])
    print(f"{len(pairs)} lines in common, log gf differs by {np.median(difference):+.3f} in the median, {np.median(np.abs(difference)):.3f} in absolute value, {np.abs(difference).max():.2f} at most")
    assert len(pairs) >= 30
    assert max(abs(a.wavelength - b.wavelength) for a, b in pairs) < 0.035 and max(abs(a.excitation - b.excitation) for a, b in pairs) <= 0.011
    assert np.median(np.abs(difference)) < 0.1 and np.abs(difference).max() < 0.35


def equivalent_width(species, wavelength, excitation, log_gf):
    "Equivalent width of one line in the simulated Sun [mA]."
    velocity = np.arange(-1500, 1500, 0.3)
    template = np.zeros(len(velocity), np.float32)
    row = pd.DataFrame(dict(species=[species], wavelength=[wavelength], excitation=[excitation]))
    specnb.lines.add_line(template, velocity / SPEED_OF_LIGHT, 0., 10**float(log_gf + specnb.lines._solar_strength(row)[0]), specnb.lines._DOPPLER_WIDTH, specnb.lines._STRONG.get(species, .03))
    return specnb.lines._depth(template).sum() * 0.3 / SPEED_OF_LIGHT * wavelength * 1e3


def test_solar_iron_lines_have_the_measured_equivalent_widths(shared_data):
    iron = reference_lines(shared_data).query("species in ('Fe I', 'Fe II')")
    ours = np.array([equivalent_width(r.species, r.wavelength, r.excitation, r.log_gf) for r in iron.itertuples()])
    error = np.log10(ours / iron.width.values)
    for species in ("Fe I", "Fe II"):
        of = (iron.species == species).values
        print(f"{species}: {of.sum()} lines, median log ratio {np.median(error[of]):+.3f}, median |log ratio| {np.median(np.abs(error[of])):.3f}")
        assert np.median(np.abs(error[of])) < 0.08 and abs(np.median(error[of])) < 0.05
    named = [(equivalent_width(a.species, a.wavelength, a.excitation, a.log_gf), b.width) for a, b in shared_lines(shared_data) if a.species.startswith("Fe")]
    named = np.abs(np.log10([a / b for a, b in named]))
    print(f"named lines with their own log gf: {len(named)}, median |log ratio| {np.median(named):.3f}, largest {named.max():.2f}")
    assert len(named) >= 10 and np.median(named) < 0.12 and named.max() < 0.3


def continuum(wavelength, flux, width=10.):
    "95th percentile in blocks of `width` Angstrom, joined by lines; the same rule for real and simulated spectra."
    starts = np.arange(wavelength[0], wavelength[-1], width)
    blocks = [flux[(wavelength >= a) & (wavelength < a + width)] for a in starts]
    level = np.array([np.nanpercentile(b, 95) if np.isfinite(b).sum() > 20 else np.nan for b in blocks])
    return np.interp(wavelength, (starts + width / 2)[np.isfinite(level)], level[np.isfinite(level)])


def test_simulated_sun_against_ganymede(shared_data):
    "5160-5360 Angstrom, normalised alike. Named lines must agree in place and depth; the forest's places are drawn at random, so only its share of absorbed light can."
    from astropy.io import fits
    with fits.open(shared_data / "stars_5160_5360" / "Sun-Ganymede_HARPS_iraf.fits") as f: header, data = f[0].header, f[0].data.astype(float)
    grid = linear_grid(5161, 5359, 0.01)
    real = np.interp(grid, header["CRVAL1"] + header["CDELT1"] * np.arange(len(data)), data)
    bad = (real < 0.01 * np.median(real)) | ((grid > 5303) & (grid < 5340))
    sun = simulate({}, grid, noise=False, gap=None).flux.values[0].astype(float)
    real, sun = (np.where(bad, 1, f / continuum(grid, np.where(bad, np.nan, f))) for f in (real, sun))
    wave = named_lines().wavelength.values
    near = np.min(np.abs(grid[:, None] - wave[(wave > 5150) & (wave < 5370)]), 1) < 0.5
    score = {}
    for name, resolution in (("115,000", None), ("6,800 (44 km/s)", 6800)):
        a, b = (real, sun) if resolution is None else (broaden(grid, real, resolution), broaden(grid, sun, resolution))
        each = {"all": ~bad, "named lines": near & ~bad, "forest": ~near & ~bad}
        score[name] = {k: np.corrcoef(a[v], b[v])[0, 1] for k, v in each.items()}
        print(name, {k: round(float(v), 3) for k, v in score[name].items()})
        assert abs(np.corrcoef(np.roll(a, 1500)[~bad], b[~bad])[0, 1]) < 0.2 < score[name]["all"]
    depth = (1 - real)[~bad].mean(), (1 - sun)[~bad].mean()
    print(f"light absorbed: {depth[0]:.3f} real, {depth[1]:.3f} simulated")
    assert score["115,000"]["named lines"] > 0.75 and score["6,800 (44 km/s)"]["named lines"] > 0.88 and score["6,800 (44 km/s)"]["all"] > 0.6
    assert depth[1] == pytest.approx(depth[0], rel=0.25)


def tabulated_transmission(shared_data, start, stop):
    "Tabulated transmission of molecular lines over its local maximum, on a logarithmic grid."
    with np.load(shared_data / "reference" / "telluric_transmission_5000_6950.npz") as z: wave, value = z["wave_air_A"].astype(float), z["transmission"].astype(float)
    grid = log_grid(start, stop, int((stop - start) / 0.01))
    table = np.interp(grid, wave, value)
    starts = np.arange(start, stop, 3.)
    top = np.array([table[(grid >= a) & (grid < a + 3)].max() for a in starts])
    return grid, table / np.interp(grid, starts + 1.5, top)


def test_the_atmosphere_adds_no_light():
    factors = dict(berv=[3.3, 11., -20.], airmass=[1., 1.5, 2.2])
    flux = simulate(factors, log_grid(6700, 6910, 300), noise=False).spec.normalise().flux.values
    none = simulate({**factors, "water": [0.] * 3, "airmass": [1.] * 3}, log_grid(6700, 6850, 300), noise=False).spec.normalise().flux.values
    assert flux.max() < 1.1 * none.max()


def test_the_oxygen_pair_beside_iron_6302():
    from specnb.wave import vacuum_to_air
    ours = vacuum_to_air(specnb.observe._oxygen_lines()[0])
    for known in (6302.00, 6302.76): assert np.abs(ours - known).min() < 0.03


@pytest.mark.parametrize("band, start, stop", [("gamma", 6275, 6330), ("B", 6866, 6910)])
def test_oxygen_bands_against_the_tabulated_transmission(shared_data, band, start, stop):
    grid, table = tabulated_transmission(shared_data, start, stop)
    ours = telluric_transmission(grid, 1.15, 0.)
    for resolution, least in OXYGEN[band]:
        a, b = broaden(grid, table, resolution), broaden(grid, ours, resolution)
        correlation, ratio = np.corrcoef(a, b)[0, 1], (1 - b).sum() / (1 - a).sum()
        print(f"O2 {band} at R = {resolution:,}: correlation {correlation:.3f}, absorbed light simulated over tabulated {ratio:.2f}")
        assert correlation > least and 0.8 < ratio < 1.25


#: resolving power, and the correlation that must be reached
OXYGEN = {"gamma": ((115_000, 0.85), (3000, 0.97)), "B": ((115_000, 0.9), (3000, 0.97))}


def test_water_bands_stand_where_they_should(shared_data):
    "Single water lines are drawn at random; where the vapour absorbs, in steps of 20 Angstrom, must agree."
    grid, table = tabulated_transmission(shared_data, 5700, 6700)
    ours = telluric_transmission(grid, 1.15, 2.)
    oxygen = telluric_transmission(grid, 1.15, 0.)
    blocks = [(grid >= a) & (grid < a + 20) & ~((grid > 6270) & (grid < 6330)) for a in np.arange(5700, 6700, 20)]
    a, b = (np.array([(1 - f)[k].mean() for k in blocks if k.sum() > 100]) for f in (table, ours / oxygen))
    print(f"water: rank correlation {spearmanr(a, b).statistic:.2f} over {len(a)} blocks of 20 Angstrom; absorbed light simulated over tabulated {b.sum() / a.sum():.2f}")
    assert spearmanr(a, b).statistic > 0.5 and 0.3 < b.sum() / a.sum() < 3


#: centre, half width, blue and red side bands [Angstrom]
INDEX = {"H alpha": (6562.8, 15, (6520, 6540), (6585, 6605)), "Mg b": (5176, 18, (5118, 5143), (5192, 5206)), "Fe 5270": (5265.6, 20, (5234, 5245), (5288, 5312)),
         "Na D": (5893, 15, (5862, 5875), (5922, 5948)), "Ca 6162": (6162, 8, (6145, 6151), (6172, 6180))}


def index_width(wave, flux, centre, half, blue, red):
    "Equivalent width against a line through two side bands [Angstrom], (spectrum,)."
    of = lambda low, high: (wave >= low) & (wave <= high)
    b, r = (flux[:, of(*side)].mean(1)[:, None] for side in (blue, red))
    inside = of(centre - half, centre + half)
    level = b + (r - b) * (wave[inside] - np.mean(blue)) / (np.mean(red) - np.mean(blue))
    return ((1 - flux[:, inside] / level) * (wave[1] - wave[0])).sum(1)


def test_temperature_changes_lines_as_in_miles(shared_data):
    "Ratios of metal lines to H alpha in dwarfs of 4300-7000 K: the slope with temperature, and the agreement star by star."
    with np.load(shared_data / "miles" / "miles_3800_6900_int16.npz") as z:
        wave, ids, flux = z["wave0"] + z["dwave"] * np.arange(z["flux_i16"].shape[1]), z["miles_id"].astype(int), z["flux_i16"] * z["scale"][:, None]
    stars = pd.read_csv(shared_data / "labels" / "miles_labels.csv").set_index("miles_id").reindex(ids)
    dwarf = (stars.teff.between(4300, 7000) & (stars.logg > 3.8) & (stars.feh.abs() < 0.35)).values
    stars, flux, fine = stars[dwarf], flux[dwarf], linear_grid(3801, 6898, 0.3)
    model = simulate(dict(teff=stars.teff.values, logg=stars.logg.values, metallicity=stars.feh.values), fine, noise=False, gap=None, resolving_power=2000).flux.values
    model = np.stack([np.interp(wave, fine, f) for f in model])
    real, ours = ({n: index_width(wave, f, *v) for n, v in INDEX.items()} for f in (flux, model))
    kilokelvin = stars.teff.values / 1000
    assert len(stars) > 100
    for name in list(INDEX)[1:]:
        a, b = (np.log10(w[name] / w["H alpha"]) for w in (real, ours))
        slopes = [np.polyfit(kilokelvin, y, 1)[0] for y in (a, b)]
        print(f"{name} / H alpha: {slopes[0]:+.2f} dex per 1000 K in MILES, {slopes[1]:+.2f} simulated; correlation star by star {np.corrcoef(a, b)[0, 1]:.3f}")
        assert slopes[1] / slopes[0] == pytest.approx(1, abs=0.35) and np.corrcoef(a, b)[0, 1] > 0.9
