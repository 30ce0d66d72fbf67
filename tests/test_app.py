"The inspector in a real browser: each path clicked through, no console error, nothing asked from outside."
import http.client
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import numpy as np
import pandas as pd
import pytest
from specnb import app, desk, sliders
from specnb.eso import write_adp
from specnb.session import shown_nodes
from specnb.survey_map import escaped

PARTS = '''
import numpy as np, pandas as pd, xarray as xr
from specnb.spectra import make_latents, make_spectra

def parts(n=60, n_pixels=800):
    rng = np.random.default_rng(5)
    wavelength, z = np.linspace(5000, 5100, n_pixels), rng.normal(size=(n, 4)).astype("float32") * [1, 1, 1, 0.01]
    def decode(z):
        z = np.atleast_2d(z)
        centres = np.array([5020., 5050., 5085.]) + z[:, :1]
        lines = np.exp(-0.5 * ((wavelength - centres[:, :, None]) / 1.2)**2).sum(1)
        return (1 - (0.5 + 0.1 * np.tanh(z[:, 1:2])) * lines) * (1 + 0.05 * z[:, 2:3] * (wavelength - 5050) / 50)
    flux = decode(z) + rng.normal(0, 0.01, (n, n_pixels))
    coords = dict(object=[f"star {i // 2}" for i in range(n)], radial_velocity=(60 * z[:, 0], dict(units="km/s", role="label")), teff=(5500 + 300 * z[:, 1], dict(units="K", role="label")))
    spectra = make_spectra(flux, np.full_like(flux, 1e4), wavelength, [f"spec-{i:03d}" for i in range(n)], medium="air", frame="rest", coords=coords)
    latents = make_latents(z, np.full_like(z, 0.1), coords_from=spectra)
    values = np.array([[0.98, 0.1], [-0.05, 0.95], [0.02, 0.01], [0., 0.]])
    columns = {"spearman": values, "pearson": values, "mi": np.abs(values), "n": np.full((4, 2), n), "q": np.where(np.abs(values) > 0.5, 0.001, 0.7), "p": np.full((4, 2), 0.1)}
    pairs = xr.Dataset({k: (("latent", "label"), v) for k, v in columns.items()}, {"latent": np.arange(4), "label": ["radial_velocity", "teff"]})
    dims = xr.Dataset({"kl": ("latent", [2., 1.5, 1., 0.001]), "informative": ("latent", [True, True, True, False])}, {"latent": np.arange(4)})
    history = pd.DataFrame({"epoch": np.arange(5), "train_loss": 1 / (1. + np.arange(5)), "valid_loss": 1.1 / (1. + np.arange(5))})
    def read_upload(name, data):
        from specnb.fits import parts_of, read_spectrum
        from specnb.ingest import Grid, match_medium, onto_grid
        parts, grid = parts_of(read_spectrum("dropped.fits", content=data)), Grid(wavelength, "air", "rest")
        flux, ivar = onto_grid(parts.wavelength, parts.flux, parts.ivar, wavelength)
        return make_spectra(flux[None], ivar[None], wavelength, [name], medium="air", frame="rest")
    def encode(ds):
        near = int(((spectra.flux.values - ds.flux.values / np.median(ds.flux.values) * np.median(spectra.flux.values))**2).sum(1).argmin())
        return make_latents(z[near:near + 1], np.full((1, 4), 0.1), [1.], coords_from=ds)
    return dict(latents=latents, association=pairs, dimensions=dims, decode=decode, spectra=spectra, history=history, title="three lines", read_upload=read_upload, encode=encode)
'''
exec(PARTS)


def test_parts_that_are_missing_leave_words_not_errors():
    everything = parts()
    for missing in ("association", "dimensions", "decode", "spectra", "history"):
        less = {name: value for name, value in everything.items() if name != missing}
        look = app.inspector(**less, **({"wavelength": everything["spectra"].wavelength} if missing == "spectra" else {}))
        tabs = look.__panel__()[2][1]
        for place in range(6): tabs.active = place
        assert [len(page) for page in tabs] == [1] * 6
        look.choose("spec-003"), look.move(look.nodes[0], 0.5)
        look.retrieval_view(look.nearest(3)), look.cell_view(), look.slider_view(), look.reading_view(True), look.verdict()
        assert look.take("csv").read() and look.reopen(look.saved())


