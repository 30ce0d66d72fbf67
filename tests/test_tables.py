"""Spectra in plain tables: dialects, faults, fuzzing; the way to and from specutils where it is installed."""
import collections
import gzip
import warnings

import numpy as np
import pytest
from astropy import units as u
from astropy.table import Table

from specnb.fits import BadWavelength, MissingField, NotFits, NoUsablePixels, SpectrumError, UnknownLayout, read_spectrum
from specnb.ingest import ingest
from specnb.spectra import make_spectra, validate
from specnb.tables import from_specutils, table_kind, to_specutils

WAVE = np.arange(5000, 5020, .05)
FLUX = np.random.default_rng(0).normal(100, 2, WAVE.size)


def table(**units):
    out = Table({"wavelength": WAVE, "flux": FLUX, "err": np.full(WAVE.size, 2.)})
    for name, unit in units.items(): out[name].unit = unit
    return out


def as_csv(sep=",", head="wave,flux,err", comments="", number="%.10g"):
    rows = "\n".join(sep.join(number % v for v in row) for row in zip(WAVE, FLUX, np.full(WAVE.size, 2.)))
    return (comments + (head.replace(",", sep) + "\n" if head else "") + rows + "\n").encode()


def same(ds, medium="air", origin="pipeline"):
    validate(ds)
    np.testing.assert_allclose(ds.wavelength, WAVE, rtol=1e-8)
    np.testing.assert_allclose(ds.flux[0], FLUX, rtol=1e-6)
    assert ds.reader.item() == "plain-table" and ds.wavelength.attrs["medium"] == medium and ds.ivar.attrs["origin"] == origin
    if origin == "pipeline": assert float(ds.ivar.min()) == .25
    return ds


# ---- dialects

