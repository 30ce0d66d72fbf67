"Views and their still twins: what survives the reduction, odd input, and a report that is safe to open."
import json
import re
import time
from html.parser import HTMLParser
from xml.etree import ElementTree
import holoviews as hv
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from specnb import plots, report
from specnb.spectra import make_latents, make_spectra


def drawn(view):
    "The Bokeh model of a live view: everything a browser would be sent."
    return hv.renderer("bokeh").get_plot(view).state


@pytest.fixture(scope="module")
def toy():
    "Forty spectra of three Gaussian lines: node 0 shifts them, node 1 deepens them, node 2 does nothing."
    rng = np.random.default_rng(3)
    wavelength, z = np.linspace(5000, 5100, 600), rng.normal(size=(40, 3)).astype("float32")
    def decode(z):
        z = np.atleast_2d(z)
        centres = np.array([5020., 5050., 5085.]) + z[:, :1, None].reshape(-1, 1)
        depth = 0.5 + 0.1 * np.tanh(z[:, 1])
        return 1 - depth[:, None] * np.exp(-0.5 * ((wavelength - centres[:, :, None]) / 1.2)**2).sum(1)
    flux, ivar = decode(z) + rng.normal(0, 0.01, (40, 600)), np.full((40, 600), 1e4)
    ivar[:, 300:320] = 0
    coords = dict(object=[f"star {i // 2}" for i in range(40)], radial_velocity=(60 * z[:, 0], dict(units="km/s", role="label")),
                  teff=(np.where(np.arange(40) % 5, 5500 + 300 * z[:, 1], np.nan), dict(units="K", role="label")))
    spectra = make_spectra(flux, ivar, wavelength, [f"s{i}" for i in range(40)], medium="air", frame="rest", coords=coords)
    latents = make_latents(z, np.full_like(z, 0.1), coords_from=spectra)
    labels, shape = ["radial_velocity", "teff"], (3, 2)
    values = np.array([[0.98, 0.1], [-0.05, 0.95], [0.02, np.nan]])
    columns = {"spearman": values, "pearson": values, "mi": np.abs(values) - 0.1, "n": np.full(shape, 40), "q": np.where(np.abs(values) > 0.5, 0.001, 0.7), "p": np.full(shape, 0.1)}
    pairs = xr.Dataset({name: (("latent", "label"), value) for name, value in columns.items()}, {"latent": np.arange(3), "label": labels})
    dims = xr.Dataset({"kl": ("latent", [2., 1., 0.001]), "informative": ("latent", [True, True, False])}, {"latent": np.arange(3)})
    return spectra, latents, pairs, dims, decode


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 3000), elements=st.floats(-1e6, 1e6) | st.just(np.nan)), st.floats(0, 1), st.floats(0, 1))
def test_reduction_keeps_every_extreme(y, a, b):
    x = np.arange(len(y), dtype=float)
    low, high = sorted((a * len(y), b * len(y)))
    few_x, few_y = plots.reduce_line(x, y, (low, high), n_points=100)
    assert len(few_x) <= 100
    inside = y[(x >= low) & (x <= high)]
    if np.isfinite(inside).any():
        assert np.nanmin(few_y) <= np.nanmin(inside) and np.nanmax(few_y) >= np.nanmax(inside)
    np.testing.assert_array_equal(few_y, y[few_x.astype(int)])
    assert (np.diff(few_x) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.integers(2, 80)))
def test_masked_spans_cover_the_masked_pixels_and_no_other(bad):
    wavelength = np.linspace(5000, 5010, len(bad))
    spans = plots.masked_spans(wavelength, np.where(bad, 0., 1.))
    inside = np.array([((pixel > spans[:, 0]) & (pixel < spans[:, 1])).any() for pixel in wavelength])
    np.testing.assert_array_equal(inside, bad)


def test_gap_of_a_long_spectrum_stays_a_gap():
    x = np.linspace(3785, 6910, 327_680)
    y = np.sin(x)
    y[159_453:162_893] = np.nan
    few_x, few_y = plots.reduce_line(x, y)
    beyond = (few_x > x[159_700]) & (few_x < x[162_600])
    assert beyond.any() and np.isnan(few_y[beyond]).all()