def test_one_spectrum_alone():
    one = parts()
    one["latents"], one["spectra"] = one["latents"].isel(spectrum=[0]), one["spectra"].isel(spectrum=[0])
    look = app.inspector(**one)
    look.move(look.nodes[0], 1.)
    assert np.isfinite(look.moved()).all() and look.__panel__() is not None
    assert "cannot be judged" in look.verdict()


def test_nan_latents_are_passed_over_and_said():
    broken = parts()
    broken["latents"]["mean"][0] = np.nan
    look = app.inspector(**broken)
    assert look.row == 1
    assert not look.choose("spec-000") and "NaN latents" in look.message and look.row == 1
    assert look.choose("spec-002") and look.message == ""
    look.__panel__()


def test_a_failing_decoder_is_a_message():
    less = parts()
    less["decode"] = lambda z: np.ones((len(z), 800)) if np.abs(z).max() < 9 else np.ones(3)[z]
    look = app.inspector(**less)
    look.move(0, 50.)
    assert np.isnan(look.moved()).all() and "decoder failed" in look.message


@pytest.mark.parametrize("load, words", [(lambda: 1 / 0, "ZeroDivisionError"), (lambda: lambda z: np.ones((len(z), 3)), "take decoder and grid from the same bundle")])
def test_a_decoder_that_cannot_be_had_is_a_message(load, words, monkeypatch):
    everything = parts()
    decode = everything.pop("decode")
    monkeypatch.setattr(sliders, "visitor_document", object)
    look, late = (app.inspector(**everything, load_decoder=how) for how in (load, lambda: decode))
    assert look.decode is None and look.slider_view() is not None
    monkeypatch.setattr(sliders, "visitor_document", lambda: None)
    look.__panel__(), late.__panel__()
    assert look.decode is None and words in look.message and "No decoder" in look.slider_view().data[2]
    assert late.decode is decode and late.message == "" and len(late.slider_view()) == 2


def test_a_name_from_the_browser_is_text_and_never_a_path(tmp_path):
    look = app.inspector(**parts())
    secret = tmp_path / "secret.fits"
    secret.write_text("do not read me")
    for name in (str(secret), "../../etc/passwd", "<img src=x onerror=alert(1)>", "", "spec-000' OR 1", "9" * 400, "9" * 5000, "²"):
        assert not look.choose(name) and "read me" not in look.message
    assert escaped(look.message).count("<") == 0


def test_a_digit_that_is_no_number_is_passed_over():
    look = app.inspector(**parts())
    before = look.saved()
    for text in ("²", "①", "9" * 5000, "-1", ""): look.ask("teff", f"node {text}"), look.ask(f"node {text}", "node 0"), look.column(f"node {text}")
    look.press("²"), look.press("0"), look.press("8")
    assert look.saved() == before and look.column("node 2") == 2 and look.column("node ²") == "node ²"


def test_export_is_the_selection():
    look = app.inspector(**parts())
    look.chosen = np.array([3, 5, 8])
    table = pd.read_csv(look.take("csv"))
    assert table["spectrum_id"].tolist() == ["spec-003", "spec-005", "spec-008"]
    np.testing.assert_allclose(table["node_0"], look.mean[[3, 5, 8], 0], rtol=1e-6)
    votable = pytest.importorskip("astropy.io.votable")
    from specnb.run import write_votable
    look.write_votable = write_votable
    read = votable.parse_single_table(look.take("vot"), verify="exception").to_table()
    assert list(read["spectrum_id"]) == ["spec-003", "spec-005", "spec-008"] and str(read["radial_velocity"].unit) == "km / s"
    np.testing.assert_allclose(read["teff"], table["teff"])
    scope = dict(latents=look.latents, np=np)
    exec(look.take("py").read(), scope)
    assert scope["selection"]["spectrum_id"].values.tolist() == ["spec-003", "spec-005", "spec-008"]


def test_a_run_without_labels_says_what_to_do():
    bare = parts()
    bare["latents"] = bare["latents"].drop_vars(["radial_velocity", "teff"])
    bare["association"] = None
    look = app.inspector(**bare)
    look.__panel__()
    assert "No association table" in look.matrix_view().data[2] and "Click on a cell" in look.cell_view().data[2]
    assert look.calibrations == {} and look.labels() == []
    assert look.doppler().keys() <= set(look.nodes)