@pytest.mark.parametrize("sep", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.dat", "a.tsv", "a.csv.gz"])
def test_separators_and_names(sep, name):
    content = as_csv(sep)
    same(read_spectrum(name, content=gzip.compress(content) if name.endswith("gz") else content))


@pytest.mark.parametrize("head, comments, cards", [
    ("wave,flux,err", "# OBJECT = HD 7\n# airmass: 1.25\n# MJD-OBS = 55000.5\n", dict(object="HD 7", airmass=1.25, mjd_obs=55000.5)), ("", "# wave,flux,err\n", {}), ("", "# made by me, in 2012\n#\n# wave,flux,err\n", {}),
    ("Wavelength (Angstrom),Flux (counts),Error", "", dict(flux_unit="counts")), ("LAMBDA[AA],INTENSITY,SIGMA", "% a comment\n", {}), ("wave_air,flux,err", "", {})])
def test_heads_and_comments(head, comments, cards):
    ds = same(read_spectrum("a.csv", content=as_csv(head=head, comments=comments)))
    for name, value in cards.items(): assert ds[name].item() == value
    assert ("medium" in ds.guess.item()) == (head != "wave_air,flux,err")


@pytest.mark.parametrize("unit, factor", [("nm", .1), ("Angstrom", 1), ("um", 1e-4)])
def test_units_are_carried_and_without_them_guessed_aloud(unit, factor):
    rows = "\n".join(f"{w*factor:.9g},{f:.9g}" for w, f in zip(WAVE, FLUX))
    said = same(read_spectrum("a.csv", content=f"wave [{unit}],flux\n{rows}".encode()), origin="estimated")
    silent = same(read_spectrum("a.csv", content=f"wave,flux\n{rows}".encode()), origin="estimated")
    assert "unit" not in said.guess.item() and f"wavelength unit taken as {unit}" in silent.guess.item()


@pytest.mark.parametrize("ending, format", [("ecsv", "ascii.ecsv"), ("vot", "votable"), ("xml", "votable")])
def test_tables_with_units_and_metadata(tmp_path, ending, format):
    t = table(wavelength="nm", flux="Jy", err="Jy")
    t["wavelength"] = t["wavelength"] / 10
    t["wavelength"].unit = "nm"
    t.meta.update({"OBJECT": "AB Dor", "SPECSYS": "BARYCENT", "AIRORVAC": "vac"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.write(tmp_path / f"a.{ending}", format=format)
    ds = same(read_spectrum(tmp_path / f"a.{ending}"), medium="vacuum" if ending == "ecsv" else "air")
    assert ds.flux_unit.item() == "Jy" and ds.spectrum_id.item() == "a"
    if ending == "ecsv": assert ds.object.item() == "AB Dor" and ds.wavelength.attrs["frame"] == "barycentric" and ds.guess.item() == ""


def test_masked_cells_and_bad_errors_have_no_weight(tmp_path):
    t = Table(table(), masked=True)
    t["flux"].mask[:5], t["err"].mask[10:12], t["err"][20] = True, True, -1
    t.write(tmp_path / "m.ecsv")
    ds = read_spectrum(tmp_path / "m.ecsv")
    assert np.flatnonzero(ds.ivar.values[0] == 0).tolist() == [0, 1, 2, 3, 4, 10, 11, 20]
    rows = as_csv().decode().splitlines()
    rows[4] = rows[4].split(",")[0] + ",,2"
    assert np.flatnonzero(read_spectrum("m.csv", content="\n".join(rows).encode()).ivar.values[0] == 0).tolist() == [3]


def test_log_wavelengths_and_one_row_of_arrays(tmp_path):
    Table({"loglam": np.log10(WAVE), "flux": FLUX, "ivar": np.full(WAVE.size, .25)}).write(tmp_path / "l.ecsv")
    same(read_spectrum(tmp_path / "l.ecsv"))
    Table({"wave": [WAVE], "flux": [FLUX], "err": [np.full(WAVE.size, 2.)]}).write(tmp_path / "r.ecsv")
    same(read_spectrum(tmp_path / "r.ecsv"))
    Table({"wave": [WAVE, WAVE], "flux": [FLUX, FLUX]}).write(tmp_path / "two.ecsv")
    with pytest.raises(UnknownLayout, match="holds 2 spectra"): read_spectrum(tmp_path / "two.ecsv")


def test_ingest_takes_plain_tables_when_pointed_at(tmp_path):
    (tmp_path / "a.csv").write_bytes(as_csv())
    Table({"wave": WAVE, "flux": FLUX * 2}).write(tmp_path / "b.ecsv")
    (tmp_path / "labels.csv").write_text("star,teff\nHD 1,5000\n")
    report = ingest([tmp_path / "*.csv", tmp_path / "*.ecsv"], tmp_path / "t.zarr", progress=False)
    assert report.n_rows == 2 and report.refused.error.tolist() == ["MissingField"] and "teff" in report.refused.reason[0]


# ---- faults

@pytest.mark.parametrize("name, content, error, words", [
    ("a.csv", b"<html>log in</html>", NotFits, "not a FITS file"), ("a.csv", b"wave,mag\n1,2\n", MissingField, "no flux column .found: wave, mag"), ("a.csv", b"wave,flux\n", NoUsablePixels, "no rows"),
    ("a.csv", b"wave,flux\n5000,1\n5001", UnknownLayout, "row 2 .* 1 cells"), ("a.dat", b"1 2 3 4\n1 2 3 4\n", MissingField, "found: column"), ("a.csv", b"wave,flux\n5001,1\n5000,1\n5002,2\n", BadWavelength, "does not increase"),
    ("a.ecsv", b"# %ECSV 1.0\n# ---\nbroken", UnknownLayout, "cannot be parsed as ecsv"), ("a.vot", b"<?xml version='1.0'?><VOTABLE><RES", UnknownLayout, "cannot be parsed as votable"), ("a.csv", b"wave [keV],flux\n1,1\n2,1\n3,1\n", BadWavelength, "keV"),
    ("a.csv", b"wave,flux\n5000,0\n5001,0\n5002,nan\n", NoUsablePixels, "none of 3")])
def test_faults_are_named(name, content, error, words):
    with pytest.raises(error, match=words) as caught: read_spectrum(name, content=content)
    assert caught.value.mend and caught.value.path == name


def test_damaged_tables_never_escape_as_other_exceptions(tmp_path, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table().write(tmp_path / "a.vot", format="votable")
    table().write(tmp_path / "a.ecsv")
    sources = {"a.vot": (tmp_path / "a.vot").read_bytes(), "a.ecsv": (tmp_path / "a.ecsv").read_bytes(), "a.csv": as_csv(), "a.txt": as_csv(" ", head="")}
    outcomes = collections.Counter()
    for k in range(240):
        name = list(sources)[k % 4]
        content = bytearray(sources[name])
        for _ in range(rng.integers(0, 3)): content[rng.integers(min(len(content), 3000))] = rng.integers(256)
        if k % 3 == 0: content = content[:rng.integers(1, len(content))]
        try: outcomes["read"] += validate(read_spectrum(name, content=bytes(content))).sizes["spectrum"]
        except SpectrumError as exc: outcomes[type(exc).__name__] += bool(exc.reason)
    assert sum(outcomes.values()) == 240 and outcomes["read"] > 20 and len(outcomes) >= 4


def test_real_label_tables_are_no_spectra(shared_data):
    for path in sorted((shared_data / "labels").glob("*.csv*")):
        with pytest.raises(SpectrumError) as caught: read_spectrum(path)
        assert type(caught.value) in (MissingField, UnknownLayout), path.name


def test_real_masks_and_line_lists_are_no_spectra(shared_data):
    seen = collections.Counter()
    for path in sorted((shared_data / "reference").iterdir()):
        try: read_spectrum(path)
        except SpectrumError as exc: seen[type(exc).__name__] += 1
        else: seen[f"read {path.name}"] += 1
    assert not [k for k in seen if k.startswith("read") and "atlas" not in k], seen


# ---- specutils

def spectra(n=1):
    rng = np.random.default_rng(1)
    ivar = np.full((n, 300), .25)
    ivar[:, 40:50] = 0
    return make_spectra(rng.normal(100, 2, (n, 300)), ivar, np.linspace(5000, 5100, 300), [f"s{i}" for i in range(n)], medium="vacuum", frame="barycentric",
                        coords=dict(object=["HD 7"] * n, mjd_obs=np.arange(n) + 55000.5, flux_unit=["Jy"] * n, guess=[""] * n))


@pytest.fixture
def specutils():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("specutils", reason="specutils is an optional companion (pip install specutils) and is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [1, 3])
def test_there_and_back(specutils, n):
    ds = spectra(n)
    spectrum = to_specutils(ds)
    assert type(spectrum).__module__.startswith("specutils") and spectrum.flux.unit == u.Jy and spectrum.spectral_axis.unit == u.AA and spectrum.meta["medium"] == "vacuum"
    assert (spectrum.mask == (ds.ivar.values.squeeze() <= 0)).all()
    back = from_specutils(spectrum)
    for name in ("flux", "ivar", "wavelength"): np.testing.assert_allclose(back[name].values, ds[name].values, rtol=1e-6)
    assert back.wavelength.attrs == ds.wavelength.attrs and back.spectrum_id.values.tolist() == ds.spectrum_id.values.tolist() and back.object.values.tolist() == ["HD 7"] * n
    np.testing.assert_array_equal(back.mjd_obs, ds.mjd_obs)


@pytest.mark.filterwarnings("ignore")
def test_its_own_arithmetic_works_on_ours(specutils):
    spectrum = to_specutils(spectra())
    np.testing.assert_allclose(from_specutils(spectrum * 2).flux, spectra().flux * 2, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", ["nm", "GHz", "eV"])
def test_axes_of_other_kinds_come_back_in_order(specutils, unit):
    from astropy.nddata import StdDevUncertainty
    kind = getattr(specutils, "Spectrum", None) or specutils.Spectrum1D
    axis = (WAVE * u.AA).to(unit, u.spectral())
    ds = from_specutils(kind(flux=FLUX * u.ct, spectral_axis=axis, uncertainty=StdDevUncertainty(np.full(WAVE.size, 2.))), "mine")
    np.testing.assert_allclose(ds.wavelength, WAVE, rtol=1e-9)
    np.testing.assert_allclose(ds.flux[0], FLUX, rtol=1e-6)
    assert float(ds.ivar.min()) == .25 and "medium air" in ds.guess.item() and ds.spectrum_id.item() == "mine"


def test_a_stand_in_without_uncertainty_and_a_wrong_axis():
    from types import SimpleNamespace
    plain = SimpleNamespace(spectral_axis=WAVE * u.AA, flux=FLUX * u.ct, uncertainty=None, mask=None, meta=None)
    ds = from_specutils(plain, medium="vacuum", frame="rest")
    assert ds.ivar.attrs["origin"] == "estimated" and ds.guess.item() == "" and ds.wavelength.attrs["medium"] == "vacuum"
    with pytest.raises(BadWavelength, match="km / s"): from_specutils(SimpleNamespace(spectral_axis=WAVE * u.km / u.s, flux=FLUX * u.ct, uncertainty=None, mask=None, meta={}))


def test_kinds():
    assert [table_kind(n, c) for n, c in (("a.csv", b""), ("a.csv", b"  <x>"), ("A.CSV.GZ", b"1,2"), ("a.npz", b"PK"), ("a", b"<?xml?><VOTABLE"))] == ["", "", "text", "", "votable"]