def test_a_zoom_at_full_length_reaches_single_pixels_quickly(toy):
    n = 327_680
    wavelength, flux = np.linspace(3785, 6910, n), np.ones((1, n), "float32")
    flux[0, 200_001] = 5
    one = plots.one_spectrum(make_spectra(flux, np.ones_like(flux), wavelength, ["long"], medium="air", frame="rest"))
    panel = plots.spectrum_view(one, flux[0])[0]
    whole = panel[()].get(1)
    assert len(whole) <= 2000 and whole.dimension_values(1).max() == 5
    stream = panel.streams[0]
    start = time.perf_counter()
    stream.event(x_range=(wavelength[199_990], wavelength[200_010]))
    zoomed = panel[()].get(1)
    assert time.perf_counter() - start < 2
    assert 21 <= len(zoomed) <= 23
    np.testing.assert_allclose(np.diff(zoomed.dimension_values(0)), wavelength[1] - wavelength[0], rtol=1e-6)


@pytest.mark.parametrize("statistic", ["spearman", "pearson", "mi", "linfoot"])
def test_matrices_agree_with_their_twins(toy, statistic):
    pairs, dims = toy[2], toy[3]
    table = plots.matrix_table(pairs, statistic, dims)
    assert table["node"].nunique() == 2 and set(table.loc[table["mark"] == "*", "label"]) == {"radial_velocity", "teff"}
    image = plots.matrix_figure(pairs, statistic, dims).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(image, np.nan).ravel(), table["value"])
    live = plots.correlation_matrix(pairs, statistic, dims) if statistic in ("spearman", "pearson") else plots.information_matrix(pairs, {"mi": "nat"}.get(statistic, statistic), dims)
    np.testing.assert_allclose(live.get(0).dimension_values("value"), table["value"])
    assert drawn(live).x_range.factors == list(dict.fromkeys(table["label"]))


def test_a_pair_without_an_estimate_is_neither_zero_nor_marked(toy):
    table = plots.matrix_table(toy[2], "spearman").set_index(["latent", "label"])
    assert np.isnan(table.loc[(2, "teff"), "value"]) and table.loc[(2, "teff"), "mark"] == ""
    drawn(plots.correlation_matrix(toy[2]))
    plots.matrix_figure(toy[2])._repr_png_()


def test_a_negative_estimate_stays_negative_in_the_table(toy):
    assert plots.matrix_table(toy[2], "mi")["value"].min() < 0
    assert plots.matrix_table(toy[2], "linfoot")["value"].min() >= 0


def test_every_view_is_drawn_and_has_a_twin(toy):
    spectra, latents, pairs, dims, decode = toy
    one, rebuilt = plots.one_spectrum(spectra, "s3"), decode(latents["mean"].values[3])[0]
    moved = xr.DataArray(decode([[v, 0, 0] for v in (-1., 0., 1.)]), dims=("value", "wavelength"), coords={"value": [-1., 0., 1.], "wavelength": spectra.wavelength})
    near = pd.DataFrame({"spectrum_id": ["s5", "s9"], "distance": [0.1, 0.4]})
    history = pd.DataFrame({"epoch": [0, 1], "train_loss": [2., 1.], "beta": [0.1, 0.2], "kl_0": [0.5, 1.]})
    couples = [
        (plots.spectrum_view(one, rebuilt), plots.spectrum_figure(one, rebuilt)), (plots.spectrum_view(one), plots.spectrum_figure(one)),
        (plots.latent_scatter(latents, 0, "teff", "radial_velocity", trend=True), plots.scatter_figure(latents, 0, "teff", "radial_velocity")),
        (plots.latent_scatter(latents, 0, 1, "object"), plots.scatter_figure(latents, 0, 1)),
        (plots.traversal_view(moved, moved[2] - moved[0]), plots.traversal_figure(moved, moved[2] - moved[0])),
        (plots.neighbour_view(spectra, 3, near), plots.neighbour_figure(spectra, 3, near)),
        (plots.history_view(history), plots.history_figure(history)), (plots.dimensions_view(dims), plots.dimensions_figure(dims))]
    for live, still in couples:
        assert drawn(live) is not None
        assert still._repr_png_().startswith(b"\x89PNG")
        assert all(ax.get_ylabel() or ax.get_label() == "<colorbar>" for ax in still.axes)