def test_the_velocity_node_speaks_km_s_and_a_bent_one_does_not():
    look = app.inspector(**parts())
    assert list(look.calibrations) == [0]
    velocity, width = desk.node_velocity(look.calibrations[0], 0.5)
    assert abs(velocity - 30) < 5 and "km/s" in look.slider_name(0) and "km/s" not in look.slider_name(1)
    bent = parts()
    bent["latents"]["mean"][:, 0] = np.abs(bent["latents"]["mean"][:, 0])
    assert app.inspector(**bent).calibrations == {}


@pytest.mark.parametrize("data", [b"", b"GIF89a" * 99, b"SIMPLE  =                    T" + b" " * 2850, bytes(range(256)) * 50, b"\x1f\x8b" + b"\0" * 99])
def test_an_unreadable_dropped_file_is_a_message_and_changes_nothing(data):
    look = app.inspector(**parts())
    before = look.row, look.code.copy(), look.guest
    assert not look.bring("/etc/passwd", data) and "cannot be shown" in look.message
    assert (look.row, look.guest) == (before[0], before[2]) and np.array_equal(look.code, before[1])


def test_a_dropped_spectrum_becomes_the_query(tmp_path):
    everything = parts()
    write_adp(everything["spectra"].isel(spectrum=[11]), tmp_path / "mine.fits")
    look = app.inspector(**everything)
    assert look.bring("mine.fits", (tmp_path / "mine.fits").read_bytes()), look.message
    assert look.nearest(1)["spectrum_id"][0] == "spec-011"
    assert "mine.fits" in look.verdict() and "mine.fits" in look._card()
    look.retrieval_view(look.nearest(3)), look.reading_view(), look.slider_view(), look.map_view(0, 1)
    assert look.choose("spec-002") and look.guest is None and np.array_equal(look.code, look.mean[2].astype(float))


def test_the_verdict_is_about_the_guest_who_is_there():
    look = app.inspector(**parts())
    ordinary, strange = look.mean[3].astype(float), look.mean[3] + np.array([40., 0, 0, 0])
    def meet(name, code):
        latents = look.latents[["mean", "sigma", "chi2"]].isel(spectrum=[3]) if "chi2" in look.latents else look.latents[["mean", "sigma"]].isel(spectrum=[3])
        look.guest = dict(name=name, spectrum=look.observed(3), latents=latents.assign(mean=(("spectrum", "latent"), code[None])))
        p = float(look.strangeness()["p_latent"].iloc[-1])
        look.guest = None
        return p
    found = [meet(f"{i}.fits", code) for i in range(20) for code in (ordinary, strange)]
    assert min(found[::2]) > 0.2 > 0.05 > max(found[1::2]), found


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", "[]", "{}", '{"specnb": 2}', '{"specnb": 1, "file": "/etc/passwd"}', '{"specnb": 1, "code": [1, 2]}', '{"specnb": 1, "code": [NaN, 0, 0, 0]}', '{"specnb": 1, "code": [1%s, 0, 0, 0]}' % ("0" * 400),
                                  '{"specnb": 1, "spectrum": "../../x"}', '{"specnb": 1, "node": true}', '{"specnb": 1, "chosen": [["a"]]}', '{"specnb": 1, "tab": "Compare"}', '{"specnb": 1, "up": 3}', '{"specnb": 1, "node": 2, "colour": "<b>"}', "[" * 100_000])
def test_a_bad_saved_view_is_a_message_and_changes_nothing(text):
    look = app.inspector(**parts())
    before = look.saved()
    assert not look.reopen(text) and look.message
    assert look.saved() == before


def test_selection_drives_matrix_neighbours_and_cloud():
    look = app.inspector(**parts())
    look.chosen = np.arange(0, 50, 2)
    found = look.matrix_of("selection")
    assert int(found["n"].max()) == 25
    assert set(look.nearest(9, within=True)["spectrum_id"]) <= {f"spec-{i:03d}" for i in look.chosen}
    plain, ringed = app.inspector(**parts()).cell_view(), look.cell_view()
    assert len(ringed) == len(plain) + 1
    given = look.matrix_of(given=("teff",))
    assert list(given["label"].values) == ["radial_velocity"] and float(given["conditional_mi"].sel(latent=0)[0]) > 0.5 > abs(float(given["conditional_mi"].sel(latent=2)[0]))
    nodes = look.matrix_of("nodes")
    assert nodes["mi"].shape == (3, 3) and np.isnan(np.diag(nodes["mi"])).all()


