"""Speed of specnb.ingest beside a loop over astropy and zarr, size and loss of a packed store, and kills at random moments.

Run `python tests/benchmarks/bench_ingest.py [--files 200] [--kills 50] [--quick]`. The files are synthetic HARPS Phase 3 products: one row of
313,000 pixels (float64 wavelengths, float32 flux and error) and 380 header cards. Contestants take turns, each writes the same rows (flux, inverse
variance, the same coordinates) on the same grid, and the median of the ratios is printed, so that a busy machine slows both. Everyone is one process with the same cores; ours reads the next file and writes the last chunk in threads of its own, which the clock shows and the seconds of the processor do not.

The rivals are what a careful user writes: open each file with astropy, take the cards and the columns, bring them to the grid with numpy.interp (cheaper
than ours, which conserves flux and propagates errors, where pixels do not coincide), and assign the row to a Zarr array; with the default compression of zarr and without any.
The last one also knows that the pixels coincide and copies a slice.
"""
import os
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")
import argparse, hashlib, platform, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import astropy, numba, xarray as xr, zarr
from astropy.io import fits
from specnb.ingest import ingest, verify_store
from specnb.wave import linear_grid, log_grid

CARDS = {"object": "OBJECT", "instrument": "INSTRUME", "program": "PROG_ID", "mjd_obs": "MJD-OBS", "exptime": "EXPTIME", "ra": "RA", "dec": "DEC", "snr": "SNR",
         "berv": "ESO DRS BERV", "airmass": "ESO TEL AIRM START", "spectrum_id": "ARCFILE", "date": "DATE-OBS", "frame": "SPECSYS", "seeing": "ESO TEL AMBI FWHM START"}


