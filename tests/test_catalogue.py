"""Labels of real catalogues, positions against astropy, and tables that break the usual assumptions."""
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.time import Time
from hypothesis import given, settings, strategies as st

from specnb.catalogue import (CatalogueError, clean_table, find_sentinels, join_labels, match_report, moved_direction, normalise_id, normalise_name,
                              read_table, table_positions, unmatched)


def labels_folder():
    "The folder of real label tables, looked for beside and above the checkout."
    for folder in Path(__file__).resolve().parents:
        if (found := folder / "shared" / "data" / "labels").is_dir(): return found
    pytest.skip("the shared label tables are not here")


def spectra(objects, **coords):
    "A Dataset with nothing in it but what a join needs."
    n = len(objects)
    return xr.Dataset({"flux": (("spectrum", "wavelength"), np.ones((n, 3), np.float32))},
                      coords={"spectrum_id": ("spectrum", [f"s{i}" for i in range(n)]), "object": ("spectrum", np.array(objects, dtype=str)),
                              **{k: ("spectrum", np.asarray(v)) for k, v in coords.items()}})


# real tables -----------------------------------------------------------------------------------------------------------------------------

def test_sweetcat_placeholders_and_identifiers():
    table = read_table(labels_folder() / "sweetcat.csv")
    assert len(table) == 1256
    assert table.attrs["sentinels"] == {"Mass_t": {-1.0: 8}, "Distance": {-1000.0: 4}, "gaia_dr3": {"-1": 9}}
    assert np.isnan(table.Mass_t).sum() == 8 and table.Mass_t.min() > 0
    assert (table["[Fe/H]"] < -0.5).any(), "real negative metallicities are kept"
    assert table.gaia_dr3[0] == "3946945413106333696", "an identifier keeps its last digit"
    ra, dec = table_positions(table)
    assert np.isfinite(ra).all() and (0 <= ra).all() and (ra < 360).all() and (np.abs(dec) <= 90).all()
    assert ra[0] == pytest.approx((12 + 20 / 60 + 43.02 / 3600) * 15)


def test_gbs_has_no_byte_order_mark_in_its_first_column():
    table = read_table(labels_folder() / "gaia_benchmark_stars_v3.csv")
    assert list(table.columns[:2]) == ["HIP", "HD"] and len(table) == 192
    assert table.attrs["sentinels"] == {}
    assert table.HIP[0] == "HIP101345" and table.teff[0] == 5514


def test_compressed_equivalent_widths_are_all_numbers():
    table = read_table(labels_folder() / "harps_ew_labels.csv.gz")
    assert table.shape == (433, 304)
    assert [c for c in table.columns if table[c].dtype.kind != "f"] == ["star"]
    assert table.attrs["sentinels"] == {}


def test_lamost_minus_9999_is_missing_beside_negative_values():
    table = read_table(labels_folder() / "lamost_labels.csv")
    assert table.attrs["sentinels"] == {"snrr": {-9999.0: 3}, "snri": {-9999.0: 8}, "snrz": {-9999.0: 4}}
    assert table.rv.min() < 0 and not table.rv.isna().any()


@pytest.mark.parametrize("name, column", [("sweetcat.csv", "Name"), ("miles_labels.csv", "name"), ("harps_gto_parameters.csv", "star"), ("gaia_benchmark_stars_v3.csv", "HD")])
def test_no_two_stars_of_a_catalogue_become_one(name, column):
    table = read_table(labels_folder() / name)
    keys = table[column].map(normalise_name)
    assert (keys == "").sum() == (table[column] == "").sum() < len(table) / 20
    keys = keys[keys != ""]
    assert not keys.duplicated().any(), sorted(keys[keys.duplicated()])


def test_sweetcat_and_gto_agree_on_the_stars_that_both_have():
    gto, sweet = (read_table(labels_folder() / f) for f in ("harps_gto_parameters.csv", "sweetcat.csv"))
    ds = join_labels(spectra(list(gto.star)), sweet, on="object", columns={"Teff": "teff", "[Fe/H]": "feh"}, units={"Teff": "K"})
    both = np.isfinite(ds.teff.values)
    assert both.sum() >= 5, "the two samples overlap"
    assert np.median(np.abs(ds.teff.values[both] - gto.teff.values[both])) < 60
    assert np.median(np.abs(ds.feh.values[both] - gto.feh.values[both])) < 0.05
    report = match_report(spectra(list(gto.star)), sweet)
    assert len(unmatched(report)) == (~both).sum() and ds.teff.attrs["units"] == "K"


