"""Many files to one store: killed at random moments, interrupted, repeated, extended, fed with rubbish, and run on the real folders."""
import errno
import hashlib
import importlib
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from astropy.io import fits

from specnb.eso import write_adp, write_s1d
from specnb.fits import register_reader, unregister_reader
from specnb.ingest import Grid, Manifest, StoreError, checksum, find_files, fill_jumps, ingest, onto_grid, pack, read_row, shuffled, verify_store
from specnb.spectra import make_spectra, open_store, save_store, validate
from specnb.wave import linear_grid, log_grid, resample


def star(i, n=800, start=5000., step=.02, sigma=2., medium="air", frame="barycentric", **coords):
    rng = np.random.default_rng(i)
    wave = start + step * np.arange(n)
    flux = 100 * (1 - .6 * np.exp(-.5 * ((wave - 5008) / .1)**2)) + rng.normal(0, sigma, n)
    coords = dict(object=f"HD {i % 7}", mjd_obs=55000. + i, berv=10., snr=50.) | coords
    return make_spectra(flux[None], np.full((1, n), sigma**-2), wave, [f"star-{i:03d}"], medium=medium, frame=frame, coords={k: [v] for k, v in coords.items()})


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    "A folder of 30 good files, of both shapes, and five bad ones. Read only."
    folder = tmp_path_factory.mktemp("night")
    (folder / "deep" / "er").mkdir(parents=True)
    for i in range(30):
        if i % 3: write_adp(star(i), folder / "deep" / f"t{i:03d}.fits")
        else: write_s1d(star(i), folder / "deep" / "er" / f"i{i:03d}_s1d_A.fits")
    (folder / "cut.fits").write_bytes((folder / "deep" / "t001.fits").read_bytes()[:20_000])
    (folder / "empty.fits").touch()
    (folder / "page.fits").write_text("<html>")
    fits.writeto(folder / "ccf.fits", np.ones((3, 161), "f4"), fits.Header({"CRVAL1": -20., "CDELT1": .25, "CTYPE1": "km/s"}))
    write_adp(star(99, start=7000), folder / "far.fits")
    return folder


BAD = ["ccf.fits", "cut.fits", "empty.fits", "far.fits", "page.fits"]


def digest(store):
    files = sorted(p for p in Path(store).rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(store)).encode() + p.read_bytes() for p in files)).hexdigest()


def names(report): return sorted(Path(f).name for f in report.refused.file)


# ---- the ordinary run

def test_good_files_become_rows_and_bad_ones_a_table(night, tmp_path):
    report = ingest(night, tmp_path / "n.zarr", progress=False)
    assert (report.n_read, report.n_rows, report.n_known) == (30, 30, 0) and names(report) == BAD
    table = pd.read_csv(tmp_path / "n.refusals.csv")
    assert list(table.columns) == ["file", "reason", "mend", "error"] and table.notna().all().all() and len(table) == 5
    ds = validate(xr.open_zarr(tmp_path / "n.zarr")).compute()
    assert sorted(ds.spectrum_id.values) == [f"star-{i:03d}" for i in range(30)] and ds.sizes["wavelength"] == 800
    for i in (0, 1, 17, 29):
        row = ds.isel(spectrum=int(np.flatnonzero(ds.spectrum_id.values == f"star-{i:03d}")[0]))
        np.testing.assert_array_equal(row.flux, star(i).flux[0])
        assert row["object"].item() == f"HD {i % 7}" and row.mjd_obs.item() == 55000 + i
    assert ds.berv.attrs["units"] == "km/s" and set(ds.ivar_origin.values) == {"pipeline", "estimated"}


def test_order_is_shuffled_by_seed_and_recorded_by_the_rows(night, tmp_path):
    by_name = ingest(night, tmp_path / "a.zarr", seed=None, progress=False).open().source_file.values
    zero, one = (ingest(night, tmp_path / f"{s}.zarr", seed=s, progress=False).open().source_file.values for s in (0, 1))
    assert list(zero) != list(one) and sorted(zero) == sorted(one) == sorted(by_name) and list(zero) != list(by_name)
    assert abs(np.corrcoef(np.argsort(np.argsort(zero)), np.arange(30))[0, 1]) < .4
    assert [f.name for f in shuffled(find_files(night), 0) if f.name not in BAD] == list(zero)


@pytest.mark.parametrize("workers", [2, "threads"])
def test_parallel_is_the_same_byte_for_byte(night, tmp_path, workers):
    ingest(night, tmp_path / "one" / "n.zarr", n_workers=0, chunk_rows=7, progress=False)
    with ThreadPoolExecutor(3) as pool: ingest(night, tmp_path / "many" / "n.zarr", n_workers=pool if workers == "threads" else workers, chunk_rows=7, progress=False)
    assert digest(tmp_path / "one" / "n.zarr") == digest(tmp_path / "many" / "n.zarr")


