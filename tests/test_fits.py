"""Reading one file: faults, dialects, the registry, and the real files of the shared folder."""
import collections
import gzip
import io
import pickle
import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from specnb import compose
from specnb import fits as sf
from specnb.eso import write_adp, write_s1d
from specnb.fits import (BadWavelength, IdentifierError, MissingField, NotASpectrum, NotFits, NoUsablePixels, ReaderError, SpectrumError,
                         TruncatedFile, Unusual, UnknownLayout, assemble, load_bytes, parse_fits, read_parts, read_spectrum, register_reader, scan_fits, unregister_reader)
from specnb.spectra import make_spectra, validate


@pytest.fixture
def star(rng):
    wave = np.arange(5000, 5020, .01)
    flux = 100 + rng.normal(0, 2, (1, wave.size))
    return make_spectra(flux, np.full(flux.shape, .25), wave, ["star-1"], medium="air", frame="barycentric",
                        coords=dict(object=["HD 1"], mjd_obs=[55000.25], berv=[12.5], airmass=[1.3], snr=[50.]))


@pytest.fixture
def table_bytes(star, tmp_path): return write_adp(star, tmp_path / "t.fits").read_bytes()


@pytest.fixture
def image_bytes(star, tmp_path): return write_s1d(star, tmp_path / "i_s1d_A.fits").read_bytes()


def image(path, data, **cards):
    fits.writeto(path, np.asarray(data), fits.Header({k.replace("_", "-") if k == "DC_FLAG" else k: v for k, v in cards.items()}), overwrite=True)
    return path


# ---- faults

@pytest.mark.parametrize("content, error, words", [
    (b"", NotFits, "empty"), (b"<html>log in</html>", NotFits, "not a FITS file"), (b"\x1f\x8b\x08broken", TruncatedFile, "gzip"),
    (b"SIMPLE  =                    T" + b" " * 50, TruncatedFile, "header"), (b"\x00" * 5000, NotFits, "not a FITS file")])
def test_what_is_not_fits_is_said_to_be_so(content, error, words):
    with pytest.raises(error, match=words) as caught: read_spectrum("some.fits", content=content)
    assert caught.value.path == "some.fits" and caught.value.mend
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_every_truncation_is_refused(table_bytes, rng, packed):
    content = gzip.compress(table_bytes) if packed else table_bytes
    whole = read_spectrum("t.fits", content=content)
    for n in rng.integers(1, len(content) - 2880, 60):
        with pytest.raises(SpectrumError): read_spectrum("t.fits", content=content[:n])
    assert whole.sizes["wavelength"] == 2000


def test_damaged_bytes_never_escape_as_other_exceptions(table_bytes, image_bytes, rng):
    outcomes = collections.Counter()
    for k in range(600):
        content = bytearray((table_bytes, image_bytes)[k % 2])
        for _ in range(rng.integers(1, 20)): content[rng.integers(8640)] = rng.integers(256)
        if k % 3 == 0: del content[(at := rng.integers(len(content))):at + rng.integers(1, 3000)]
        try: outcomes["read"] += validate(read_spectrum("x_s1d_A.fits", content=bytes(content))).sizes["spectrum"]
        except SpectrumError as exc: outcomes[type(exc).__name__] += bool(exc.reason)
    assert sum(outcomes.values()) == 600 and outcomes["read"] > 20 and len(outcomes) >= 4


def test_header_only_file(tmp_path):
    fits.PrimaryHDU().writeto(tmp_path / "head.fits")
    with pytest.raises(MissingField, match="no HDU holds data"): read_spectrum(tmp_path / "head.fits")


def test_unusable_pixels(tmp_path):
    cards = dict(CRVAL1=5000., CDELT1=.01, CRPIX1=1.)
    for data in (np.full(500, np.nan), np.zeros(500)):
        with pytest.raises(NoUsablePixels, match="none of 500"): read_spectrum(image(tmp_path / "x.fits", data.astype("f4"), **cards))


@pytest.mark.parametrize("wave, words", [([5000, 5001, 5001, 5002], "does not increase at 1"), ([5000, 5003, 5001, 5004], "first at pixel 2"), ([np.nan] * 4, "fewer than two pixels")])
def test_bad_wavelengths(tmp_path, wave, words):
    Table({"WAVE": np.array(wave, float), "FLUX": np.ones(4)}).write(tmp_path / "w.fits")
    with pytest.raises(BadWavelength, match=words): read_spectrum(tmp_path / "w.fits")