def test_axes_carry_units(toy):
    spectra, latents, _, _, _ = toy
    figure = plots.scatter_figure(latents, "radial_velocity", 0, "teff")
    assert figure.axes[0].get_xlabel() == "radial velocity [km/s]" and figure.axes[1].get_ylabel() == "teff [K]"
    assert "[Å, air]" in plots.spectrum_figure(plots.one_spectrum(spectra)).axes[0].get_xlabel()
    assert drawn(plots.latent_scatter(latents, "radial_velocity", 0)).xaxis[0].axis_label == "radial velocity [km/s]"


def test_many_points_become_an_image_of_the_mean(toy):
    crowd = xr.concat([toy[1]] * 600, "spectrum")
    image = plots.latent_scatter(crowd, 0, 1, "radial_velocity")[()]
    assert isinstance(image, hv.Image)
    values = image.dimension_values(2)
    assert np.isfinite(values).any() and np.nanmax(values) <= toy[1]["radial_velocity"].values.max() + 1e-6
    assert "colour: radial velocity [km/s]" in drawn(plots.latent_scatter(crowd, 0, 1, "radial_velocity")).title.text
    assert "colour: spectra per pixel" in drawn(plots.latent_scatter(crowd, 0, 1, "object")).title.text   # names have no mean


def test_spectra_with_nan_latents_or_labels_are_left_out(toy):
    broken = toy[1].copy(deep=True)
    broken["mean"][4] = np.nan
    assert len(plots.scatter_table(broken, 0, "teff")) == 32 - 1   # eight labels are missing, and row 4 has one
    assert len(plots.scatter_table(broken, 0, 1)) == 39
    drawn(plots.latent_scatter(broken, 0, 1, "teff"))


def test_one_spectrum_is_enough(toy):
    alone = toy[1].isel(spectrum=[0])
    drawn(plots.latent_scatter(alone, 0, 1, trend=True))
    plots.scatter_figure(alone, 0, 1)._repr_png_()


def test_empty_states_say_what_to_do(toy):
    none = toy[2].isel(label=slice(0))
    assert "join" in plots.correlation_matrix(none).data[2]
    assert isinstance(plots.history_view(None)[0], hv.Text)
    assert "No neighbours" in plots.neighbour_view(toy[0], 0, pd.DataFrame({"spectrum_id": [], "distance": []})).values()[0].data[2]
    for figure in (plots.matrix_figure(none), plots.history_figure(None)): assert figure.axes[0].texts


@pytest.mark.parametrize("call, words", [
    (lambda s, l, a, d: plots.one_spectrum(s, "nobody"), "not among the 40 spectra"),
    (lambda s, l, a, d: plots.one_spectrum(s, 40), "use 0 to 39"),
    (lambda s, l, a, d: plots.spectrum_figure(plots.one_spectrum(s), np.ones(3)), "decode on the grid"),
    (lambda s, l, a, d: plots.latent_scatter(l, 0, "Teff"), "choose among"),
    (lambda s, l, a, d: plots.matrix_table(a.drop_vars("mi"), "mi"), "no variable 'mi'"),
    (lambda s, l, a, d: plots.dimensions_view(d, "icc"), "no 'icc'")])
def test_errors_name_the_mend(toy, call, words):
    with pytest.raises((KeyError, IndexError, ValueError), match=words): call(*toy[:4])


class Links(HTMLParser):
    "Everything in a page that could make a browser fetch or run something."
    def __init__(self):
        super().__init__()
        self.tags, self.outside, self.open = [], [], []
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img", "link"): self.open.append(tag)
        self.outside += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:"))]
    def handle_startendtag(self, tag, attributes): self.handle_starttag(tag, attributes); self.open.pop() if self.open and self.open[-1] == tag else None
    def handle_endtag(self, tag): assert self.open.pop() == tag, f"</{tag}> closes nothing"