def test_progress_bar_counts_every_file_where_somebody_watches(night, tmp_path, capsys, monkeypatch):
    ingest(night, tmp_path / "log.zarr")
    assert capsys.readouterr().err == ""        # half a minute has to pass before a log gets a line
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    ingest(night, tmp_path / "n.zarr")
    assert "35/35" in terminal.getvalue()


def test_paths_with_spaces_patterns_and_single_files(night, tmp_path):
    folder = tmp_path / "my night"
    shutil.copytree(night, folder)
    assert ingest(str(folder / "deep" / "t00*.fits"), folder / "a store.zarr", progress=False).n_rows == 6
    assert ingest(folder / "deep" / "t001.fits", tmp_path / "one.zarr", progress=False).n_rows == 1
    assert ingest([folder / "deep" / "t001.fits", folder / "deep"], tmp_path / "two.zarr", progress=False).n_rows == 30
    with pytest.raises(FileNotFoundError, match="nowhere"): ingest([folder, folder / "nowhere"], tmp_path / "x.zarr")


# ---- repeat, append, resume

def test_again_changes_nothing(night, tmp_path):
    ingest(night, tmp_path / "n.zarr", progress=False, chunk_rows=16)
    before = digest(tmp_path / "n.zarr"), (tmp_path / "n.manifest.jsonl").read_bytes(), (tmp_path / "n.refusals.csv").read_bytes()
    report = ingest(night, tmp_path / "n.zarr", progress=False)
    assert (report.n_read, report.n_known, len(report.refused)) == (0, 30, 5)
    assert before == (digest(tmp_path / "n.zarr"), (tmp_path / "n.manifest.jsonl").read_bytes(), (tmp_path / "n.refusals.csv").read_bytes())
    assert not list(tmp_path.rglob("*.part"))


def test_append_in_any_pieces_keeps_every_row(night, tmp_path):
    files = find_files(night / "deep")
    for a, b in [(0, 1), (1, 9), (9, 10), (10, 20), (0, 30)]: report = ingest(files[a:b], tmp_path / "n.zarr", linear_grid(5000, 5015.98, .02), chunk_rows=8, progress=False)
    assert report.n_read == 10 and report.n_rows == 30
    ds = report.open()
    for k in range(30): np.testing.assert_array_equal(ds.flux[k].values, star(int(ds.spectrum_id.values[k][-3:])).flux[0])
    assert digest(tmp_path / "n.zarr/flux/c") is not None and len(list((tmp_path / "n.zarr/flux/c").iterdir())) == 4


def test_new_columns_are_missing_in_older_rows(tmp_path):
    write_adp(star(0), tmp_path / "a.fits")
    ingest(tmp_path / "a.fits", tmp_path / "n.zarr", progress=False)
    def wind(path, hdus):
        from specnb.eso import read_phase3
        return read_phase3(path, hdus).assign_coords(wind=("spectrum", [3.5], dict(units="m/s", role="label")), site=("spectrum", ["La Silla"]))
    register_reader("wind", lambda p, h: True, wind, priority=99)
    try:
        write_adp(star(1), tmp_path / "b.fits")
        ds = ingest(tmp_path / "b.fits", tmp_path / "n.zarr", progress=False).open()
    finally: unregister_reader("wind")
    assert np.isnan(ds.wind.values[0]) and ds.wind.values[1] == 3.5 and list(ds.site.values) == ["", "La Silla"] and list(ds.spec.labels) == ["wind"]


def test_mended_file_leaves_the_refusals(night, tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(night, folder)
    assert "cut.fits" in names(ingest(folder, tmp_path / "n.zarr", progress=False))
    write_adp(star(70), folder / "cut.fits", overwrite=True)
    report = ingest(folder, tmp_path / "n.zarr", progress=False)
    assert report.n_read == 1 and names(report) == [n for n in BAD if n != "cut.fits"]
    assert "cut.fits" not in (tmp_path / "n.refusals.csv").read_text()


def heed_interrupts():
    "A shell that runs this in the background has its children ignore Ctrl-C; the process under test must not."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(code, *args, **kwargs):
    "A python process that ingests."
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=heed_interrupts if os.name == "posix" else None, **kwargs)


SLOW = """
import sys, time
from pathlib import Path
from specnb.eso import read_phase3, read_s1d, is_s1d
from specnb.fits import register_reader
from specnb.ingest import ingest
def slow(path, hdus):
    time.sleep(.008)
    return False
register_reader("slow", slow, None, 99)
print("ready", flush=True)
ingest(sys.argv[1], sys.argv[2], chunk_rows=5, progress=False, n_workers=0)
print("done", flush=True)
"""


def kill_often(night, folder, n_kills, rng, expected):
    "Start, kill -9 after a random time, start again; a finished store is compared and begun anew. The number of kills that met a running ingest."
    met = 0
    for _ in range(n_kills):
        process = run(SLOW, night, folder / "n.zarr")
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(.02, .5))
        os.killpg(process.pid, signal.SIGKILL)
        met += (running := "done" not in process.communicate()[0])
        if (folder / "n.zarr" / "zarr.json").exists(): validate(open_store(folder / "n.zarr"))
        if not running:
            assert digest(folder / "n.zarr") == expected
            shutil.rmtree(folder)
            folder.mkdir()
    return met