def test_descending_wavelength_and_blank_ends_are_turned_and_cut(tmp_path, rng):
    wave = np.r_[0., np.arange(6000, 5990, -.05), np.nan]
    flux = rng.normal(10, 1, wave.size)
    Table({"WAVE": wave, "FLUX": flux, "ERR": np.ones(wave.size)}).write(tmp_path / "w.fits")
    ds = read_spectrum(tmp_path / "w.fits")
    np.testing.assert_allclose(ds.wavelength, wave[1:-1][::-1])
    np.testing.assert_allclose(ds.flux[0], flux[1:-1][::-1], rtol=1e-6)


def test_wrong_columns_lists_those_found(tmp_path):
    Table({"time": [1.], "mag": [2.]}).write(tmp_path / "lc.fits")
    with pytest.raises(MissingField, match="found: time, mag"): read_spectrum(tmp_path / "lc.fits")


def test_wrong_unit(tmp_path):
    table = Table({"WAVE": np.arange(1., 50), "FLUX": np.ones(49)})
    table["WAVE"].unit = "keV"
    table.write(tmp_path / "x.fits")
    with pytest.raises(BadWavelength, match="keV"): read_spectrum(tmp_path / "x.fits")


# ---- dialects

@pytest.mark.parametrize("unit, factor, guessed", [("nm", .1, False), ("Angstrom", 1, False), ("um", 1e-4, False), (None, .1, True), (None, 1, True), (None, 1e-4, True)])
def test_units(tmp_path, unit, factor, guessed, rng):
    wave = np.arange(5000, 5100, .1)
    table = Table({"lambda": wave * factor, "flux": rng.normal(5, .1, 1000)})
    if unit: table["lambda"].unit = unit
    table.write(tmp_path / "u.fits")
    ds = read_spectrum(tmp_path / "u.fits")
    np.testing.assert_allclose(ds.wavelength, wave, rtol=1e-12)
    assert ("wavelength unit" in ds.guess.item()) == guessed


def test_sdss_like_table(tmp_path, rng):
    loglam = 3.58 + 1e-4 * np.arange(3000)
    hdu = fits.BinTableHDU.from_columns([fits.Column("flux", "E", array=rng.normal(5, .1, 3000)), fits.Column("loglam", "E", array=loglam), fits.Column("ivar", "E", array=np.r_[np.zeros(10), np.full(2990, 100.)])])
    fits.HDUList([fits.PrimaryHDU(header=fits.Header({"VACUUM": True})), hdu]).writeto(tmp_path / "sdss.fits")
    ds = read_spectrum(tmp_path / "sdss.fits")
    np.testing.assert_allclose(ds.wavelength, 10**loglam, rtol=1e-6)
    assert ds.wavelength.attrs["medium"] == "vacuum" and int((ds.ivar == 0).sum()) == 10 and ds.ivar.attrs["origin"] == "pipeline"


def test_air_column_preferred_when_both_are_there(tmp_path):
    Table({"wavelength": np.arange(5001.4, 5011), "wavelength_air": np.arange(5000., 5009.6), "flux": np.arange(1., 11), "error": np.ones(10), "quality": [0] * 9 + [1]}).write(tmp_path / "s1d.fits")
    ds = read_spectrum(tmp_path / "s1d.fits")
    assert ds.wavelength.values[0] == 5000. and ds.wavelength.attrs["medium"] == "air" and "medium" not in ds.guess.item()
    assert float(ds.ivar[0, -1]) == 0


def test_log_linear_and_degenerate_axes(tmp_path, rng):
    flux = rng.normal(1, .1, (1, 1, 800)).astype("f4")
    path = image(tmp_path / "log.fits", flux, CRVAL1=3.7, CDELT1=1e-5, CRPIX1=1., DC_FLAG=1, WAT1_001="wtype=linear label=Wavelength units=angstroms")
    np.testing.assert_allclose(read_spectrum(path).wavelength, 10**(3.7 + 1e-5 * np.arange(800)))