def test_a_guest_has_a_place_on_every_map_that_knows_it(tmp_path):
    everything = parts()
    write_adp(everything["spectra"].isel(spectrum=[11]), tmp_path / "mine.fits")
    look = app.inspector(**everything)
    before = look.latents["pca_1"].values.copy()
    assert look.guest_note() == "" and np.isnan(look.guest_value(0))
    look.bring("mine.fits", (tmp_path / "mine.fits").read_bytes())
    np.testing.assert_allclose([look.guest_value(0), look.guest_value("pca_1"), look.guest_value("pca_2")], [look.mean[11, 0], before[11], look.latents["pca_2"].values[11]], rtol=1e-6)
    np.testing.assert_allclose(look.latents["pca_1"].values, before, rtol=1e-9)
    assert np.isnan(look.guest_value("teff")) and "no place" not in look.guest_note()
    look.up = "teff"
    assert "has no teff" in look.guest_note() and look.map_view(0, "teff") is not None


def test_the_selection_is_stepped_through_and_has_a_spectrum():
    look = app.inspector(**parts())
    look.chosen = np.array([40, 3, 17])
    seen = []
    for key in "nnnnp": look.press(key); seen.append(look.row)
    assert seen == [3, 17, 40, 3, 40]
    several = np.array([look.observed(row)["flux"].values for row in (3, 17, 40)])
    np.testing.assert_allclose(look.typical(), np.median(several, axis=0), rtol=1e-5)
    look.gather()
    np.testing.assert_allclose(look.code, np.median(look.mean[[3, 17, 40]], axis=0), rtol=1e-5)
    assert "median of 3 selected" in look.spectrum_lines() and "median of 3 selected" in look.reading_lines()


def test_a_map_without_umap_says_so(monkeypatch):
    look = app.inspector(**parts())
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="pip install umap-learn"): look.embed("UMAP")
    assert not look.reopen('{"specnb": 1, "across": "umap_1"}') and "press UMAP" in look.message
    assert "pca_1" in look.latents.coords and np.isfinite(look.latents["pca_1"].values).all()


@pytest.mark.slow
def test_a_map_with_umap_keeps_neighbours():
    pytest.importorskip("umap", reason="optional: pip install umap-learn")
    rng = np.random.default_rng(0)
    islands = np.repeat([[-9., 0, 0], [9., 0, 0]], 60, axis=0) + rng.normal(size=(120, 3))
    place = desk.neighbour_map(islands, n_learn=100)
    one, two = place[:60], place[60:]
    assert np.linalg.norm(one.mean(0) - two.mean(0)) > 2 * max(one.std(), two.std())


def test_a_slider_step_is_quick_on_the_server():
    import holoviews as hv
    look = app.inspector(**(parts(n_pixels=4096)))
    plot = hv.renderer("bokeh").get_plot(look.slider_view())
    source = lambda: next(part.handles["source"].data for (name, _), (_, drawn) in look._drawn.items() if name == "moved" for part in drawn.subplots.values() if part.current_frame.label == "moved")
    before, took = {name: np.array(values) for name, values in source().items()}, []
    for value in np.linspace(-2, 2, 21):
        start = time.perf_counter()
        look.move(0, float(value))
        took.append(time.perf_counter() - start)
    changed = [name for name, values in source().items() if name != "wavelength" and not np.array_equal(values, before[name])]
    assert changed and plot is not None
    assert np.median(took) < 0.25, f"{np.median(took) * 1000:.0f} ms a step"


# --- in the browser ---------------------------------------------------------------------------------------------------------------------------------