def test_name_and_position_give_the_same_labels():
    sweet = read_table(labels_folder() / "sweetcat.csv")
    rows = sweet.iloc[::25].reset_index(drop=True)
    ra, dec = table_positions(sweet)
    ds = spectra([n.replace(" ", "-").lower() for n in rows.Name], ra=ra[::25], dec=dec[::25], mjd_obs=np.full(len(rows), 51544.5))
    by_name = join_labels(ds, sweet, on="object", columns={"Teff": "teff"})
    by_place = join_labels(ds, sweet, on="position", columns={"Teff": "teff"}, radius=3.0)
    assert np.array_equal(by_name.teff.values, rows.Teff.values)
    assert np.array_equal(by_place.teff.values, rows.Teff.values)


def test_timeseries_labels_join_by_file_name():
    labels = read_table(labels_folder() / "harps_timeseries_labels.csv")
    ds = spectra(list(labels.object), source_file=[Path(f).name.replace("_", ":", 2) + ".gz" for f in labels.file])
    out = join_labels(ds.isel(spectrum=slice(None, None, -1)), labels, on="source_file", table_key="file", columns={"airmass": "label_airmass", "seeing": "seeing"})
    assert np.array_equal(out.label_airmass.values[::-1], labels.airmass.values)
    assert np.isnan(out.seeing.values).sum() == 153


# formats -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::astropy.units.UnitsWarning")
@pytest.mark.parametrize("ending, format", [("csv", "ascii.csv"), ("tsv", "ascii.tab"), ("ecsv", "ascii.ecsv"), ("vot", "votable"), ("fits", "fits"), ("txt", "ascii.fixed_width_two_line"), ("mrt", "ascii.mrt")])
def test_every_format_gives_the_same_table(tmp_path, ending, format):
    table = Table({"star": ["HD 1", "HD 20", "HD 300"], "teff": [5777.5, 99999.0, 4300.25] * u.K, "feh": [-1.0, 0.5, 0.25]})
    path = tmp_path / f"stars.{ending}"
    table.write(path, format=format)
    frame = read_table(path)
    assert list(frame.star) == ["HD 1", "HD 20", "HD 300"]
    np.testing.assert_array_equal(frame.teff, [5777.5, np.nan, 4300.25])
    np.testing.assert_array_equal(frame.feh, [-1.0, 0.5, 0.25])


def test_masked_bytes_time_sky_and_array_columns(tmp_path):
    table = Table({"star": np.array([b"HD 1", b"HD 2"]), "obs": Time([53000.5, 56000.25], format="mjd"), "place": SkyCoord([10.0, 20.0] * u.deg, [-5.0, 5.0] * u.deg), "many": np.ones((2, 3))})
    table["mass"] = np.ma.masked_array([1.0, 2.0], [False, True])
    frame = clean_table(table, source="made")
    assert list(frame.star) == ["HD 1", "HD 2"]
    np.testing.assert_array_equal(frame.obs, [53000.5, 56000.25])
    np.testing.assert_array_equal(frame.mass, [1.0, np.nan])
    np.testing.assert_allclose(frame["place.dec"], [-5, 5])
    assert frame.attrs["left_out"] == ["many"]


@pytest.mark.parametrize("content, complaint", [(b"", "the file is empty"), (b"a,b\n", "no rows"), (b"a,a\n1,2\n", "occur twice"), (b"\xff\xfe\x00b,1\n1,2\n", "cannot be read"),
                                                (b"a,b\n1,2,3,4\n5\n1,2,3\n", "cannot be read")])
def test_broken_tables_name_the_file(tmp_path, content, complaint):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(CatalogueError, match=f"labels.csv.*{complaint}"): read_table(path)


@pytest.mark.parametrize("name, content", [("a.fits", b"SIMPLE  =                    T"), ("a.vot", b"<html>login</html>"), ("a.ecsv", b"# %ECSV 1.0\n# ---\n# broken"), ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:15]), ("a.npz", b"PK")])
def test_broken_binaries_name_the_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CatalogueError, match=name): read_table(path)