def make_files(folder, n_files, n_pixels, n_cards=380):
    "Synthetic products on the pixels of HARPS, each with its own first pixel and gap."
    rng = np.random.default_rng(0)
    spectrum = 100 * (1 + .3 * np.sin(np.arange(n_pixels) / 9e3)) * (1 - .5 * (rng.random(n_pixels) < .02))
    for i in range(n_files):
        m = n_pixels - int(rng.integers(0, 40))
        wave = (378_100 + int(rng.integers(0, 60)) + np.arange(m)) * .01
        flux, error = rng.normal(spectrum[:m], 3).astype(">f4"), (3 + rng.random(m)).astype(">f4")
        flux[(gap := m // 2 + int(rng.integers(0, 100))):gap + m // 95] = 0
        stamp = f"2012-01-{1 + i // 60 % 28:02d}T11:{i % 60:02d}:{i // 1680:02d}.000"
        header = fits.Header({"OBJECT": f"HD{1000 + i % 37}", "INSTRUME": "HARPS", "MJD-OBS": 55000. + i, "EXPTIME": 900., "RA": 10., "DEC": -20., "SPECSYS": "BARYCENT", "PRODCATG": "SCIENCE.SPECTRUM",
                              "PROG_ID": "088.C-0011(A)", "SNR": 50. + i % 30, "ARCFILE": f"ADP.{stamp}.fits", "DATE-OBS": stamp, "HIERARCH ESO TEL AIRM START": 1.1, "HIERARCH ESO TEL AIRM END": 1.2,
                              "HIERARCH ESO DRS BERV": float(rng.normal(0, 15)), "HIERARCH ESO TEL AMBI FWHM START": .9})
        while len(header) < n_cards - 44: header[f"HIERARCH ESO INS SENS{len(header)} VAL"] = (1.01 * len(header), "some sensor [K]")
        table = fits.BinTableHDU.from_columns([fits.Column(n, f"{m}{f}", unit=u, array=a[None]) for n, f, u, a in (("WAVE", "D", "angstrom", wave), ("FLUX", "E", "adu", flux), ("ERR", "E", "adu", error))])
        table.header.update(VOCLASS="SPECTRUM V2.0", TUCD1="em.wl;obs.atmos", NELEM=m)
        while len(table.header) < 40: table.header[f"KEY{len(table.header)}"] = ("something", "about the product")
        fits.HDUList([fits.PrimaryHDU(header=header), table]).writeto(folder / f"ADP.{stamp.replace(':', '_')}.fits")
    with fits.open(next(folder.glob("*.fits"))) as hdus: return sum(len(h.header) for h in hdus)


def rival(files, store, grid, compressed, slices=False):
    "A loop over astropy and zarr."
    kind = {} if compressed else dict(compressors=None)
    group = zarr.open_group(store, mode="w")
    flux, ivar = (group.create_array(n, shape=(len(files), grid.size), chunks=(1, grid.size), dtype="f4", **kind) for n in ("flux", "ivar"))
    rows = []
    for i, file in enumerate(files):
        with fits.open(file) as hdus:
            header, data = hdus[0].header, hdus[1].data
            rows.append({name: header.get(card) for name, card in CARDS.items()})
            wave, f, e = (data[n][0] for n in ("WAVE", "FLUX", "ERR"))
            if slices:
                start, to = max(0, round((grid[0] - wave[0]) / .01)), max(0, round((wave[0] - grid[0]) / .01))
                n = min(wave.size - start, grid.size - to)
                a, b = np.zeros((2, grid.size), "f4")
                a[to:to + n], b[to:to + n] = f[start:start + n], e[start:start + n]
            else: a, b = np.interp(grid, wave, f, 0, 0), np.interp(grid, wave, e, 0, 0)
            flux[i], ivar[i] = a, np.where((b > 0) & (a != 0), 1 / np.where(b > 0, b, 1)**2, 0)
    xr.Dataset({name: ("row", [r[name] for r in rows]) for name in CARDS}).to_zarr(store, mode="a", zarr_format=3, consolidated=False)


def clock(run):
    "Seconds of the clock, and of the processor in all threads of this process."
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def forget(files):
    "Ask the system to drop the files from its cache."
    os.sync()
    for file in files:
        with open(file, "rb") as f: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_speed(files, folder, rounds):
    aligned, other = (xr.DataArray(g, attrs=dict(medium="air", frame="barycentric")) for g in (linear_grid(3782., 6910., .01), log_grid(3782., 6910., 312_501)))
    stores = iter(range(10_000))
    new = lambda: folder / f"s{next(stores)}.zarr"
    def ours(grid, **kwargs): return lambda: ingest(files, new(), grid, progress=False, **{"n_workers": 0} | kwargs)
    contestants = {"ours": ours(aligned), "ours, packed": ours(aligned, packed=True), "astropy + interp + zarr": lambda: rival(files, new(), aligned.values, True),
                   "astropy + interp + zarr, uncompressed": lambda: rival(files, new(), aligned.values, False), "astropy + slice + zarr, uncompressed": lambda: rival(files, new(), aligned.values, False, True),
                   "ours, other pixels": ours(other), "astropy + interp + zarr, other pixels": lambda: rival(files, new(), other.values, True)}
    ingest(files[:3], new(), aligned, progress=False, n_workers=0); ingest(files[:3], new(), other, progress=False, n_workers=0); ingest(files[:3], new(), aligned, progress=False, n_workers=0, packed=True)
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(clock(run))
            for store in folder.glob("s*"): shutil.rmtree(store) if store.is_dir() else store.unlink()
            os.sync()
    for name, s in seconds.items():
        against = np.array(seconds["ours, other pixels" if "other pixels" in name else "ours"])
        wall, cpu = (np.array(s) / against).T
        times = 1e3 * np.median(s, axis=0) / len(files)
        print(f"  {name:40} {times[1]:6.2f} ms of the processor a file, {times[0]:6.2f} by the clock" + ("" if name.startswith("ours") else
              f"; ours takes {np.median(cpu):.1f} times less ({cpu.min():.1f} to {cpu.max():.1f}), by the clock {np.median(wall):.1f} ({wall.min():.1f} to {wall.max():.1f})"), flush=True)


def bench_cold(files, folder, rounds):
    "The share of the disk's own rate that an ingest reaches when nothing is in the cache."
    aligned, shares, rates = linear_grid(3782., 6910., .01), [], []
    n_bytes = sum(f.stat().st_size for f in files)
    for k in range(rounds):
        forget(files); plain = clock(lambda: [f.read_bytes() for f in files])[0]
        forget(files); mine = clock(lambda: ingest(files, folder / f"s{k}.zarr", aligned, progress=False, n_workers=0))[0]
        shares.append(plain / mine); rates.append(n_bytes / plain / 1e6)
        for store in folder.glob("s*"): shutil.rmtree(store) if store.is_dir() else store.unlink()
    print(f"cold: {np.median(shares):.2f} of the rate of reading the same files and doing nothing (from {min(shares):.2f} to {max(shares):.2f}); the disk gives {np.median(rates):.0f} MB/s", flush=True)


def bench_packed(files, folder):
    grid = linear_grid(3782., 6910., .01)
    plain, packed = (ingest(files[:24], folder / f"{name}.zarr", grid, progress=False, packed=name == "half").open() for name in ("full", "half"))
    size = [sum(p.stat().st_size for p in (folder / f"{name}.zarr").rglob("*") if p.is_file()) for name in ("half", "full")]
    flux, back, ivar = plain.flux.values, (packed.flux * packed.flux_scale).values, plain.ivar.values
    good = ivar > 0
    print(f"packed: {size[0] / size[1]:.3f} of the bytes; loss of flux at most {np.abs(back[good] / flux[good] - 1).max():.1e}, root mean square {np.sqrt(np.mean((back[good] / flux[good] - 1)**2)):.1e}, "
          f"in units of the noise {np.sqrt(np.mean((back[good] - flux[good])**2 * ivar[good])):.4f}; pixels lost {np.mean((packed.ivar.values > 0) != good):.1e}; damaged chunks {verify_store(folder / 'half.zarr')}", flush=True)


def digest(store): return hashlib.sha256(b"".join(str(p.relative_to(store)).encode() + p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file())).hexdigest()


def bench_kills(files, folder, n_kills):
    "Kill -9 after random times, start again; a store that got finished is compared and begun anew."
    code = "import sys\nfrom specnb.ingest import ingest\nprint('ready', flush=True)\ningest(sys.argv[1], sys.argv[2], chunk_rows=5, progress=False, n_workers=0)\nprint('done', flush=True)"
    start = time.perf_counter()
    ingest(files[0].parent, folder / "a" / "n.zarr", chunk_rows=5, progress=False, n_workers=0)
    whole = time.perf_counter() - start
    expected, rng, met, finished = digest(folder / "a" / "n.zarr"), np.random.default_rng(1), 0, 0
    while met < n_kills:
        process = subprocess.Popen([sys.executable, "-c", code, files[0].parent, folder / "b" / "n.zarr"], stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, .7 * whole))
        os.killpg(process.pid, signal.SIGKILL)
        if "done" not in process.communicate()[0]: met += 1; continue
        assert digest(folder / "b" / "n.zarr") == expected, "a store that was interrupted differs"
        finished += 1; shutil.rmtree(folder / "b")
    ingest(files[0].parent, folder / "b" / "n.zarr", chunk_rows=5, progress=False, n_workers=0)
    same = digest(folder / "b" / "n.zarr") == expected
    print(f"kills: {met} met a running ingest of {len(files)} files, {finished + 1} stores were finished in between and after; all identical byte for byte: {same}; damaged chunks {verify_store(folder / 'b' / 'n.zarr')}", flush=True)
    assert same


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="24 files, one round, 5 kills")
    arguments = parser.parse_args()
    if arguments.quick: arguments.files, arguments.rounds, arguments.kills = 24, 1, 5
    print(f"Python {platform.python_version()}, numpy {np.__version__}, astropy {astropy.__version__}, zarr {zarr.__version__}, numba {numba.__version__}; {platform.machine()}, {os.cpu_count()} cores, one process")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch); (folder / "raw").mkdir()
        cards = make_files(folder / "raw", arguments.files, 313_000)
        files = sorted((folder / "raw").glob("*.fits"))
        print(f"{len(files)} files of {files[0].stat().st_size / 1e6:.1f} MB, {cards} header cards, warm:", flush=True)
        for f in files: f.read_bytes()
        bench_speed(files, folder, arguments.rounds)
        bench_cold(files, folder, arguments.rounds)
        bench_packed(files, folder)
        (folder / "small").mkdir()
        make_files(folder / "small", 40, 20_000)
        bench_kills(sorted((folder / "small").glob("*.fits")), folder / "kills", arguments.kills)


if __name__ == "__main__": main()