def test_reference_pixel(tmp_path, rng):
    path = image(tmp_path / "r.fits", rng.normal(1, .1, 300), CRVAL1=5000., CDELT1=.5, CRPIX1=11., CUNIT1="Angstrom")
    assert read_spectrum(path).wavelength.values[10] == 5000.


@pytest.mark.parametrize("ctype", ["km/s", "VELO-LSR", "FREQ", "PIXEL"])
def test_other_axes_are_no_wavelength(tmp_path, ctype):
    with pytest.raises(NotASpectrum, match="not a spectrum"): read_spectrum(image(tmp_path / "v.fits", np.ones(99), CRVAL1=1., CDELT1=1., CTYPE1=ctype))


def test_multispec_is_refused_with_the_mend(tmp_path):
    with pytest.raises(UnknownLayout, match="dispcor"): read_spectrum(image(tmp_path / "m.fits", np.ones(99), WAT0_001="system=multispec", CRVAL1=1., CDELT1=1.))


def test_statement_of_the_user_replaces_the_guess(tmp_path, rng):
    path = image(tmp_path / "b.fits", rng.normal(1, .1, 300), CRVAL1=5000., CDELT1=.5, CRPIX1=1., CUNIT1="Angstrom")
    ds = read_spectrum(path, medium="vacuum", frame="rest")
    assert ds.guess.item() == "" and ds.wavelength.attrs["medium"] == "vacuum" and ds.attrs["frame_origin"] == "stated by the user"
    with pytest.raises(ValueError, match="one of air, vacuum"): read_spectrum(path, medium="water")


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1., 1e6, 1e20])
def test_flux_scale_survives_float32(tmp_path, scale, rng):
    flux = rng.normal(100, 2, 1000) * scale
    ds = assemble("s.fits", np.arange(5000., 6000), flux, {}, error=np.full(1000, 2 * scale), medium=("air", ""), frame=("rest", ""))
    snr = (ds.flux * np.sqrt(ds.ivar))[0]
    np.testing.assert_allclose(snr, flux / scale / 2, rtol=1e-5)


# ---- errors and masks

def test_errors_partly_bad_mask_only_those_pixels(rng):
    error = np.full(1000, 2.)
    error[:100], error[100:150], error[150:160] = np.nan, 0., -1.
    ivar, origin = sf.pixel_ivar(rng.normal(100, 2, 1000), error)
    assert origin == "pipeline" and (ivar[:160] == 0).all() and (ivar[160:] == .25).all()


def test_errors_mostly_bad_are_estimated(rng):
    ivar, origin = sf.pixel_ivar(rng.normal(100, 2, 4000), np.r_[np.full(3000, np.nan), np.full(1000, 2.)])
    assert origin == "estimated" and abs(np.median(1 / np.sqrt(ivar)) / 2 - 1) < .1


def test_noise_free_model_is_usable_and_says_what_was_assumed(tmp_path):
    ds = read_spectrum(image(tmp_path / "model.fits", np.linspace(50, 60, 400), CRVAL1=5000., CDELT1=.5, CRPIX1=1., CUNIT1="Angstrom"))
    assert ds.ivar_origin.item() == "assumed"
    np.testing.assert_allclose(np.sqrt(ds.ivar * ds.flux**2).median(), 1000, rtol=.01)


# ---- registry

def test_registry_is_explicit_ordered_and_restored():
    before = [r.name for r in sf.readers()]
    register_reader("mine", lambda p, h: True, lambda p, h: assemble(p, np.arange(5000., 5100), np.arange(1., 101), {}, medium=("air", ""), frame=("rest", "")), priority=100)
    try:
        assert sf.readers()[0].name == "mine" and read_spectrum("x", content=b"anything").reader.item() == "mine"
        with pytest.raises(ValueError, match="exists"): register_reader("mine", None, None)
        with pytest.raises(ValueError, match="exists"): register_reader("harps-s1d", None, None)
    finally: unregister_reader("mine")
    assert [r.name for r in sf.readers()] == before