# placeholders --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, values, missing", [
    ("mass", [1.0, -1.0, 0.3], [-1.0]), ("feh", [0.1, -1.0, 0.3], []), ("[M/H]", [0.1, -1.0], []), ("x", [-0.5, -1.0, 0.3], []), ("rv", [5.0, -1.0], []),
    ("teff", [5777.0, 99999.0], [99999.0]), ("hip", [99999.0, 100001.0, 5.0], []), ("mag", [12.1, 99.99, 13.0], [99.99]), ("rv", [-40.0, 999.0, 30.0], [999.0]), ("rv", [-400.0, 999.0, 800.0], []),
    ("vsini", [2.0, -99.0], [-99.0]), ("bv", [], []), ("n", [np.nan, np.nan], []), ("hd", [1.0, 999.0, 350000.0], []), ("v", [-9999.0, -9999.0], [-9999.0])])
def test_placeholders_by_company(name, values, missing):
    assert sorted(find_sentinels(np.array(values), name)) == sorted(missing)


def test_single_precision_placeholder():
    assert list(find_sentinels(np.array([12.5, 99.99, 13.0], np.float32), "mag")) == [pytest.approx(99.99, rel=1e-6)]


# names ----------------------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_any_text_has_a_stable_key(text):
    key = normalise_name(text)
    assert normalise_name(key) == key and key == key.upper()
    normalise_id(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(["HD", "HIP", "GJ", "Gl", "WASP-", "TOI-", "HR"]), st.integers(1, 999999), st.sampled_from(["", "A", "B"]), st.sampled_from([" ", "", "-", "_", "  "]))
def test_separators_capitals_and_zeros_do_not_count(catalogue, number, component, separator):
    plain = normalise_name(f"{catalogue}{number}{component}")
    assert normalise_name(f" {catalogue.lower()}{separator}{number:06d}{separator}{component}") == plain


@pytest.mark.parametrize("left, right", [("BD+05 4868", "BD-05 4868"), ("16 Cyg A", "16 Cyg B"), ("GJ 86", "GJ 86B"), ("HD 12", "HD 1 2"), ("J0523-1403", "J0523+1403"), ("alf Cen", "alf CrA"), ("HIP 100", "HR 100")])
def test_different_stars_stay_different(left, right):
    assert normalise_name(left) != normalise_name(right)


# positions -------------------------------------------------------------------------------------------------------------------------------------

def test_motion_against_astropy_for_many_stars():
    rng = np.random.default_rng(3)
    ra, dec = rng.uniform(0, 360, 50), np.degrees(np.arcsin(rng.uniform(-0.999, 0.999, 50)))
    pm = rng.normal(0, 1500, (2, 50))
    years = rng.uniform(-20, 25, 50)
    ours = moved_direction(ra, dec, pm[0], pm[1], years)
    start = SkyCoord(ra * u.deg, dec * u.deg, pm_ra_cosdec=pm[0] * u.mas / u.yr, pm_dec=pm[1] * u.mas / u.yr, distance=np.full(50, 100.0) * u.pc, radial_velocity=np.zeros(50) * u.km / u.s, obstime=Time(2000.0, format="jyear"))
    theirs = start.apply_space_motion(new_obstime=Time(2000.0 + years, format="jyear")).cartesian.xyz
    theirs = (theirs / np.linalg.norm(theirs, axis=0)).value.T
    assert np.degrees(np.linalg.norm(ours - theirs, axis=1)).max() * 3600 < 0.01


def test_match_by_position_equals_astropy_search():
    rng = np.random.default_rng(5)
    stars = pd.DataFrame({"ra": rng.uniform(0, 1, 400) % 360, "dec": rng.uniform(-0.5, 0.5, 400), "teff": rng.uniform(4000, 7000, 400)})
    pick = rng.integers(0, 400, 300)
    ds = spectra(["x"] * 300, ra=stars.ra.values[pick] + rng.normal(0, 8, 300) / 3600, dec=stars.dec.values[pick] + rng.normal(0, 8, 300) / 3600)
    report = match_report(ds, stars, on="position", radius=15.0)
    i, j, _, _ = SkyCoord(stars.ra.values * u.deg, stars.dec.values * u.deg).search_around_sky(SkyCoord(ds.ra.values * u.deg, ds.dec.values * u.deg), 15 * u.arcsec)
    truth = {(int(a), int(b)) for a, b in zip(i, j)}
    assert {(n, r) for n, rows in enumerate(report.table_rows) for r in rows} == truth
    assert {"matched", "unmatched"} <= set(report.status)


