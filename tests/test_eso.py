"""ESO products: header to coordinates on the real files, against the label tables; writers read back by ourselves and by others."""
import gzip
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

from specnb.eso import companion_velocity, doubt, eso_identifier, exposure_of, read_ccf, write_adp, write_s1d
from specnb.fits import MissingField, NotASpectrum, read_spectrum
from specnb.ingest import ingest
from specnb.spectra import make_spectra

NUMBERS = ("mjd_obs", "exptime", "airmass", "berv", "snr", "ra", "dec", "seeing", "humidity")


def spectrum(rng, n=600, step=.02, medium="air", frame="barycentric", **coords):
    wave = 5000 + step * np.arange(n)
    flux, ivar = rng.normal(100, 2, (1, n)), rng.uniform(.2, .3, (1, n))
    ivar[:, rng.integers(0, n, n // 10)] = 0
    return make_spectra(flux, ivar, wave, ["id-1"], medium=medium, frame=frame, coords={k: [v] for k, v in coords.items()})


# ---- real headers

def test_coordinates_agree_with_the_label_table(shared_data):
    labels = pd.read_csv(shared_data / "labels" / "harps_timeseries_labels.csv").set_index("file")
    labels = labels[~labels.index.str.contains("skyfibre")]
    assert len(labels) == 177
    for file, row in labels.iterrows():
        ds = read_spectrum(shared_data / file)
        assert ds.spectrum_id.item() == row.dp and ds.object.item() == row.object
        for name in ("mjd_obs", "exptime", "berv", "airmass"): np.testing.assert_allclose(ds[name].item(), row[name], atol=6e-4, err_msg=f"{file} {name}")


def test_crop_and_full_spectrum_are_one_exposure_and_equal(shared_data):
    full = read_spectrum(next((shared_data / "harps_full").glob("*2012-04-03*s1d_A.fits")))
    crop = read_spectrum(next((shared_data / "harps_timeseries").rglob("*2012-04-03T09_49_36.348_s1d_A_6275.fits")))
    assert full.exposure.item() == crop.exposure.item() == full.spectrum_id.item() == "HARPS.2012-04-03T09:49:36.348"
    same = full.sel(wavelength=crop.wavelength, method="nearest", tolerance=1e-4)
    np.testing.assert_array_equal(same.flux, crop.flux)


def test_table_and_image_of_one_exposure_agree(shared_data):
    table = read_spectrum(shared_data / "derived_harps_adp" / "ADP-like_Gl581_5160_5360.fits")
    image = read_spectrum(shared_data / "stars_5160_5360" / "Gl581_HARPS.fits")
    assert table.exposure.item() == image.exposure.item() != ""
    np.testing.assert_array_equal(table.flux[0], image.flux[0, :20000])
    assert table.wavelength.attrs == image.wavelength.attrs


def test_failed_extraction_is_read_and_flagged_and_only_that(shared_data):
    flags = {p.name: read_spectrum(p).flag.item() for p in sorted((shared_data / "eso_adp_uves").glob("ADP*"))}
    bad = {name: flag for name, flag in flags.items() if flag}
    assert list(bad) == ["ADP.2020-06-10T18_32_10.652_crop_gap.fits"]
    assert "saturated" in bad[next(iter(bad))] and "below -5 sigma" in bad[next(iter(bad))]


def test_uves_details(shared_data):
    folder = shared_data / "eso_adp_uves"
    blue, red = (read_spectrum(folder / f"ADP.2020-06-19T10_12_40.{k}.fits.gz") for k in ("117", "152"))
    assert blue.spectrum_id.item() == "ADP.2020-06-19T10:12:40.117" and blue.object.item() == "ABDor" and blue.instrument.item() == "UVES"
    assert blue.flux_unit.item().startswith("10**(-16)erg") and blue.wavelength.attrs["frame"] == "topocentric" and blue.program.item() == "085.B-0847(A)"
    assert blue.exposure.item() != red.exposure.item() and np.diff(red.wavelength).max() > 70
    only_reduced = read_spectrum(folder / "ADP.2020-06-19T11_45_57.092_crop.fits")
    assert only_reduced.flux_unit.item() == "adu" and only_reduced.exposure.item() == "" and only_reduced.ivar.attrs["origin"] == "pipeline"


def test_pipeline_image_takes_the_target_for_the_object(shared_data):
    for path in (shared_data / "uves_pipeline_images").glob("*.fits"):
        ds = read_spectrum(path)
        assert ds.object.item() == "MN-Lup" and "medium air" in ds.guess.item() and "frame topocentric" in ds.guess.item()


def test_sky_fibre_is_flagged_and_has_a_name_of_its_own(shared_data):
    for path in (shared_data / "harps_timeseries" / "skyfibre").glob("*.fits"):
        ds = read_spectrum(path)
        assert ds.flag.item() == "fibre B: SKY" and ds.spectrum_id.item().endswith("_B")


def test_colon_names_read_the_same(shared_data, tmp_path):
    path = next((shared_data / "harps_timeseries" / "HD189733").glob("*.fits"))
    try: other = shutil.copy(path, tmp_path / path.name.replace("_", ":", 2))
    except OSError: pytest.skip("this file system allows no colons")
    assert read_spectrum(other).spectrum_id.item() == read_spectrum(path).spectrum_id.item()


def test_snr_of_the_orders_tracks_the_estimated_noise(shared_data):
    "The DRS gives the ratio of an extracted pixel of an order's centre; the estimate per s1d pixel stays within a factor of two of it."
    for path in sorted((shared_data / "harps_full").glob("*s1d*")):
        ds = read_spectrum(path).squeeze()
        estimate = float((ds.flux * np.sqrt(ds.ivar)).where(ds.ivar > 0).median())
        assert .5 < estimate / ds.snr.item() < 2


# ---- names

@pytest.mark.parametrize("name, cards, expected", [
    ("ADP.2020-06-19T10:12:40.117.fits", dict(ARCFILE="ADP.2020-06-19T10:12:40.117.fits"), "ADP.2020-06-19T10:12:40.117"),
    ("renamed.fits.gz", dict(INSTRUME="HARPS", DATE_OBS="2010-09-18T23:42:36.178"), "HARPS.2010-09-18T23:42:36.178"),
    ("sum.fits", dict(INSTRUME="HARPS", DATE_OBS="2010-09-18T23:42:36.178", NCOMBINE=3), "sum"),
    ("HARPS.2010-09-18T23_42_36.178_s1d_B.fits", {}, "HARPS.2010-09-18T23:42:36.178_B"), ("plain.fits", {}, "plain")])
def test_identifiers(name, cards, expected):
    assert eso_identifier(name, [fits.Header({k.replace("_", "-"): v for k, v in cards.items()})]) == expected


def test_stacks_have_no_exposure():
    header = fits.Header({"PROV1": "UVES.2009-11-26T02:40:23.581.fits", "NCOMBINE": 10})
    assert exposure_of("ADP.2020-06-19T11:45:57.092.fits", [header]) == ""


# ---- writers

@pytest.mark.parametrize("medium", ["air", "vacuum"])
@pytest.mark.parametrize("frame", ["barycentric", "topocentric", "rest"])
@pytest.mark.parametrize("write", [write_adp, write_s1d])
def test_round_trip(tmp_path, rng, write, medium, frame):
    values = dict(zip(NUMBERS, rng.uniform(1, 50, len(NUMBERS)))) | dict(object="AB Dor", instrument="UVES", program="085.B-0847(A)")
    values["mjd_obs"] += 55000
    for missing in ("none", "snr", "berv", "mjd_obs", "object"):
        known = {k: v for k, v in values.items() if k != missing}
        if missing == "mjd_obs": known["mjd_obs"] = np.nan
        ds = spectrum(rng, medium=medium, frame=frame, **known)
        back = read_spectrum(write(ds, tmp_path / "x.fits", overwrite=True))
        usable = ds.ivar.values > 0
        np.testing.assert_array_equal(back.flux.values[usable], ds.flux.values[usable])
        np.testing.assert_array_equal(back.ivar.values > 0, usable)
        np.testing.assert_allclose(back.wavelength, ds.wavelength, rtol=1e-12)
        assert back.wavelength.attrs == ds.wavelength.attrs and back.guess.item() == "" and back.spectrum_id.item() == "id-1"
        for name, value in known.items():
            if isinstance(value, str): assert back[name].item() == value
            else: np.testing.assert_allclose(back[name].item(), value, rtol=1e-12, err_msg=name)
        if missing in NUMBERS: assert np.isnan(back[missing].item())
        if write is write_adp: np.testing.assert_allclose(back.ivar, ds.ivar, rtol=1e-5)


def test_estimated_ivar_is_not_written_as_measured(tmp_path, rng):
    ds = make_spectra(rng.normal(100, 2, (1, 900)), None, 5000 + .02 * np.arange(900), ["a"], medium="air", frame="barycentric")
    path = write_adp(ds, tmp_path / "e.fits")
    assert np.isnan(fits.getdata(path, 1)["ERR"]).all() and read_spectrum(path).ivar.attrs["origin"] == "estimated"


@pytest.mark.parametrize("write", [write_adp, write_s1d])
def test_written_files_obey_the_standard(tmp_path, rng, write):
    path = write(spectrum(rng, object="x", mjd_obs=55000.5, airmass=1.2), tmp_path / "v.fits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(path, checksum=write is write_adp) as hdus: hdus.verify("exception")
    with pytest.raises(OSError): write(spectrum(rng), path)


def test_other_programs_read_them(tmp_path, rng):
    ds = spectrum(rng, object="x")
    table = Table.read(write_adp(ds, tmp_path / "a.fits"), hdu=1)
    np.testing.assert_array_equal(table["WAVE"][0], ds.wavelength)
    assert table["WAVE"].unit == "angstrom" and (table["QUAL"][0] == (ds.ivar.values[0] <= 0)).all()
    path = write_s1d(ds, tmp_path / "s_s1d_A.fits")
    world = WCS(fits.getheader(path)).all_pix2world(np.arange(600)[:, None], 0)[:, 0]
    np.testing.assert_allclose(world, ds.wavelength, rtol=1e-10)
    assert fits.getdata(path).dtype == np.dtype(">f4")


def test_specutils_reads_the_image(tmp_path, rng):
    specutils = pytest.importorskip("specutils")
    path = write_s1d(spectrum(rng), tmp_path / "s_s1d_A.fits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = getattr(specutils, "Spectrum", getattr(specutils, "Spectrum1D", None)).read(str(path), format="wcs1d-fits")
    np.testing.assert_allclose(read.spectral_axis.value, 5000 + .02 * np.arange(600))


def test_writers_refuse_what_they_cannot_say(tmp_path, rng):
    from specnb.wave import log_grid
    uneven = make_spectra(np.ones((1, 300)), np.ones((1, 300)), log_grid(5000, 6000, 300), ["u"], medium="air", frame="rest")
    with pytest.raises(ValueError, match="even wavelength grid.*write_adp"): write_s1d(uneven, tmp_path / "u.fits")
    two = make_spectra(np.ones((2, 300)), np.ones((2, 300)), log_grid(5000, 6000, 300), ["u", "v"], medium="air", frame="rest")
    with pytest.raises(ValueError, match="not 2"): write_adp(two, tmp_path / "u.fits")
    assert write_adp(two.isel(spectrum=1), tmp_path / "u.fits").exists()


def test_gzipped_and_survey_rows(tmp_path, survey):
    row = survey.isel(spectrum=[5])
    path = write_adp(row, tmp_path / "s.fits")
    (tmp_path / "s.fits.gz").write_bytes(gzip.compress(path.read_bytes()))
    back = read_spectrum(tmp_path / "s.fits.gz")
    assert back.spectrum_id.item() == row.spectrum_id.item() and back.object.item() == row.object.item()
    np.testing.assert_array_equal(back.flux, row.flux)


@pytest.mark.parametrize("kind, cards, shape, words", [("ccf", {"CTYPE1": "km/s"}, (73, 161), "CCF"), ("bis", {"CTYPE1": "%", "HIERARCH ESO DRS BIS RV": 1.}, (91,), "BIS"), ("e2ds", {}, (72, 400), "E2DS")])
def test_drs_products_that_are_no_spectra(tmp_path, kind, cards, shape, words):
    header = fits.Header(cards)
    header["HIERARCH ESO DRS VERSION"] = "HARPS_3.8"
    fits.writeto(tmp_path / f"{kind}.fits", np.ones(shape, "f4"), header)
    with pytest.raises(NotASpectrum, match=words): read_spectrum(tmp_path / f"{kind}.fits")


# ---- velocities of companion files

def ccf_file(path, rv=-2.15, key="RVC", **cards):
    header = fits.Header({"CTYPE1": "km/s"})
    for name, value in {"DRS VERSION": "HARPS_3.8", f"DRS CCF {key}": rv, "DRS CCF NOISE": .0008, "DRS CCF MASK": "K5", **cards}.items(): header[f"HIERARCH ESO {name}"] = value
    fits.writeto(path, np.ones((3, 161), "f4"), header, overwrite=True)
    return path


def test_real_companion_gives_the_velocity(shared_data):
    folder = shared_data / "harps_full"
    ds = read_spectrum(folder / "HARPS.2007-08-29T00_41_30.707_s1d_A.fits.gz")
    np.testing.assert_allclose([ds.rv_ccf.item(), ds.rv_ccf_error.item()], [-2.15386561745332, 0.000787854800101463], rtol=1e-12)
    assert ds.rv_ccf_mask.item() == "K5" and ds.rv_ccf.attrs["units"] == "km/s" and list(ds.spec.labels) == ["rv_ccf"]
    for kind in ("ccf", "bis"): assert read_ccf(folder / f"HARPS.2007-08-29T00_41_30.707_{kind}_K5_A.fits.gz")["rv_ccf"] == ds.rv_ccf.item()
    assert "rv_ccf" not in read_spectrum(folder / "HARPS.2012-04-03T09_49_36.348_s1d_A.fits").coords


def test_velocity_moves_the_lines_of_the_spectrum_to_rest(shared_data):
    "The stellar lines of the real spectrum stand where its velocity and a mask of line positions say (HD 189733, in air)."
    ds = read_spectrum(shared_data / "harps_full" / "HARPS.2007-08-29T00_41_30.707_s1d_A.fits.gz").squeeze()
    mask = pd.read_csv(shared_data / "reference" / "mask_HARPS_K2.csv", comment="#")
    mask = mask[mask.lambda_air_A.between(5400, 6200)]
    centre, depth = mask.lambda_air_A.to_numpy(), mask.contrast.to_numpy()
    velocities = np.arange(-12, 8, .25)
    profile = [np.sum(depth * np.interp(centre * (1 + v / 299792.458), ds.wavelength, ds.flux / ds.flux.median())) for v in velocities]
    assert abs(velocities[np.argmin(profile)] - ds.rv_ccf.item()) <= .5


@pytest.mark.parametrize("colon", [":", "_"])
def test_companions_of_tables_and_images_and_their_ingest(tmp_path, rng, colon):
    for i, (write, name) in enumerate([(write_s1d, "HARPS.2010-09-18T23_42_3{}.178_s1d_A.fits"), (write_adp, "ADP.2014-01-01T00_00_0{}.000.fits")]):
        path = write(spectrum(rng, object="x", instrument="HARPS", mjd_obs=55000.).assign_coords(spectrum_id=("spectrum", [f"s{i}"])), tmp_path / name.format(i))
        if write is write_adp:
            with fits.open(path, mode="update") as hdus: hdus[0].header["PROV1"] = f"HARPS.2010-09-18T23:42:3{i}.178.fits"
        ccf_file(tmp_path / f"HARPS.2010-09-18T23{colon}42{colon}3{i}.178_ccf_K5_A.fits", rv=-9. + i)
    report = ingest(tmp_path / "*.fits", tmp_path / "n.zarr", progress=False)
    ds = report.open().sortby("spectrum_id")
    assert report.n_rows == 2 and set(report.refused.error) == {"NotASpectrum"}
    np.testing.assert_array_equal(ds.rv_ccf, [-9., -8.])
    assert ds.rv_ccf.attrs["role"] == "label" and ds.rv_ccf.attrs["units"] == "km/s"


def test_failed_and_broken_companions_cost_only_the_label(tmp_path, rng):
    path = write_s1d(spectrum(rng, instrument="HARPS"), tmp_path / "HARPS.2010-09-18T23_42_36.178_s1d_A.fits")
    beside = tmp_path / "HARPS.2010-09-18T23_42_36.178_ccf_K5_A.fits"
    assert "rv_ccf" not in read_spectrum(path).coords
    ccf_file(beside, rv=-99999.)
    assert np.isnan(read_ccf(beside)["rv_ccf"]) and "rv_ccf" not in read_spectrum(path).coords
    ccf_file(beside, rv=-3.5, key="RV", **{"DRS CCF NOISE": -1.})
    assert read_ccf(beside)["rv_ccf"] == -3.5 and np.isnan(read_spectrum(path).rv_ccf_error.item())
    beside.write_bytes(beside.read_bytes()[:900])
    assert "rv_ccf" not in read_spectrum(path).coords
    beside.write_text("<html>")
    with pytest.raises(MissingField, match="no ESO DRS CCF RV"): read_ccf(beside)
    assert companion_velocity(path, "") == {} and companion_velocity(tmp_path / "nowhere" / "x.fits", "HARPS.2010-09-18T23:42:36.178") == {}


def test_fibre_b_takes_the_companion_of_fibre_b(tmp_path, rng):
    path = write_s1d(spectrum(rng, instrument="HARPS"), tmp_path / "HARPS.2010-09-18T23_42_36.178_s1d_B.fits")
    ccf_file(tmp_path / "HARPS.2010-09-18T23_42_36.178_ccf_K5_A.fits", rv=5.)
    assert "rv_ccf" not in read_spectrum(path).coords
    ccf_file(tmp_path / "HARPS.2010-09-18T23_42_36.178_ccf_TH_B.fits", rv=.1)
    assert read_spectrum(path).rv_ccf.item() == .1