def test_identifier_and_reader_failures_are_reported_not_swallowed(table_bytes):
    register_reader("odd", lambda p, h: 1 / 0, None, priority=100)
    try:
        with pytest.raises(IdentifierError, match="ZeroDivisionError") as caught: read_spectrum("t.fits", content=table_bytes)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        register_reader("odd", lambda p, h: True, lambda p, h: [][0], priority=100, replace=True)
        with pytest.raises(ReaderError, match="'odd' failed with IndexError"): read_spectrum("t.fits", content=table_bytes)
    finally: unregister_reader("odd")


def test_a_reader_that_breaks_the_contract_is_named(table_bytes):
    register_reader("sloppy", lambda p, h: True, lambda p, h: make_spectra(np.ones((1, 3)), None, [1., 2., 3.], ["a"], medium="air", frame="rest").drop_vars("ivar"), priority=100)
    try:
        with pytest.raises(ReaderError, match="'sloppy' failed with ContractError: ivar is missing"): read_spectrum("t.fits", content=table_bytes)
    finally: unregister_reader("sloppy")


# ---- real files

EXPECTED = {"harps_full": {"harps-s1d": 4, "NotASpectrum": 2}, "harps_timeseries": {"harps-s1d": 179}, "derived_harps_adp": {"eso-phase3": 3}, "eso_adp_uves": {"eso-phase3": 7},
            "uves_pipeline_images": {"eso-image": 6}, "stars_5160_5360": {"harps-s1d": 3, "eso-image": 3, "image": 10}, "lamost_dr1": {"named-rows": 40}, "miles": {"image": 4}}


@pytest.mark.parametrize("folder", EXPECTED)
def test_every_real_file_is_read_or_refused(shared_data, folder):
    seen, ids = collections.Counter(), []
    for path in sorted((shared_data / folder).rglob("*.fits*")):
        try:
            ds = validate(read_spectrum(path))
            seen[ds.reader.item()] += 1
            ids.append(ds.spectrum_id.item())
            assert ds.source_file.item() == path.name and float(ds.ivar.max()) > 0
        except NotASpectrum as exc:
            seen["NotASpectrum"] += 1
            assert ("CCF" in exc.reason) == ("_ccf_" in path.name) and ("BIS" in exc.reason) == ("_bis_" in path.name)
    assert seen == EXPECTED[folder] and len(set(ids)) == len(ids)


def test_gap_of_zeros_moves_with_berv_and_is_masked(shared_data):
    for path in sorted((shared_data / "harps_full").glob("*s1d*")):
        ds = read_spectrum(path).squeeze()
        gap = ds.wavelength.values[ds.ivar.values == 0]
        assert 3294 <= gap.size <= 3295 and 5303 < gap[0] < gap[-1] < 5338
        np.testing.assert_allclose(np.diff(gap), .01, atol=1e-6)


def test_lamost_takes_pipeline_ivar_and_vacuum(shared_data):
    ds = read_spectrum(next((shared_data / "lamost_dr1").glob("*006-008*"), None) or sorted((shared_data / "lamost_dr1").glob("*.gz"))[0])
    assert ds.wavelength.attrs == dict(units="Angstrom", medium="vacuum", frame="barycentric") and ds.guess.item() == "" and ds.ivar.attrs["origin"] == "pipeline"
    np.testing.assert_allclose(np.diff(np.log10(ds.wavelength)), 1e-4, rtol=1e-6)


def test_missing_reference_pixel_is_one_and_recorded(shared_data):
    ds = read_spectrum(shared_data / "stars_5160_5360" / "Gl674_FEROS.fits")
    assert "CRPIX1 absent" in ds.guess.item() and ds.wavelength.values[0] == 5160.


# every file of the shared folder, as its README states it: (folder, ending) -> {outcome: number of files}
STATED = {("harps_full", "fits"): {"harps-s1d": 4, "NotASpectrum": 2}, ("harps_timeseries", "fits"): {"harps-s1d": 179}, ("derived_harps_adp", "fits"): {"eso-phase3": 3}, ("eso_adp_uves", "fits"): {"eso-phase3": 7},
          ("uves_pipeline_images", "fits"): {"eso-image": 6}, ("stars_5160_5360", "fits"): {"harps-s1d": 3, "eso-image": 3, "image": 10}, ("lamost_dr1", "fits"): {"named-rows": 40}, ("miles", "fits"): {"image": 4},
          ("miles", "npz"): {"NotFits": 1}, ("apogee_pixels", "npz"): {"NotFits": 1}, ("reference", "npz"): {"NotFits": 1}, ("labels", "csv"): {"MissingField": 8}, ("reference", "csv"): {"MissingField": 3},
          ("reference", "dat"): {"BadWavelength": 1}, ("reference", "lst"): {"NotFits": 2}}