def test_report_is_self_contained_and_well_formed(toy):
    spectra, latents, pairs, dims, decode = toy
    evil = latents.assign_coords(object=("spectrum", ["<script>alert(1)</script>"] * 40))
    page = report.report_html(latents=evil, association=pairs, dimensions=dims, decode=decode, wavelength=spectra.wavelength, spectra=spectra,
                              history=pd.DataFrame({"epoch": [0, 1], "train_loss": [2., 1.]}), config={"net": "</pre><script>x</script>"}, title="<b>run</b>")
    links = Links()
    links.feed(page)
    assert "script" not in links.tags and not links.outside and not links.open
    assert "prefers-color-scheme:dark" in page and len(page) < 1_500_000
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.S): ElementTree.fromstring(drawing)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_report_needs_no_more_than_latents_and_repeats_itself(toy):
    parts = dict(latents=toy[1], association=toy[2], dimensions=toy[3])
    assert report.report_html(**parts) == report.report_html(**parts)
    assert report.report_html(latents=toy[1]).count("<section") == 0


def test_report_says_what_the_flags_mean_and_of_how_many_spectra_it_speaks(toy):
    spectra, latents, pairs, dims, decode = toy
    sides = latents.assign_coords(split=("spectrum", ["test"] * 7 + ["train"] * 33))
    table = pd.DataFrame({"label": ["teff", "radial_velocity"], "flag": ["few_groups;group_label", ""]})
    page = report.report_html(latents=sides, association=pairs, dimensions=dims, findings=table, split="test")
    assert "<b>7 of 40 (test)</b>" in page and re.findall(r"<b>(\w+)</b>:", page) == ["group_label", "few_groups"]
    plain = report.report_html(latents=latents, association=pairs, findings=table.assign(flag=""), split="test")
    assert "<b>test</b>" in plain and "class='note'" not in plain


def test_both_matrices_of_a_report_have_the_same_rows_and_columns(toy):
    spectra, latents, pairs, dims, decode = toy
    pairs = pairs.reindex(label=["empty", "radial_velocity", "teff"])          # a column without any value
    pairs["mi"][:, 2] = [0.1, 3.0, np.nan]                                       # information puts teff first, correlation last
    page = report.report_html(latents=latents, association=pairs, dimensions=dims)
    drawings = [re.findall(r">(node \d|empty|teff|radial velocity)</text>", part) for part in re.findall(r"<svg.*?</svg>", page, flags=re.S)[:2]]
    assert drawings == [["teff", "radial velocity", "node 1", "node 0"]] * 2
    assert "empty" not in re.sub("<details>.*?</details>", "", page, flags=re.S)
    nothing = report.report_html(latents=latents, association=pairs[["spearman", "mi"]] * np.nan, dimensions=dims)
    assert "All pairs" in nothing and "matrix-" not in nothing


def test_report_shows_up_to_six_clouds(toy):
    spectra, latents, pairs, dims, decode = toy
    names = [f"label_{i}" for i in range(8)]
    many = pairs.isel(label=[0] * 8).assign_coords(label=names)
    carried = latents.assign_coords({name: latents.radial_velocity for name in names})
    page = report.report_html(latents=carried, association=many, dimensions=dims)
    assert set(re.findall(r"id='?\"?(scatter-\d)-figure", page)) == {f"scatter-{i}" for i in range(6)}


def test_report_of_a_diverged_training_shows_the_rest(toy):
    spectra, latents, pairs, dims, decode = toy
    page = report.report_html(latents=latents * np.nan, dimensions=dims, decode=decode, wavelength=spectra.wavelength, spectra=spectra, history=pd.DataFrame({"epoch": [0, 1], "train_loss": [2., 1.]}))
    assert re.findall("<h2>(.*?)</h2>", page) == ["Which nodes are informative", "Training"]


def test_inspect_notebook_is_code_that_compiles():
    notebook = json.loads(json.dumps(report.inspect_notebook()))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for source in sources: compile(source, "cell", "exec")
    assert sources[-1].startswith("inspect_app(") and all(not cell.get("outputs") for cell in notebook["cells"])