def test_positions_meet_at_zero_right_ascension_and_at_the_pole():
    stars = pd.DataFrame({"ra": [0.0001, 180.0], "dec": [0.0, 89.9999], "teff": [1.0, 2.0]})
    ds = spectra(["a", "b"], ra=[359.9999, 0.0], dec=[0.0, 89.9999])
    assert list(join_labels(ds, stars, on="position", columns="teff", radius=2.0).teff.values) == [1.0, 2.0]


def test_units_of_motion_are_read_and_epoch_counts():
    ds = spectra(["a"], ra=[10.0], dec=[10.0 / 3600], mjd_obs=[51544.5 + 3652.5])
    stars = Table({"ra": [10.0] * u.deg, "dec": [0.0] * u.deg, "pmra": [0.0] * u.arcsec / u.yr, "pmdec": [1.0] * u.arcsec / u.yr, "teff": [5000.0] * u.K})
    assert join_labels(ds, stars, on="position", columns="teff", radius=0.5).teff.values[0] == 5000
    with pytest.raises(CatalogueError, match="none of 1 spectra matches on 'position'.*epoch"): join_labels(ds, stars, on="position", columns="teff", radius=0.5, epoch=2016.0)


# joins -------------------------------------------------------------------------------------------------------------------------------------------

def test_rows_that_contradict_each_other_need_a_decision():
    table = pd.DataFrame({"name": ["A 1", "A1", "B 1", "B 1", "unused", "unused"], "teff": [1.0, 3.0, 7.0, 7.0, 8.0, 9.0], "spt": ["K", "G", "M", "M", "x", "y"]})
    ds = spectra(["A1", "B1", "C1"])
    with pytest.raises(CatalogueError, match=r"1 key\(s\).*'A 1'"): join_labels(ds, table)
    for choice, value in {"missing": np.nan, "first": 1.0, "mean": 2.0}.items():
        np.testing.assert_array_equal(join_labels(ds, table, ambiguous=choice).teff, [value, 7.0, np.nan])
    with pytest.raises(CatalogueError, match="give 'error'"): join_labels(ds, table, ambiguous="guess")
    assert list(join_labels(ds, table, columns=["spt"], ambiguous="missing").spt.values) == ["", "M", ""]


def test_flux_is_untouched_and_lazy_data_stays_lazy():
    pytest.importorskip("dask")
    ds = spectra(["HD 1", "HD 2"]).chunk()
    out = join_labels(ds, pd.DataFrame({"name": ["HD1"], "teff": [5000.0]}))
    assert out.flux.chunks is not None and "teff" not in ds.coords
    xr.testing.assert_identical(out.drop_vars("teff").compute(), ds.compute())
    np.testing.assert_array_equal(out.teff, [5000.0, np.nan])


def test_labels_reach_the_accessor_and_survive_selection():
    out = join_labels(spectra(["HD 1", "HD 2"]), pd.DataFrame({"name": ["HD1", "HD2"], "teff": [5000.0, 6000.0]}), units={"teff": "K"}).isel(spectrum=[1])
    assert out.teff.attrs == {"role": "label", "units": "K", "source": "table", "source_column": "teff", "joined_on": "object"}


@pytest.mark.parametrize("kwargs, complaint", [
    (dict(on="position"), "no coordinate.*'ra'"), (dict(on="night"), "no coordinate 'night'"), (dict(on="object", table_key="hd"), "no column 'hd'"), (dict(columns=["logg"]), "no column.*logg"),
    (dict(columns={"teff": "object"}), "have.*already"), (dict(columns={"teff": "flux"}), "have.*already")])
def test_wrong_joins_say_what_is_wrong(kwargs, complaint):
    with pytest.raises(CatalogueError, match=complaint): join_labels(spectra(["HD 1"]), pd.DataFrame({"name": ["HD 1"], "teff": [5000.0]}), **kwargs)