def test_the_table_of_every_shared_file(shared_data):
    found = collections.defaultdict(collections.Counter)
    for path in sorted(p for p in shared_data.rglob("*") if p.is_file() and p.parent != shared_data):
        try: outcome = validate(read_spectrum(path)).reader.item()
        except SpectrumError as exc:
            assert exc.reason and exc.mend and exc.path == str(path)
            outcome = type(exc).__name__
        found[path.relative_to(shared_data).parts[0], path.name.removesuffix(".gz").rsplit(".", 1)[1]][outcome] += 1
    for key in sorted(found): print(f"{key[0]:22} {key[1]:5} {dict(found[key])}")
    assert {k: dict(v) for k, v in found.items()} == STATED and sum(sum(v.values()) for v in found.values()) == 278


@pytest.mark.parametrize("name, medium, frame, guesses", [
    ("stars_5160_5360/38Vir_HARPS_iraf.fits", "air", "rest", ("medium air", "frame rest")), ("stars_5160_5360/Procyon_HARPS_ispec.fits", "air", "topocentric", ("frame topocentric",)), ("stars_5160_5360/Gl674_FEROS.fits", "air", "topocentric", ("medium air", "frame topocentric", "CRPIX1 absent", "wavelength unit")),
    ("uves_pipeline_images/r.UVES.2011-08-11T232352.266-A01_0000.fits", "air", "topocentric", ("medium air", "frame topocentric")), ("lamost_dr1/spec-55862-B6212_sp06-008.fits.gz", "vacuum", "barycentric", ()),
    ("miles/MILES_res2.50_star_m0002V.fits", "air", "rest", ("medium air", "frame rest", "wavelength unit")), ("eso_adp_uves/ADP.2020-06-19T10_12_40.117.fits.gz", "air", "topocentric", ()), ("harps_full/HARPS.2012-04-03T09_49_36.348_s1d_A.fits", "air", "barycentric", ())])
def test_medium_frame_and_guesses_of_each_dialect(shared_data, name, medium, frame, guesses):
    ds = read_spectrum(shared_data / name)
    assert (ds.wavelength.attrs["medium"], ds.wavelength.attrs["frame"]) == (medium, frame)
    notes = [n for n in ds.guess.item().split("; ") if n]
    assert len(notes) == len(guesses) and all(any(g in n for n in notes) for g in guesses), ds.guess.item()


# ---- the quick look beside astropy

def outcome_of(path, hdus):
    try: return sf._read_with(path, hdus())
    except Unusual: return "unusual"
    except SpectrumError as exc: return type(exc).__name__, exc.reason, exc.mend


def agree(a, b):
    "Whether two readings are the same to the bit: arrays, coordinates and their types, or the refusal."
    if isinstance(a, tuple) or isinstance(b, tuple): return a == b
    same = lambda x, y: type(x) is type(y) and (x == y or x != x and y != y)
    return (all(np.array_equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in ("wavelength", "flux", "ivar")) and list(a.coords) == list(b.coords)
            and all(same(a.coords[k], b.coords[k]) for k in a.coords) and (a.medium, a.frame, a.attrs) == (b.medium, b.frame, b.attrs))


def test_quick_look_gives_what_astropy_gives_on_every_real_file(shared_data):
    n = 0
    for path in sorted(shared_data.rglob("*.fits*")):
        content = load_bytes(path)
        quick = outcome_of(path, lambda: scan_fits(path, content))
        assert quick != "unusual", f"{path.name}: the quick look declines"
        assert agree(quick, outcome_of(path, lambda: parse_fits(path, content))), path.name
        n += 1
    assert n == 261