FIND = "const out=[];const walk=r=>r.querySelectorAll('*').forEach(e=>{if(e.matches(arguments[0]))out.push(e);if(e.shadowRoot)walk(e.shadowRoot)});walk(document);return out"
# the drawn values of a line: the y column of the data source whose renderer's glyph is a line, of the plot with this y label
LINES = """const out={};for(const doc of Bokeh.documents)for(const m of doc._all_models.values())if(m.type=='GlyphRenderer'&&m.glyph.type=='Line'){
const s=m.data_source.data;for(const k of s.keys?[...s.keys()]:Object.keys(s))if(k!='wavelength'){const v=s.get?s.get(k):s[k];out[m.id+k]=Array.from(v).slice(0,400).map(x=>+x||0).reduce((a,b,i)=>a+b*Math.sin(i),0)}};return out"""
# screen position of data coordinates in the n-th plot whose ranges have this type
WORDS = """const out=[];const walk=n=>{if(n.nodeType==3){out.push(n.data);return}if(['STYLE','SCRIPT'].includes(n.nodeName))return;
if(n.shadowRoot)walk(n.shadowRoot);n.childNodes.forEach(walk);if(n.nodeType==1)out.push(' ')};walk(document.body);return out.join('').replace(/\\s+/g,' ')"""
PLACE = """const [kind,x,y]=arguments;for(const doc of Bokeh.documents)for(const m of doc._all_models.values()){if(m.type!='Figure'||m.x_range.type!=kind)continue;
const v=Bokeh.index.find_one(m);if(!v||!v.el||!v.el.isConnected||v.el.getBoundingClientRect().width<50)continue;const box=v.el.getBoundingClientRect(),f=v.frame;
const px=f.x_scale.compute(x),py=f.y_scale.compute(y);return [box.left+px,box.top+py]};return null"""

# the matrices on the page: ids of the plots whose axes are names
MATRICES = "const out=[];for(const doc of Bokeh.documents)for(const m of doc._all_models.values())if(m.type=='Figure'&&m.x_range.type=='FactorRange')out.push(m.id);return out"