def test_a_table_without_any_matching_id_shows_both_sides():
    with pytest.raises(CatalogueError, match=r"cat.csv: none of 2 spectra matches on 'spectrum_id'.*'s0'.*'obs-1'.*table_key"):
        join_labels(spectra(["a", "b"]), clean_table(pd.DataFrame({"id": ["obs-1", "obs-2"], "teff": [1.0, 2.0]}), source="cat.csv"), on="spectrum_id")


def test_many_spectra_join_quickly():
    import time
    rng = np.random.default_rng(0)
    n, m = 100_000, 5_000
    star = rng.integers(0, m, n)
    ra, dec = rng.uniform(0, 360, m), np.degrees(np.arcsin(rng.uniform(-1, 1, m)))
    table = pd.DataFrame({"name": [f"HD {i + 1}" for i in range(m)], "ra": ra, "dec": dec, "pmra": rng.normal(0, 100, m), "pmdec": rng.normal(0, 100, m), "teff": rng.uniform(3000, 8000, m)})
    mjd = rng.uniform(53000, 58000, n)
    place = moved_direction(ra[star], dec[star], table.pmra.values[star], table.pmdec.values[star], (mjd - 51544.5) / 365.25)
    ds = xr.Dataset(coords={"spectrum_id": ("spectrum", np.arange(n).astype(str)), "object": ("spectrum", np.char.add("HD", (star + 1).astype(str))), "mjd_obs": ("spectrum", mjd),
                            "ra": ("spectrum", np.degrees(np.arctan2(place[:, 1], place[:, 0])) % 360), "dec": ("spectrum", np.degrees(np.arcsin(place[:, 2])))})
    start = time.perf_counter()
    by_name = join_labels(ds, table, on="object", columns="teff")
    by_place = join_labels(ds, table, on="position", columns="teff", radius=1.0)
    assert time.perf_counter() - start < 20
    assert np.array_equal(by_name.teff.values, table.teff.values[star])
    assert np.array_equal(by_place.teff.values, table.teff.values[star])


@pytest.mark.parametrize("as_latents", [False, True])
def test_printed_column_names_survive_a_store(tmp_path, as_latents):
    from specnb.spectra import make_latents, make_spectra, open_store, save_store
    table = pd.DataFrame({"star": ["HD 1", "HD 2"], "[Fe/H]": [-0.3, 0.1], "log g": [4.4, 2.5], "Teff": [5777., 4800.]})
    ds = make_spectra(np.ones((2, 50)), np.ones((2, 50)), np.linspace(5000, 5010, 50), ["a", "b"], medium="air", frame="rest", coords={"object": ["HD 2", "HD 1"]})
    if as_latents: ds = make_latents(np.ones((2, 3)), coords_from=ds)
    back = open_store(save_store(join_labels(ds, table), tmp_path / "s.zarr"))
    assert set(back.spec.labels) == {"Fe_H", "log_g", "Teff"}
    assert np.array_equal(back.Fe_H, [0.1, -0.3]) and np.array_equal(back.log_g, [2.5, 4.4]) and np.array_equal(back.Teff, [4800, 5777])
    assert back.Fe_H.attrs["long_name"] == "[Fe/H]" and back.log_g.attrs["long_name"] == "log g" and "long_name" not in back.Teff.attrs
    assert back.Fe_H.attrs["source_column"] == "[Fe/H]"


def test_column_names_that_would_become_one_are_refused():
    table = pd.DataFrame({"star": ["HD 1"], "log g": [4.4], "log_g": [4.5], "%": [1.0]})
    with pytest.raises(CatalogueError, match=r"columns \['log g', 'log_g'\] would all be called 'log_g'"): join_labels(spectra(["HD 1"]), table, columns=["log g", "log_g"])
    with pytest.raises(CatalogueError, match="column '%' has no letter or digit"): join_labels(spectra(["HD 1"]), table, columns="%")
    with pytest.raises(CatalogueError, match=r"have \['log_g'\] already"): join_labels(spectra(["HD 1"], log_g=[4.0]), table, columns="log g")
    named = join_labels(spectra(["HD 1"]), table, columns={"log g": "gravity", "log_g": "other"})
    assert float(named.gravity[0]) == 4.4 and float(named.other[0]) == 4.5