def test_quick_look_agrees_or_declines_on_damaged_headers(shared_data, table_bytes, image_bytes, rng):
    files = [("t.fits", table_bytes), ("x_s1d_A.fits", image_bytes)] + [(p.name, load_bytes(p)) for f, k in (("harps_timeseries/HD128621", 5), ("stars_5160_5360", 16), ("lamost_dr1", 2), ("miles", 1)) for p in sorted((shared_data / f).iterdir())[:k]]
    seen = collections.Counter()
    for _ in range(1000):
        name, content = files[rng.integers(len(files))]
        damaged, end = bytearray(content), content.find(b"END" + b" " * 77)
        for _ in range(rng.integers(1, 5)):
            at, kind = rng.integers(end), rng.integers(3)
            if kind == 0: damaged[at] = rng.integers(256)
            if kind == 1: damaged[at] = rng.choice(list(b" 0123456789.+-'/=ETFD"))
            if kind == 2: damaged[at // 80 * 80:at // 80 * 80 + 80] = damaged[(other := rng.integers(end)) // 80 * 80:other // 80 * 80 + 80]
        content = bytes(damaged[:rng.integers(len(damaged))] if rng.random() < .1 else damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quick, full = outcome_of(name, lambda: scan_fits(name, content)), outcome_of(name, lambda: parse_fits(name, content))
        if quick == "unusual": seen["declined"] += 1; continue
        assert agree(quick, full), (name, quick if isinstance(quick, tuple) else "read", full if isinstance(full, tuple) else "read")
        seen["refused" if isinstance(quick, tuple) else "read"] += 1
    assert seen["read"] > 200 and seen["declined"] > 200, seen


@pytest.mark.parametrize("cards, name", [({"LONGTEXT": "x" * 100}, "CONTINUE"), ({"BSCALE": 2.}, "scaled")])
def test_what_only_astropy_can_judge_still_reads(tmp_path, rng, cards, name):
    flux = rng.normal(100, 2, 300)
    fits.writeto(tmp_path / "u.fits", flux, fits.Header({"CRVAL1": 5000., "CDELT1": .5, "CRPIX1": 1., "CUNIT1": "Angstrom"} | {k: v for k, v in cards.items() if k != "BSCALE"}))
    if "BSCALE" in cards: fits.writeto(tmp_path / "u.fits", np.round(flux).astype("i4"), fits.Header({"CRVAL1": 5000., "CDELT1": .5, "CRPIX1": 1., "CUNIT1": "Angstrom"}), overwrite=True)
    with pytest.raises(Unusual): scan_fits("u.fits", (tmp_path / "u.fits").read_bytes())
    np.testing.assert_allclose(read_spectrum(tmp_path / "u.fits").flux[0], flux, atol=.51 if "BSCALE" in cards else 1e-4)


@pytest.mark.parametrize("kind", ["<f4", "<f8"])
@pytest.mark.parametrize("quality", [False, True])
def test_the_short_way_over_the_pixels_gives_the_bits_of_the_long_one(rng, kind, quality):
    flux, error = rng.normal(100, 2, 5000), rng.uniform(1, 3, 5000)
    flux[:9], error[10:19] = [0, np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-45, -5, 3e37], [0, -1, np.nan, np.inf, 1e-19, 2e-18, 1e19, 3e19, 1e30]
    flux, error, bad = flux.astype(kind), error.astype(kind), (rng.random(5000) < .1).astype("i4") if quality else None
    short = compose._usual_planes(np.arange(5000.) + 1, flux, error, None, bad)
    _, *long, origin, scale = compose._unusual_planes("x", np.arange(5000.) + 1, flux, error, None, bad)
    assert origin == "pipeline" and scale == 1 and short.dtype == np.float32
    for a, b in zip(short, long): np.testing.assert_array_equal(a, b)


def test_parts_are_the_dataset(shared_data):
    for path in sorted((shared_data / "stars_5160_5360").iterdir()):
        parts, attrs = read_parts(path, frame="rest")
        ds = read_spectrum(path, frame="rest")
        for name in ("flux", "ivar"): np.testing.assert_array_equal(getattr(parts, name), ds[name].values[0])
        for name, value in parts.coords.items():
            np.testing.assert_equal(ds[name].item(), value)
            assert dict(ds[name].attrs) == attrs.get(name, {})
        assert parts.frame == "rest" and set(parts.coords) == {n for n, c in ds.coords.items() if c.dims == ("spectrum",)}