@pytest.fixture(scope="module")
def served():
    "The address of an inspector served by a process of its own."
    code = PARTS + """
import time
from specnb.app import inspector, serve
def page():     # as for a run, the decoder comes after the page
    everything = parts()
    decode = everything.pop("decode")
    return inspector(**everything, load_decoder=lambda: (time.sleep(1), decode)[1])
serve(page)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    line = process.stdout.readline()
    yield line.split()[0]
    process.terminate()
    try: process.wait(20)
    except subprocess.TimeoutExpired: process.kill(), process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium, or a skip that says what to install."
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    if not chromium or not driver: pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options, profile = selenium.ChromeOptions(), tempfile.mkdtemp()
    options.binary_location = chromium
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync",
                   "disable-dev-shm-usage", "window-size=1400,1000", f"user-data-dir={profile}"): options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield window
    window.quit()
    shutil.rmtree(profile, ignore_errors=True)


def moving():
    "What the driver raises of a part that is not there yet, is covered, or was drawn anew."
    from selenium.common import exceptions as e
    return e.StaleElementReferenceException, e.NoSuchElementException, e.ElementClickInterceptedException, e.ElementNotInteractableException


class Page:
    "A page of the inspector, and what a person does with it."
    def __init__(self, window, address):
        self.window, start = window, time.perf_counter()
        window.get_log("performance"), window.get_log("browser")
        window.get(address)
        self.wait(lambda: self.all(".bk-tab"), "the tabs")
        self.ready = time.perf_counter() - start

    def all(self, css): return self.window.execute_script(FIND, css)
    def text(self): return self.window.execute_script(WORDS)
    def lines(self): return self.window.execute_script(LINES)

    def wait(self, condition, what, seconds=30):
        "What `condition` finds, asked until it finds something; a part that is not there, or no longer, is asked for again."
        end, moved = time.perf_counter() + seconds, moving()
        while time.perf_counter() < end:
            try: found = condition()
            except moved: found = None      # the page is being drawn anew
            if found: return found
            time.sleep(0.05)
        raise AssertionError(f"waited {seconds} s in vain for {what}")

    def named(self, css, name):
        "The part of this kind whose words begin with `name`."
        return self.wait(lambda: [part for part in self.all(css) if part.text.startswith(name)], f"{css} called {name!r}")[0]

    def act(self, deed, what):
        "Do something to a part of the page, as a person does: once it can be reached."
        self.wait(lambda: (deed(), True), what)

    def click(self, css, name=""): self.act(lambda: self.named(css, name).click(), f"a click on {name or css}")

    def again(self, deed, until, what):
        "Do it, and once more if the page moved under the pointer, as it does while figures are drawn."
        for _ in range(3):
            deed()
            try: return self.wait(until, what, 10)
            except AssertionError: pass
        raise AssertionError(f"three times in vain for {what}")

    def press(self, name, until, what, css="button"): return self.again(lambda: self.click(css, name), until, what)

    def tab(self, name):
        self.press(name, lambda: "bk-active" in self.named(".bk-tab", name).get_attribute("class"), f"the tab {name}", ".bk-tab")
        return self

    def choose(self, name, value):
        from selenium.webdriver.support.select import Select
        self.act(lambda: Select(self.select(name)).select_by_visible_text(value), f"{value} as {name}")

    def type(self, key):
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.window).send_keys(key).perform()
        time.sleep(0.2)

    def wheel(self, amount):
        "Turn the wheel over the first plot with a wavelength axis."
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
        x, y = self.place("Range1d", 5050, 0.8)
        ActionChains(self.window).scroll_from_origin(ScrollOrigin.from_viewport(round(x), round(y)), 0, amount).perform()

    def click_at(self, x, y):
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        mouse = ActionBuilder(self.window)
        mouse.pointer_action.move_to_location(round(x), round(y)).click()
        mouse.perform()

    def strike(self, x, y, until, what):
        "Click on a cell of a matrix."
        def deed():
            self.place("FactorRange", x, y)
            time.sleep(0.5)
            self.click_at(*self.place("FactorRange", x, y))
        return self.again(deed, until, what)

    def drag(self, points):
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        mouse = ActionBuilder(self.window)
        mouse.pointer_action.move_to_location(*map(round, points[0])).pointer_down()
        for x, y in points[1:]: mouse.pointer_action.move_to_location(round(x), round(y))
        mouse.pointer_action.pointer_up()
        mouse.perform()

    def place(self, kind, x, y): return self.wait(lambda: self.window.execute_script(PLACE, kind, x, y), f"a plot with {kind}")
    def select(self, name): return self.named(".bk-input-group", f"{name}\n").find_element("css selector", "select")

    def nearest(self): return self.named(".tabulator-row", "").find_element("css selector", "[tabulator-field=spectrum_id]").text

    def legends(self):
        "Words of all legends in plots that are on the screen."
        return self.window.execute_script("""const out=[];for(const doc of Bokeh.documents)for(const m of doc._all_models.values())if(m.type=='Legend')for(const i of m.items)
            if(i.visible&&i.renderers.length&&Bokeh.index.find_one(i.renderers[0]))out.push(i.label.value);return out""")

    def complaints(self):
        return [entry["message"] for entry in self.window.get_log("browser") if entry["level"] == "SEVERE"]

    def outside(self):
        messages = [json.loads(entry["message"])["message"] for entry in self.window.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("http://127.0.0.1", "data:", "blob:", "chrome", "about:"))]


@pytest.fixture
def page(browser, served):
    "A fresh page; after the test its console must be clean and its network quiet."
    page = Page(browser, served)
    yield page
    time.sleep(0.2)
    assert page.complaints() == []
    assert page.outside() == []


def test_the_page_is_there_and_asks_nothing_from_outside(page):
    page.wait(lambda: len(page.all("canvas")) >= 2, "two plots")
    assert page.ready < 30 and "three lines" in page.text()
    print(f"address to tabs: {page.ready:.1f} s")


def test_a_slider_moves_the_spectrum_and_reset_puts_it_back(page):
    from selenium.webdriver import Keys
    page.wait(lambda: len(page.lines()) >= 4, "the lines")
    took, push = [], lambda key: page.act(lambda: page.named(".noUi-handle", "").send_keys(key), "a push of the first slider")
    def reset():
        page.click("button", "Reset")
        time.sleep(1)
        return page.lines()
    push(Keys.ARROW_RIGHT)        # from now on this node is the one in question
    before = reset()
    for key in [Keys.ARROW_RIGHT] * 6:
        last, start = page.lines(), time.perf_counter()
        push(key)
        page.wait(lambda: page.lines() != last, "a redraw")
        took.append(time.perf_counter() - start)
    print(f"slider to new data in the browser: {np.median(took) * 1000:.0f} ms")
    assert np.median(took) < 2
    assert page.lines() != before
    page.wait(lambda: reset() == before, "the spectrum as it was")


def test_a_click_on_a_cell_asks_for_its_cloud(page):
    page.tab("Matrices")
    page.strike("teff", "node 1", lambda: page.select("Label").get_attribute("value") == "teff", "the label of the cell")
    page.wait(lambda: page.all("canvas"), "the cloud")
    page.wait(lambda: page.select("Node").find_element("css selector", "option:checked").text == "node 1", "the node of the cell")


def test_every_statistic_is_drawn(page):
    page.tab("Matrices")
    page.place("FactorRange", "teff", "node 1")
    for name in ("Pearson", "MI [nat]", "MI 0..1", "MI given …", "Spearman"):
        before = page.window.execute_script(MATRICES)
        page.press(name, lambda: page.window.execute_script(MATRICES) not in ([], before), f"a new matrix for {name}", "button, .bk-btn")
        assert page.place("FactorRange", "teff", "node 1")


def test_nodes_against_nodes_are_computed_while_the_page_lives(page):
    page.tab("Matrices")
    page.place("FactorRange", "teff", "node 1")
    page.choose("Nodes against", "nodes")
    names = "const out=[];for(const d of Bokeh.documents)for(const m of d._all_models.values())if(m.type=='FactorRange')out.push(...m.factors);return out"
    page.wait(lambda: page.window.execute_script(names).count("node 2") >= 2, "columns that are nodes")
    page.strike("node 2", "node 1", lambda: page.select("Label").get_attribute("value") == "node 2", "the other node as the label")


def test_a_spectrum_is_read_in_the_frame_of_its_star(page):
    page.tab("Spectrum")
    page.wait(lambda: "named lines" in page.text(), "the controls")
    page.wait(lambda: len(page.lines()) >= 3, "flux, reconstruction, residual")
    before = page.lines()
    page.wheel(-240)
    page.wait(lambda: page.lines() != before, "a redraw after the zoom")
    before = page.lines()
    page.click("button, .bk-btn", "rest frame")
    page.wait(lambda: page.lines() != before, "the other frame")


def test_a_dropped_file_is_read_and_a_broken_one_is_said(page, tmp_path):
    exec(PARTS, space := {})
    write_adp(space["parts"]()["spectra"].isel(spectrum=[11]), tmp_path / "mine.fits")
    (tmp_path / "cat.fits").write_bytes(b"no spectrum at all")
    drop = lambda name: page.act(lambda: page.named("input[type=file][accept*=fits]", "").send_keys(str(tmp_path / name)), "the door for files")
    drop("mine.fits")
    page.wait(lambda: "a file of your own" in page.text(), "the guest")
    page.tab("Neighbours")
    page.wait(lambda: page.nearest() == "spec-011", "itself as the nearest")
    page.press("How strange", lambda: "false-alarm rate" in page.text(), "the verdict")
    page.tab("Map")
    page.wait(lambda: "★ mine.fits" in page.text(), "the note on the map")
    stars = """const out=[];for(const doc of Bokeh.documents)for(const m of doc._all_models.values())if(m.type=='GlyphRenderer'&&(m.glyph.marker?.value=='star'||m.glyph.marker=='star')){
        const d=m.data_source.data,at=k=>(d.get?d.get(k):d[k]);out.push([+at(m.glyph.x.field)[0],+at(m.glyph.y.field)[0]])};return out"""
    exec(PARTS, space)
    latents, dims = (space["parts"]()[name] for name in ("latents", "dimensions"))
    code = latents["mean"].values[11, shown_nodes(latents, dims)[:2]]
    page.wait(lambda: [place for place in page.window.execute_script(stars) if np.allclose(place, code, atol=1e-4)], "the star at its code")
    page.choose("Across", "teff")
    page.wait(lambda: "has no teff, so no place on this map" in page.text(), "a word on what the file does not tell")
    drop("cat.fits")
    page.wait(lambda: "'cat.fits' cannot be shown" in page.text(), "the message")
    assert "a file of your own" in page.text()


def test_keys_and_the_address_keep_the_place(page):
    from selenium.webdriver import Keys
    page.wait(lambda: page.all("canvas"), "the plots")
    page.click("h2")
    for key in "nn": page.type(key)
    page.wait(lambda: "of your own: spec-002 " in page.text(), "two further")
    page.wait(lambda: "spectrum=spec-002" in page.window.current_url, "the address")
    page.type("4")
    page.wait(lambda: page.all(".tabulator-row"), "the fourth tab")
    page.type("5")
    page.wait(lambda: any(group.text.startswith("Up") for group in page.all(".bk-input-group")), "the map")
    page.choose("Up", "pca_2")
    page.choose("Colour", "none")
    page.wait(lambda: "up=pca_2" in page.window.current_url and "tab=Map" in page.window.current_url and "colour=none" in page.window.current_url, "tab and axes in the address")
    page.window.get(page.window.current_url)
    page.wait(lambda: page.all(".bk-tab"), "the tabs")
    page.wait(lambda: "spec-002 " in page.text(), "the same spectrum from the address")
    page.wait(lambda: any(group.text.startswith("Up") for group in page.all(".bk-input-group")), "the map at once")
    assert page.select("Up").get_attribute("value") == "pca_2" and page.select("Colour").get_attribute("value") == "none"


def test_a_dark_page_is_dark(page):
    page.window.get(page.window.current_url.split("?")[0] + "?theme=dark")
    page.wait(lambda: page.all("canvas"), "the plots")
    color = page.window.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", color)[:3])) < 200, color


def test_neighbours_lead_from_one_spectrum_to_the_next(page):
    page.tab("Neighbours")
    name = page.wait(page.nearest, "the table")
    page.click(".tabulator-row")
    time.sleep(0.5)
    page.press("Make the marked", lambda: f"of your own: {name} " in page.text(), f"{name} as the chosen spectrum")


def test_a_spectrum_is_found_by_its_name_and_a_wrong_one_is_said(page):
    from selenium.webdriver import Keys
    page.act(lambda: page.named("input[type=text]", "").send_keys("spec-017" + Keys.ENTER), "a name")
    page.wait(lambda: "of your own: spec-017 " in page.text(), "the spectrum")
    page.act(lambda: page.named("input[type=text]", "").clear(), "an empty field")
    page.act(lambda: page.named("input[type=text]", "").send_keys("nobody" + Keys.ENTER), "another name")
    page.wait(lambda: "No spectrum or object is called 'nobody'" in page.text(), "a message")


def test_a_lasso_on_the_map_selects(page):
    page.tab("Map")
    page.wait(lambda: "of 60 selected" in page.text() and len(page.all("canvas")) < 8, "the map")
    def around():
        time.sleep(1)
        page.drag([page.place("Range1d", x, y) for x, y in ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9), (-0.9, -0.8))])
    counted = lambda: [int(number) for number in re.findall(r"(\d+) of 60 selected", page.text()) if int(number)]
    number = page.again(around, counted, "a selection")[0]
    exec(PARTS, space := {})
    latents = space["parts"]()["latents"]
    shown = shown_nodes(latents, space["parts"]()["dimensions"])[:2]
    expected = (np.abs(latents["mean"].values[:, shown]) <= 0.9).all(1).sum()
    assert abs(number - expected) <= 2, (number, expected)
    words = f"median of {number if number <= 25 else f'25 of {number}'} selected"
    for name in ("Nodes", "Spectrum"):
        page.tab(name)
        page.wait(lambda: words in page.legends(), f"the selection on the tab {name}")
    page.click("button", "Median of the selection")
    page.tab("Nodes")
    moved = np.median(latents["mean"].values[(np.abs(latents["mean"].values[:, shown]) <= 0.9).all(1)][:, shown[0]])
    page.wait(lambda: f"node {shown[0]} = {moved:+.1f}" in page.text() or number != expected, "the sliders at the median")


def test_the_training_tab_stands(page):
    page.tab("Training")
    page.wait(lambda: any("Criterion" in part.text for part in page.all(".bk-input-group")), "the criterion")
    widths = page.wait(lambda: [c.size["width"] for c in page.all("canvas") if c.size["width"] > 300], "plots of some width")
    assert widths


def test_a_page_from_elsewhere_gets_no_websocket(served):
    port = served.rstrip("/").rpartition(":")[2]
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==", "Sec-WebSocket-Protocol": "bokeh, token"}
    for origin, status in (("http://evil.example", 403), (f"http://127.0.0.1:{port}", 101)):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        connection.request("GET", "/ws", headers=headers | {"Origin": origin})
        answer = connection.getresponse().status
        connection.close()
        assert (answer == 403) == (status == 403), (origin, answer)


def test_an_open_address_is_refused():
    for address in ("0.0.0.0", "::", "10.0.0.3"):
        with pytest.raises(ValueError, match="tunnel"): app.serve(lambda: None, address=address)