@pytest.mark.parametrize("n_kills", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_killed_at_random_moments_the_same_call_ends_with_the_same_bytes(night, tmp_path, n_kills, rng):
    (tmp_path / "a").mkdir(); (tmp_path / "b").mkdir()
    ingest(night, tmp_path / "a" / "n.zarr", chunk_rows=5, progress=False)
    expected = digest(tmp_path / "a" / "n.zarr")
    met = kill_often(night, tmp_path / "b", n_kills, rng, expected)
    report = ingest(night, tmp_path / "b" / "n.zarr", chunk_rows=5, progress=False)
    assert met >= n_kills // 2 and report.n_rows == 30 and names(report) == BAD and digest(tmp_path / "b" / "n.zarr") == expected
    assert (tmp_path / "a" / "n.refusals.csv").read_bytes() == (tmp_path / "b" / "n.refusals.csv").read_bytes()


@pytest.mark.parametrize("step", ["chunk", "commit", "torn", "publish"])
def test_death_at_each_step_of_a_write(night, tmp_path, monkeypatch, step):
    "The same with the moment chosen: between pixels and manifest, in the middle of a manifest line, in the middle of publishing."
    import specnb.ingest as module
    from specnb import commit
    class Died(BaseException): pass
    ingest(night, tmp_path / "a" / "n.zarr", chunk_rows=8, progress=False)
    ingest(find_files(night)[:14], tmp_path / "b" / "n.zarr", linear_grid(5000, 5015.98, .02), chunk_rows=8, progress=False)
    ingest(find_files(night)[:14], tmp_path / "c" / "n.zarr", linear_grid(5000, 5015.98, .02), chunk_rows=8, progress=False)
    published = dict(xr.open_zarr(tmp_path / "b" / "n.zarr").sizes)
    real = dict(chunk=commit.write_chunk, commit=Manifest.commit, publish=module.os.replace)
    count = [0]
    def dies(original, *args):
        count[0] += 1
        if count[0] == 2: raise Died
        return original(*args)
    def torn(self, records):
        with open(self.path, "a") as f: f.write('{"kind": "row", "file": "x", "size": 1}\n{"kind": "ro')
        raise Died
    with monkeypatch.context() as patch:
        if step == "chunk": patch.setattr(commit, "write_chunk", lambda *a: dies(real["chunk"], *a))
        if step == "commit": patch.setattr(Manifest, "commit", lambda *a: dies(real["commit"], *a))
        if step == "torn": patch.setattr(Manifest, "commit", torn)
        if step == "publish":
            patch.setattr(module, "publish", lambda store, manifest: half_published(real["publish"], module, store, manifest, Died))
        with pytest.raises(Died): ingest(night, tmp_path / "b" / "n.zarr", progress=False)
    if step != "publish":
        old = xr.open_zarr(tmp_path / "b" / "n.zarr").compute()
        assert dict(old.sizes)["spectrum"] >= published["spectrum"]
        for k in range(published["spectrum"]): np.testing.assert_array_equal(old.flux[k].values, star(int(old.spectrum_id.values[k][-3:])).flux[0])
    for folder in "bc": ingest(night, tmp_path / folder / "n.zarr", progress=False)
    assert digest(tmp_path / "b" / "n.zarr") == digest(tmp_path / "c" / "n.zarr")
    assert sorted(open_store(tmp_path / "b" / "n.zarr").spectrum_id.values) == sorted(open_store(tmp_path / "a" / "n.zarr").spectrum_id.values)


def half_published(replace, module, store, manifest, error):
    "Publish, but die after the seventh file has been moved in."
    moved = [0]
    def some(a, b):
        moved[0] += 1
        if moved[0] == 7: raise error
        replace(a, b)
    original, module.os.replace = module.os.replace, some
    try: real_publish(store, manifest)
    finally: module.os.replace = original


from specnb.ingest import publish as real_publish  # noqa: E402  (kept before any test replaces it)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_publishes_what_is_there_and_the_same_call_resumes(night, tmp_path, workers):
    code = SLOW.replace("n_workers=0", "n_workers=" + str(workers)).replace("time.sleep(.008)", "time.sleep(.02)").replace('register_reader("slow", slow, None, 99)', "register_reader('slow', slow, None, 99)" if not workers else "")
    if workers: code = code.replace("ingest(sys.argv[1]", "import specnb.ingest as m\nold = m._Writer.add\nm._Writer.add = lambda s, r: (time.sleep(.02), old(s, r))[1]\ningest(sys.argv[1]")
    process = run(code, night, tmp_path / "n.zarr")
    assert process.stdout.readline() == "ready\n"
    deadline = time.time() + 120
    while not (tmp_path / "n.zarr" / "flux" / "c" / "1").exists() and time.time() < deadline: time.sleep(.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in err and "done" not in out
    partial = validate(open_store(tmp_path / "n.zarr"))
    assert 5 <= partial.sizes["spectrum"] < 30
    report = ingest(night, tmp_path / "n.zarr", progress=False)
    assert report.n_read == 30 - partial.sizes["spectrum"] and report.n_rows == 30


@pytest.mark.parametrize("full_at, part", [(1, 0.), (3, .5), (5, .99)])
def test_full_disk_is_said_and_the_same_call_goes_on(night, tmp_path, monkeypatch, full_at, part):
    "The write of a chunk stops in the middle, in the background thread: nothing is half there, and with room again the bytes are the same."
    from specnb import chunks
    ingest(night, tmp_path / "a" / "n.zarr", chunk_rows=5, progress=False)
    real, count = chunks.write_atomically, [0]
    def full(path, *contents, **kwargs):
        if path.name == "0" and path.parts[-4] in ("flux", "ivar"):
            count[0] += 1
            if count[0] >= full_at:
                path.with_name(path.name + ".part").write_bytes(bytes(int(part * 1000)))
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *contents, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"): ingest(night, tmp_path / "b" / "n.zarr", chunk_rows=5, progress=False)
    manifest = Manifest(tmp_path / "b" / "n.manifest.jsonl")
    assert manifest.n_rows == 5 * ((full_at - 1) // 2)
    if manifest.n_rows: assert validate(open_store(tmp_path / "b" / "n.zarr")).sizes["spectrum"] == manifest.n_rows and verify_store(tmp_path / "b" / "n.zarr") == []
    report = ingest(night, tmp_path / "b" / "n.zarr", chunk_rows=5, progress=False)
    assert report.n_rows == 30 and digest(tmp_path / "a" / "n.zarr") == digest(tmp_path / "b" / "n.zarr")


@pytest.mark.parametrize("damage", ["zeros", "short", "missing", "none"])
@pytest.mark.parametrize("chunk", [0, 2, 5])
def test_power_loss_is_repaired_from_the_files(night, tmp_path, monkeypatch, damage, chunk):
    "The machine was started anew, and a chunk had not reached the disk: it and what came after it are read again."
    from specnb import commit
    ingest(night, tmp_path / "n.zarr", chunk_rows=5, progress=False)
    before, path = digest(tmp_path / "n.zarr"), tmp_path / "n.zarr" / "ivar" / "c" / str(chunk) / "0"
    content = path.read_bytes()
    if damage == "zeros": path.write_bytes(content[:4000] + bytes(len(content) - 4000))
    if damage == "short": path.write_bytes(content[:4000])
    if damage == "missing": path.unlink()
    monkeypatch.setattr(commit, "_boot", lambda: "another boot")
    report = ingest(night, tmp_path / "n.zarr", progress=False)
    assert report.n_rows == 30 and report.n_read == (0 if damage == "none" else 30 - 5 * chunk) and digest(tmp_path / "n.zarr") == before
    assert verify_store(tmp_path / "n.zarr") == []
    marks = (tmp_path / "n.manifest.jsonl").read_bytes()
    assert ingest(night, tmp_path / "n.zarr", progress=False).n_read == 0
    if chunk or damage == "none": assert b"verified" in marks and marks == (tmp_path / "n.manifest.jsonl").read_bytes()


def test_damage_is_found_where_it_is(night, tmp_path):
    ingest(night, tmp_path / "n.zarr", chunk_rows=7, progress=False)
    assert verify_store(tmp_path / "n.zarr") == []
    for k, variable, at in ((1, "flux", 0), (4, "ivar", 3000)):
        with open(tmp_path / "n.zarr" / variable / "c" / str(k) / "0", "r+b") as f:
            f.seek(at); old = f.read(1); f.seek(at); f.write(bytes([old[0] ^ 1]))
    assert verify_store(tmp_path / "n.zarr") == [(1, "flux"), (4, "ivar")]


def test_checksum_of_any_length_is_that_of_the_reference():
    "Published values of XXH64 with seed 0: every length of the tail, and more than one stripe of 32 bytes."
    reference = {b"": "ef46db3751d8e999", b"a": "d24ec4f1a98c6e5b", b"as": "1c330fb2d66be179", b"asd": "631c37ce72a97393", b"asdf": "415872f599cea71e",
                 b"Call me Ishmael. Some years ago--never mind how long precisely-": "02a2e85470d6fd96"}
    assert {text: checksum(text) for text in reference} == reference
    values = {checksum(bytes(range(n))) for n in range(200)} | {checksum(np.arange(40, dtype="f4"))}
    assert len(values) == 201
    for n in (7, 31, 32, 33, 100):
        text = bytearray(range(n))
        text[n // 2] ^= 4
        assert checksum(bytes(text)) != checksum(bytes(range(n)))


# ---- packed

@pytest.mark.parametrize("scale", [1e-19, 1e-3, 1., 3e6, 1e20])
def test_packing_loses_what_it_says(scale, rng):
    flux = (scale * rng.normal(100, 2, 20_000)).astype("f4")
    ivar = np.where(rng.random(20_000) < .1, 0, 1 / (2 * scale)**2)
    if not np.isfinite(ivar.astype("f4")).all() or (ivar[ivar > 0].astype("f4") == 0).any(): flux, ivar, scale = (flux / scale).astype("f4"), ivar * scale**2, 1.
    ivar = ivar.astype("f4")
    flux[ivar == 0] = 0
    flux[77], ivar[77] = 3000 * 100 * scale, ivar.max()
    small, weight, unit = pack(flux, ivar)
    usable = weight > 0
    assert small.dtype == weight.dtype == np.float16 and not usable[77] and (usable == (ivar > 0))[np.arange(20_000) != 77].all() and np.log2(unit) % 1 == 0
    assert np.abs(small[usable].astype(float) * unit / flux[usable] - 1).max() <= 2**-11
    assert np.abs(weight[usable].astype(float) / unit**2 / ivar[usable] - 1).max() <= 2**-11


def test_packed_store_appends_resumes_and_is_half_as_large(night, tmp_path):
    full, half = tmp_path / "full.zarr", tmp_path / "half.zarr"
    ingest(night, full, chunk_rows=5, progress=False)
    for pattern in ("deep/*1.fits", "deep/*", ""): report = ingest(night / pattern if pattern else night, half, linear_grid(5000, 5015.98, .02), chunk_rows=5, packed=True if pattern == "deep/*1.fits" else None, progress=False)
    assert report.n_rows == 30 and verify_store(half) == []
    size = lambda store: sum(p.stat().st_size for v in ("flux", "ivar") for p in (store / v).rglob("0"))
    assert size(half) <= .55 * size(full)
    a, b = open_store(full).sortby("spectrum_id"), open_store(half).sortby("spectrum_id")
    np.testing.assert_allclose((b.flux * b.flux_scale).values, a.flux.values, rtol=2**-11)
    np.testing.assert_allclose((b.ivar / b.flux_scale**2).values, a.ivar.values, rtol=2**-10)
    with pytest.raises(StoreError, match="is packed"): ingest(night, half, packed=False, progress=False)
    with pytest.raises(StoreError, match="is not packed"): ingest(night, full, packed=True, progress=False)


def test_only_one_process_at_a_time(night, tmp_path):
    from specnb.ingest import _locked
    ingest(night / "deep" / "t001.fits", tmp_path / "n.zarr", progress=False)
    with _locked(tmp_path / "n.manifest.jsonl"), pytest.raises(StoreError, match="another process"): ingest(night, tmp_path / "n.zarr", progress=False)
    assert ingest(night, tmp_path / "n.zarr", progress=False).n_rows == 30


# ---- duplicates

def test_duplicates_of_all_three_kinds(tmp_path):
    write_adp(star(1), tmp_path / "a.fits")
    shutil.copy(tmp_path / "a.fits", tmp_path / "b.fits")
    write_adp(star(1, sigma=3.), tmp_path / "c.fits")
    for i, name in ((2, "d"), (3, "e")):
        write_adp(star(i), tmp_path / f"{name}.fits")
        with fits.open(tmp_path / f"{name}.fits", mode="update") as hdus: hdus[0].header.update(PROV1="HARPS.2012-04-03T09:49:36.348.fits", INSTRUME="HARPS")
    report = ingest(tmp_path, tmp_path / "n.zarr", seed=None, progress=False)
    assert report.n_rows == 2 and dict(zip(names(report), [r.split(" ")[0:2] for r in report.refused.reason])) == {"b.fits": ["an", "identical"], "c.fits": ["spectrum_id", "star-001"], "e.fits": ["another", "product"]}
    assert set(report.refused.error) == {"Duplicate"}
    assert "a.fits" in report.refused.reason[0] and "d.fits" in report.refused.reason[2]


# ---- grids

def test_given_grid_other_medium_and_frame(night, tmp_path):
    wanted = xr.DataArray(log_grid(5002, 5014, 1000), attrs=dict(medium="vacuum", frame="topocentric"))
    ds = ingest(night, tmp_path / "n.zarr", wanted, progress=False).open()
    assert ds.wavelength.attrs == dict(units="Angstrom", medium="vacuum", frame="topocentric")
    line = ds.wavelength.values[ds.flux.mean("spectrum").values.argmin()]
    np.testing.assert_allclose(line, 5008 * 1.00027894 * (1 - 10 / 299792.458), atol=.02)


def test_resampling_conserves_flux_and_propagates_ivar(tmp_path):
    ds = star(3)
    write_adp(ds, tmp_path / "a.fits")
    grid = linear_grid(5000.5, 5015, .1)
    row = ingest(tmp_path / "a.fits", tmp_path / "n.zarr", grid, progress=False).open().isel(spectrum=0)
    flux, ivar = resample(ds.wavelength.values, ds.flux.values[0], ds.ivar.values[0], grid)
    np.testing.assert_allclose(row.flux, flux, rtol=1e-5)
    np.testing.assert_allclose(row.ivar, ivar, rtol=1e-5)
    native = ds.flux.sel(wavelength=slice(5000.4501, 5014.95)).mean().item()
    np.testing.assert_allclose(row.flux.mean(), native, rtol=3e-3)


def test_other_grid_is_a_clear_error_and_nothing_is_lost(night, tmp_path):
    ingest(night, tmp_path / "n.zarr", progress=False)
    before = digest(tmp_path / "n.zarr")
    for bad in (linear_grid(5000, 5010, .02), xr.DataArray(linear_grid(5000, 5015.98, .02), attrs=dict(medium="vacuum")), xr.DataArray(linear_grid(5000, 5015.98, .02), attrs=dict(frame="rest"))):
        with pytest.raises(StoreError, match="another grid"): ingest(night, tmp_path / "n.zarr", bad, progress=False)
    for bad in ([5000., 4999.], [5000.], [[5000., 5001.]], [5000., np.nan]):
        with pytest.raises(ValueError, match="wavelength"): ingest(night, tmp_path / "bad.zarr", bad, progress=False)
    assert digest(tmp_path / "n.zarr") == before and not (tmp_path / "bad.manifest.jsonl").exists()


def test_frames_that_cannot_meet_are_refused_unless_stated(night, tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(night / "deep", folder)
    write_adp(star(80, frame="topocentric", berv=np.nan), folder / "t080.fits")
    write_adp(star(81, frame="topocentric", berv=10.), folder / "t081.fits")
    report = ingest(folder, tmp_path / "n.zarr", linear_grid(5001, 5014, .02), progress=False)
    assert names(report) == ["t080.fits"] and "it has no berv" in report.refused.reason[0] and report.n_rows == 31
    assert ingest(folder, tmp_path / "m.zarr", linear_grid(5001, 5014, .02), progress=False, read_options=dict(frame="barycentric")).n_rows == 32


def test_hole_in_the_wavelength_is_not_filled(tmp_path):
    ds = star(5, n=1500)
    ds = ds.isel(wavelength=np.r_[0:500, 1000:1500])
    write_adp(ds, tmp_path / "h.fits")
    row = ingest(tmp_path / "h.fits", tmp_path / "n.zarr", linear_grid(5000, 5029, .03), progress=False).open().isel(spectrum=0)
    inside = (row.wavelength > 5010.1) & (row.wavelength < 5019.9)
    assert (row.ivar.values[inside] == 0).all() and (row.ivar.values[(row.wavelength < 5009.9) & (row.wavelength > 5000.1)] > 0).all()


@pytest.mark.parametrize("shift, n", [(0, 800), (37, 700), (-37, 800), (790, 800), (-790, 800)])
def test_aligned_pixels_are_copied(shift, n):
    grid = 5000 + .02 * np.arange(800)
    wave = 5000 + .02 * (np.arange(n) + shift)
    flux = np.arange(1., n + 1)
    out, ivar = onto_grid(wave, flux, np.ones(n), grid)
    expected = np.zeros(800)
    to, start = max(shift, 0), max(-shift, 0)
    m = min(800 - to, n - start)
    expected[to:to + m] = flux[start:start + m]
    np.testing.assert_array_equal(out, expected.astype("f4"))
    np.testing.assert_array_equal(ivar > 0, expected > 0)


def test_fill_jumps_leaves_an_even_and_a_log_scale_alone():
    for wave in (linear_grid(5000, 5100, .1), log_grid(3700, 9000, 3000)):
        assert fill_jumps(wave, np.ones(wave.size), np.ones(wave.size))[0] is wave


def test_chosen_grid_suits_the_most_files(tmp_path):
    write_adp(star(0, start=8000), tmp_path / "odd.fits")
    for i in range(1, 6): write_adp(star(i, start=5000 + .02 * i), tmp_path / f"s{i}.fits")
    report = ingest(tmp_path, tmp_path / "n.zarr", progress=False)
    assert report.n_rows == 5 and names(report) == ["odd.fits"]
    wave = report.open().wavelength.values
    np.testing.assert_allclose([wave[0], wave[-1], wave[1] - wave[0]], [5000.1, 5016, .02], atol=1e-6)


def test_min_coverage(tmp_path):
    for i, n in enumerate((800, 300)): write_adp(star(i, n=n), tmp_path / f"s{i}.fits")
    report = ingest(tmp_path, tmp_path / "n.zarr", linear_grid(5000, 5015.98, .02), min_coverage=.5, progress=False)
    assert report.n_rows == 1 and "37.5% of the grid" in report.refused.reason[0]


# ---- stores that do not fit

def test_foreign_damaged_and_existing_stores(night, tmp_path):
    save_store(star(0), tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="not written by ingest"): ingest(night, tmp_path / "s.zarr", progress=False)
    ingest(night, tmp_path / "n.zarr", progress=False)
    with pytest.raises(FileExistsError, match="append=True"): ingest(night, tmp_path / "n.zarr", append=False, progress=False)
    (tmp_path / "n.zarr" / "ivar" / "c" / "0" / "0").unlink()
    with pytest.raises(StoreError, match="missing or damaged"): ingest(night, tmp_path / "n.zarr", progress=False)
    assert ingest(night, tmp_path / "n.zarr", overwrite=True, progress=False).n_read == 30
    (tmp_path / "n.manifest.jsonl").write_text("")
    with pytest.raises(StoreError, match="not a manifest"): ingest(night, tmp_path / "n.zarr", progress=False)


def test_rows_added_behind_our_back_are_noticed(night, tmp_path):
    ingest(night, tmp_path / "n.zarr", progress=False)
    extra = open_store(tmp_path / "n.zarr").isel(spectrum=[0]).compute()
    save_store(extra.assign_coords(spectrum_id=("spectrum", ["other"])), tmp_path / "n.zarr", append=True)
    with pytest.raises(StoreError, match="added by something else"): ingest(night, tmp_path / "n.zarr", progress=False)


def test_nothing_readable_gives_a_report_and_no_store(night, tmp_path):
    report = ingest([night / "page.fits", night / "ccf.fits"], tmp_path / "n.zarr", progress=False)
    assert (report.n_rows, len(report.refused)) == (0, 2) and not (tmp_path / "n.zarr").exists() and (tmp_path / "n.refusals.csv").exists()
    report = ingest([night / "page.fits", night / "far.fits"], tmp_path / "m.zarr", linear_grid(5000, 5010, .02), progress=False)
    assert (report.n_rows, len(report.refused)) == (0, 2)
    assert ingest(night, tmp_path / "m.zarr", progress=False).n_rows == 30


def test_unforeseen_errors_become_refusals(night, tmp_path):
    def bug(path, hdus):
        if "t00" in str(path): raise RuntimeError("a bug")
        return False
    register_reader("buggy", bug, None, priority=99)
    try: report = ingest(night / "deep", tmp_path / "n.zarr", progress=False, n_workers=0)
    finally: unregister_reader("buggy")
    assert report.n_rows == 24 and len(report.refused) == 6 and report.refused.reason.str.contains("'buggy' failed with RuntimeError: a bug").all()


def test_readers_that_cannot_travel_are_said_to_be_so(night, tmp_path):
    register_reader("local", lambda p, h: False, None, priority=99)
    try:
        with pytest.raises(ValueError, match="cannot travel"): ingest(night, tmp_path / "n.zarr", n_workers=2, progress=False)
    finally: unregister_reader("local")
    assert ingest(night, tmp_path / "n.zarr", n_workers=0, progress=False).n_rows == 30


def test_fuzzed_files_never_stop_a_run(night, tmp_path, rng):
    folder = tmp_path / "raw"
    shutil.copytree(night / "deep", folder)
    victims = rng.choice(find_files(folder), 16, replace=False)
    for k, path in enumerate(victims):
        content = bytearray(path.read_bytes())
        if k % 2: content = content[:rng.integers(len(content))]
        else:
            for _ in range(10): content[rng.integers(5760)] = rng.integers(256)
        path.write_bytes(content)
    report = ingest(folder, tmp_path / "n.zarr", progress=False)
    assert report.n_rows + len(report.refused) == 30 and report.n_rows >= 14 and report.refused.reason.str.len().min() > 5
    validate(report.open())


def test_memory_stays_bounded(tmp_path):
    "The peak above a small ingest is far below the size of the store, and does not grow with it."
    for i in range(72): write_adp(star(i, n=60_000, step=.05, start=4000), tmp_path / f"s{i:02d}.fits")
    code = """
import sys, resource
from pathlib import Path
from specnb.ingest import ingest
files, folder, peak = sorted(Path(sys.argv[1]).glob("*.fits")), sys.argv[1], []
for n in (2, 24, 72):
    ingest(files[:n], f"{folder}/{n}.zarr", progress=False, chunk_rows=2, n_workers=0)
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peak[1] - peak[0], peak[2] - peak[1])
"""
    out, err = run(code, tmp_path).communicate(timeout=240)
    above, growth = (int(kb)*1024 for kb in out.split())
    assert err == "" and above + growth < .4*72*60_000*8 and growth < .2*48*60_000*8


def test_a_worker_that_lives_on_takes_a_replaced_reader(tmp_path, monkeypatch):
    "The processes of a cluster stay from call to call, and with them what was registered there."
    (tmp_path / "home_made.py").write_text("""
import numpy as np
from specnb.fits import assemble
def mine(path, hdus): return str(path).endswith(".mine")
def level(path, flux): return assemble(path, 5000 + np.arange(50.), flux + np.arange(50.), {}, error=np.ones(50), medium=("air", "rule"), frame=("rest", "rule"))
def first(path, hdus): return level(path, 100.)
def second(path, hdus): return level(path, 200.)
""")
    monkeypatch.syspath_prepend(tmp_path)
    home_made = importlib.import_module("home_made")
    found = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in ("first", "second"):
            (tmp_path / f"{name}.mine").write_text(name)
            register_reader("home-made", home_made.mine, getattr(home_made, name), replace=True)
            try: found.append(ingest(tmp_path / f"{name}.mine", tmp_path / f"{name}.zarr", 5000 + np.arange(50.), n_workers=pool, progress=False).open().flux.values[0, 0])
            finally: unregister_reader("home-made")
    assert found == [100, 200]


# ---- real folders

REAL = {"harps_full": (4, 2), "harps_timeseries": (179, 0), "derived_harps_adp": (3, 0), "uves_pipeline_images": (6, 0), "lamost_dr1": (40, 0), "miles": (4, 0)}


@pytest.mark.parametrize("folder", REAL)
def test_real_folders(shared_data, tmp_path, folder):
    report = ingest(shared_data / folder, tmp_path / "r.zarr", progress=False, n_workers=0)
    assert (report.n_rows, len(report.refused)) == REAL[folder]
    validate(xr.open_zarr(tmp_path / "r.zarr"))


def test_uves_on_a_grid_of_both_arms(shared_data, tmp_path):
    report = ingest(shared_data / "eso_adp_uves", tmp_path / "u.zarr", linear_grid(3290, 6830, .03), progress=False, n_workers=0)
    ds = report.open()
    assert report.n_rows == 7 and len(report.refused) == 0 and (ds.flag.values != "").sum() == 1
    red = ds.isel(spectrum=int(np.flatnonzero(ds.spectrum_id.values == "ADP.2020-06-19T10:12:40.152")[0]))
    assert (red.ivar.sel(wavelength=slice(5763, 5834)) == 0).all() and float(red.flux.sel(wavelength=slice(5762, 5835)).max()) < 1.2 * float(red.flux.quantile(.999))


def test_products_of_one_exposure_meet_once(shared_data, tmp_path):
    paths = [shared_data / f for f in ("harps_full", "harps_timeseries", "derived_harps_adp", "eso_adp_uves")]
    report = ingest(paths, tmp_path / "all.zarr", linear_grid(6275, 6315.95, .01), progress=False, n_workers=0)
    counts = report.refused.error.value_counts()
    assert report.n_rows + len(report.refused) == 195 and counts["Duplicate"] == 3 and counts["NotASpectrum"] == 2
    ds = report.open()
    assert len(set(ds.exposure.values)) == ds.sizes["spectrum"]


def test_medium_and_frame_of_a_bare_grid_are_those_of_most_files(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    write_adp(star(0, frame="topocentric", berv=np.nan), folder / "a000.fits")
    for i in range(1, 5): write_adp(star(i), folder / f"b{i:03d}.fits")
    grid = linear_grid(5001, 5014, .02)
    report = ingest(folder, tmp_path / "n.zarr", grid, progress=False, seed=None)
    assert report.open().wavelength.attrs["frame"] == "barycentric" and names(report) == ["a000.fits"] and report.n_rows == 4
    assert np.array_equal(report.open().wavelength, grid)


def test_a_frame_that_was_guessed_is_told_as_a_guess(tmp_path):
    from astropy.io import fits
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(3): write_adp(star(i), folder / f"b{i}.fits")
    fits.writeto(folder / "plain.fits", 100 + np.random.default_rng(0).normal(0, 1, 800).astype("f4"), fits.Header({"CRVAL1": 5000., "CDELT1": .02, "CRPIX1": 1., "CUNIT1": "Angstrom"}))
    write_adp(star(9, frame="topocentric", berv=np.nan), folder / "stated.fits")
    report = ingest(folder, tmp_path / "n.zarr", progress=False)
    told = {name: (reason, mend) for name, reason, mend in zip(names(report), report.refused.reason, report.refused.mend)}
    assert set(told) == {"plain.fits", "stated.fits"}
    assert told["plain.fits"][0] == "its frame is taken to be topocentric, since the header names no frame, the store's is barycentric, and it has no berv"
    assert told["stated.fits"][0] == "its frame is topocentric, the store's is barycentric, and it has no berv"
    assert all("read_options" in mend and "--frame topocentric" in mend for _, mend in told.values())


def test_the_report_tells_of_thin_rows_and_of_the_commonest_refusals(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(3): write_adp(star(i), folder / f"a{i}.fits")
    write_adp(star(3, n=200), folder / "short.fits")
    for i in range(3): write_adp(star(10 + i, start=6000. + 7 * i), folder / f"far{i}.fits")
    for i in range(2): (folder / f"empty{i}.fits").touch()
    grid = linear_grid(5000, 5015.9, .02)
    text = repr(ingest(folder, tmp_path / "n.zarr", grid, progress=False))
    assert "1 of 4 rows cover less than half of the grid" in text and "--min-coverage" in text
    first, second = [line for line in text.splitlines() if " refused: " in line]
    assert first.startswith("  3 refused: it covers 60") and second == "  2 refused: the file is empty (0 bytes)" and "n.refusals.csv" in text
    strict = ingest(folder, tmp_path / "m.zarr", grid, progress=False, min_coverage=.5)
    assert strict.n_rows == 3 and strict.n_sparse == 0 and "short.fits" in names(strict) and "less than half" not in repr(strict)
    assert repr(ingest(folder / "a0.fits", tmp_path / "k.zarr", progress=False)) == "1 spectra read, 0 files refused; k.zarr has 1 rows"
