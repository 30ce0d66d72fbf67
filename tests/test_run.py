"""The main job as a whole: faults, interruption, repetition, and what a folder promises."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import numpy as np
import pandas as pd
import pytest
from specnb import run as run_module
from specnb.cli import app, main
from specnb.run import RunError, analyse, encode, findings, ingest, open_run, simulate, train
from specnb.spectra import open_store, save_store

TINY = dict(net="tiny", n_epoch=2, bs=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A finished run on 200 stars, in a path with spaces."
    folder = tmp_path_factory.mktemp("a path with spaces")
    store = simulate(folder / "survey.zarr", n_stars=200, n_pixels=256)
    run = train(store, folder / "run", **TINY)
    encode(run)
    analyse(run, n_permutations=49)
    return folder


def test_the_folder_holds_what_the_design_promises(made):
    names = {p.name for p in (made / "run").iterdir()}
    assert names >= {"config.json", "model.safetensors", "checkpoints", "history.csv", "latents.zarr", "dimensions.csv", "association.csv", "inspect.ipynb", "report.html"}
    frame = pd.read_csv(made / "run" / "association.csv")
    assert len(frame) == 6 * 11 and {"latent", "label", "n", "n_groups", "spearman", "mi", "mi_low", "mi_high", "p", "q"} <= set(frame.columns)
    assert len(pd.read_csv(made / "run" / "history.csv")) == 2
    config = json.loads((made / "run" / "config.json").read_text())["extra"]["run"]
    assert {"seed", "net", "objective", "recipe", "store_fingerprint", "versions"} <= set(config)


def test_the_folder_may_move_with_its_store(made, tmp_path):
    shutil.copytree(made, tmp_path / "elsewhere")
    moved = open_run(tmp_path / "elsewhere" / "run")
    assert moved.store == (tmp_path / "elsewhere" / "survey.zarr").resolve()
    np.testing.assert_array_equal(moved.latents["mean"], open_run(made / "run").latents["mean"])


def test_a_run_whose_store_is_gone_says_so(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    with pytest.raises(RunError, match="survey.zarr.*not where it was"): encode(tmp_path / "run")
    assert open_run(tmp_path / "run").association.sizes["label"] == 11


def test_encoding_a_store_of_another_grid_is_refused_and_nothing_is_lost(made, tmp_path):
    other = simulate(tmp_path / "other.zarr", n_stars=10, n_pixels=128)
    before = open_run(made / "run").latents
    with pytest.raises(ValueError, match="128 pixels"): encode(made / "run", other)
    np.testing.assert_array_equal(before["mean"], open_run(made / "run").latents["mean"])


def test_encoding_new_spectra_marks_them_new(made, tmp_path):
    other = simulate(tmp_path / "other.zarr", n_stars=10, n_pixels=256, seed=5)
    latents = open_store(encode(made / "run", other, out=tmp_path / "new.zarr"))
    assert set(latents.split.values) == {"new"} and latents.sizes["latent"] == 6


def test_weights_of_another_version_are_refused(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    key = next(k for k in config if "format" in k)
    config[key] = 999
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json|version"): open_run(tmp_path / "run").bundle


def test_damaged_weights_are_refused(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="model.safetensors"): open_run(tmp_path / "run").bundle


def test_analysis_is_the_same_twice(made):
    first = (made / "run" / "association.csv").read_bytes()
    analyse(made / "run", n_permutations=49)
    assert (made / "run" / "association.csv").read_bytes() == first


def test_a_label_that_nobody_has_is_named(made):
    with pytest.raises((ValueError, KeyError), match="mass"): analyse(made / "run", labels=["mass"], n_permutations=9)


def test_findings_name_one_node_a_label(made):
    found = findings(open_run(made / "run").association)
    assert found.label.is_unique and set(found.node) <= set(range(6))


def test_a_store_with_too_few_stars_to_split_is_an_error(tmp_path):
    store = simulate(tmp_path / "s.zarr", n_stars=1, n_pixels=256)
    with pytest.raises(ValueError): train(store, tmp_path / "run", **TINY)
    assert not (tmp_path / "run" / "model.safetensors").exists()


KILLED = """
import sys, os, signal
from specnb import run
from fastai.callback.core import Callback
from specnb import learner
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell that runs this in the background has its children ignore Ctrl-C
class Kill(Callback):
    order = 80
    def after_epoch(self):
        if self.epoch == 1: os.kill(os.getpid(), signal.{signal})
original = learner.spectrum_learner
learner.spectrum_learner = lambda *a, cbs=(), **k: original(*a, **k, cbs=[*(cbs or ()), Kill()])
run.train(sys.argv[1], sys.argv[2], net="tiny", n_epoch=4, bs=16)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path, made, name):
    words = [sys.executable, "-c", KILLED.format(signal=name), str(made / "survey.zarr"), str(tmp_path / "run")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0 and (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "model.safetensors").exists()
    resumed = open_run(train(made / "survey.zarr", tmp_path / "run", **{**TINY, "n_epoch": 4}))
    straight = open_run(train(made / "survey.zarr", tmp_path / "straight", **{**TINY, "n_epoch": 4}))
    for key, value in straight.bundle.model.state_dict().items(): assert (value == resumed.bundle.model.state_dict()[key]).all(), key
    assert len(resumed.history) == 4


def test_the_command_line_does_the_job(tmp_path, capfd):
    store, run = str(tmp_path / "s.zarr"), str(tmp_path / "run")
    assert main(["simulate", store, "--n-stars", "120", "--n-pixels", "256"]) == 0
    assert main(["train", store, run, "--net", "tiny", "--n-epoch", "1"]) == 0
    assert main(["encode", run]) == 0
    assert main(["analyse", run, "--n-permutations", "19"]) == 0
    out = capfd.readouterr().out
    assert "|Spearman|" in out and "specnb inspect" in out


@pytest.mark.parametrize("words, mend", [
    (["train", "{0}/no.zarr", "{0}/run"], "not a Zarr store"),
    (["analyse", "{0}"], "config.json"),
    (["ingest", "{0}", "--store", "{0}/s.zarr", "--start", "5000"], "stop"),
    (["inspect", "{0}/nothing"], "not a folder"),
    (["inspect", "{1}", "--other", "{0}/nothing"], "not a folder"),
])
def test_errors_on_the_command_line_are_one_sentence(tmp_path, made, capfd, words, mend):
    assert main([w.format(tmp_path, made / "run") for w in words]) == 1
    err = capfd.readouterr().err
    assert mend in err and "Traceback" not in err


def test_a_selection_as_a_votable_survives_hostile_names_and_foreign_units():
    votable = pytest.importorskip("astropy.io.votable")
    names = ["a <b> & 'c'", "\x00d\x01e", "\ud800f", "", "ü" * 300]
    table = pd.DataFrame({"spectrum_id": names, "two words": np.arange(5), "teff": [np.nan, 1, 2, 3, 4.5], "bright": [True, False] * 2 + [True], "water": np.ones(5, "float32")})
    table.attrs["units"] = {"teff": "K", "two words": "km/s", "water": "relative column"}
    read = votable.parse_single_table(io.BytesIO(run_module.write_votable(table)), verify="exception").to_table(use_names_over_ids=True)
    assert [str(name) for name in read["spectrum_id"]] == ["a <b> & 'c'", "de", "f", "", "ü" * 300]
    assert str(read["two words"].unit) == "km / s" and read["water"].unit is None and read["water"].description == "unit: relative column"
    np.testing.assert_array_equal(read["teff"].filled(np.nan), table["teff"])
    assert list(read["bright"]) == list(table["bright"])


def test_a_run_whose_store_is_gone_can_still_be_looked_at(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    look = run_module.inspect_app(tmp_path / "run")
    assert look.spectra is None and look.take("vot").read().startswith(b"<?xml") and np.isfinite(look.moved()).all()


def test_two_runs_are_compared_when_their_tab_is_opened(made):
    look = run_module.inspect_app(made / "run", made / "run")
    tabs = look.__panel__()[2][1]
    assert tabs._names[-1] == "Compare" and not len(tabs[-1])
    tabs.active = len(tabs) - 1
    table = tabs[-1][0][1][1].value             # words, then matrix and table side by side
    assert (table["latent_a"] == table["latent_b"]).all() and table["strength"].min() > 0.999


def test_looking_at_a_run_waits_for_no_library_of_reading_or_learning():
    code = "import sys, specnb.cli, specnb.run; print(sorted({'torch', 'fastai', 'astropy', 'pyvo'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_inspect_listens_on_this_machine_only(made):
    words = [shutil.which("specnb", path=os.path.dirname(sys.executable)), "inspect", str(made / "run"), "--other", str(made / "run"), "--no-show", "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, start = "", time.time()
        while "localhost" not in text and "127.0.0.1" not in text and time.time() - start < 90:
            text += server.stdout.readline()
        port = int("".join(c for c in text.split("http://")[1].split(":")[1].split("/")[0] if c.isdigit()))
        import psutil
        mine = [c for p in [psutil.Process(server.pid), *psutil.Process(server.pid).children(True)] for c in p.net_connections() if c.status == "LISTEN"]
        assert mine and {c.laddr.ip for c in mine} <= {"127.0.0.1", "::1"} and port in {c.laddr.port for c in mine}
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        server.stdout.close()


def test_a_catalogue_joins_at_the_analysis_and_headers_stand_in_for_labels(made, tmp_path, capsys):
    "From a shell alone: nodes against the columns of a table, or against headers; the error says what to give."
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    latents = open_store(run / "latents.zarr").load()
    bare = latents.drop_vars([*latents.spec.labels, *latents.spec.factors, "berv", "exptime"], errors="ignore")
    headers = bare.assign_coords(airmass=("spectrum", latents.airmass.values))
    stars = np.unique(latents.object)
    pd.DataFrame({"star": [s.replace(" ", "") for s in stars], "colour": np.linspace(0.4, 1.2, len(stars))}).to_csv(tmp_path / "stars.csv", index=False)
    words = ["analyse", str(run), "--n-permutations", "19"]
    save_store(bare, run / "latents.zarr", overwrite=True)
    assert main(words) == 1 and "--catalogue" in capsys.readouterr().err
    save_store(headers, run / "latents.zarr", overwrite=True)
    assert main(words) == 0 and set(pd.read_csv(run / "association.csv").label) == {"airmass"}
    assert main([*words, "--catalogue", str(tmp_path / "stars.csv")]) == 0 and set(pd.read_csv(run / "association.csv").label) == {"colour"}
    assert open_run(run).latents.colour.attrs["role"] == "label"
    assert main([*words, "--catalogue", str(tmp_path / "none.csv")]) == 1 and "none.csv" in capsys.readouterr().err


def test_medium_frame_and_coverage_of_a_store_can_be_asked_for_from_a_shell(tmp_path, capsys):
    from specnb.eso import write_adp
    from specnb.simulate import sample_survey
    from specnb.wave import linear_grid
    (tmp_path / "raw").mkdir()
    survey = sample_survey(3, 1, 0, linear_grid(5000, 5100, 0.05))
    for i in range(3): write_adp(survey.isel(spectrum=[i]).sel(wavelength=slice(5000, 5100 if i else 5030)), tmp_path / "raw" / f"{i}.fits")
    words = lambda name, *more: ["ingest", str(tmp_path / "raw"), "--store", str(tmp_path / name), *more]
    grid = ["--start", "5001", "--stop", "5099", "--step", "0.05"]
    assert main(words("a.zarr", *grid, "--medium", "vacuum", "--frame", "topocentric")) == 0
    assert "1 of 3 rows cover less than half of the grid" in capsys.readouterr().out
    assert open_store(tmp_path / "a.zarr").wavelength.attrs == dict(units="Angstrom", medium="vacuum", frame="topocentric")
    assert main(words("b.zarr", *grid, "--min-coverage", "0.5")) == 0 and open_store(tmp_path / "b.zarr").sizes["spectrum"] == 2
    told = capsys.readouterr().out
    assert "1 refused: it covers 5000.0-5030.0" in told and "b.refusals.csv" in told
    assert main(words("c.zarr", "--frame", "topocentric")) == 1 and "together with its grid only: give start, stop" in capsys.readouterr().err
    assert main(words("c.zarr", *grid, "--medium", "water")) == 1 and "give one of air, vacuum" in capsys.readouterr().err


def test_a_join_at_the_analysis_tells_what_matched_and_what_became_nan(made, tmp_path, capsys):
    "Printed column names arrive as labels, the key is named, and the line counts."
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    stars = np.unique(open_store(run / "latents.zarr").object)
    kept = stars[:150]
    metal, gravity = np.linspace(-1, 0.5, 150), np.linspace(1, 5, 150)
    metal[:4] = -9999
    pd.DataFrame({"my_star": kept, "name": "x", "[Fe/H]": metal, "log g": gravity}).to_csv(tmp_path / "stars.csv", index=False)
    words = ["analyse", str(run), "--n-permutations", "19", "--catalogue", str(tmp_path / "stars.csv")]
    assert main(words) == 1 and "--table-key" in capsys.readouterr().err
    assert main([*words, "--table-key", "my_star"]) == 0
    latents = open_run(run).latents
    n = int(np.isin(latents.object, kept).sum())
    assert f"stars.csv: matched {n} of {latents.sizes['spectrum']} spectra; placeholders turned into NaN in [Fe/H]: -9999 (4 times)\n" in capsys.readouterr().out
    assert {"Fe_H", "log_g"} <= set(latents.spec.labels) and latents.Fe_H.attrs["long_name"] == "[Fe/H]"
    assert np.isfinite(latents.log_g).sum() == n and {"Fe_H", "log_g"} <= set(pd.read_csv(run / "association.csv").label)


def test_the_summary_says_when_nothing_is_informative_or_known_for_enough_stars(made, tmp_path):
    from specnb.run import summary
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    judged, related = pd.read_csv(run / "dimensions.csv"), pd.read_csv(run / "association.csv")
    best = findings(open_run(run).association).node[0]
    judged["informative"] = judged.latent == best
    judged.to_csv(run / "dimensions.csv", index=False)
    lines = [line for line in summary(open_run(run)).splitlines() if "|Spearman|" in line]
    assert all(line.endswith("(node not informative)") != (f"node {best} " in line) for line in lines) and len(lines) > 1
    assert "independent stars" not in summary(open_run(run))
    judged.assign(informative=False).to_csv(run / "dimensions.csv", index=False)
    related.assign(n_groups=7).to_csv(run / "association.csv", index=False)
    text = summary(open_run(run))
    assert text.startswith(f"0 of {len(judged)} nodes are informative: none\n") and "fewer than 20 independent stars (or groups), one for 7: too few" in text
