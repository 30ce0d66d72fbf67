"""Speed of specnb.loader beside rows of a memory-mapped array, and the memory of an epoch over a large store.

Run `python tests/benchmarks/bench_loader.py [--rows 240] [--rounds 5] [--folder PLACE]`. The store holds full-length spectra (312,501 pixels, flux and inverse variance in
float32), written by specnb.ingest's own chunks, all in the cache of the system. The rival takes rows at random from two numpy.memmap arrays of the same numbers, in batches of the same size,
and hands them to torch: `torch.from_numpy(flux[rows])`. It masks nothing and divides by nothing. Contestants take turns; medians of the ratios are printed, by the clock and in seconds of the processor.
"""
import os
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")
import argparse, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch, xarray as xr, zarr
from specnb.ingest import Grid, new_manifest, pack, publish, write_chunk
from specnb.loader import SpectrumLoader, SpectrumRows
from specnb.prep import PrepRecipe
from specnb.spectra import open_store
from specnb.wave import linear_grid


def make_store(folder, name, n, wave, packed=False, chunk_rows=12):
    "A store as ingest leaves it, and the same numbers as two plain arrays."
    manifest = new_manifest(folder / f"{name}.manifest.jsonl", Grid(wave, "air", "barycentric"), chunk_rows, packed)
    rng, rows = np.random.default_rng(0), []
    base = rng.normal(100, 3, wave.size).astype("f4")
    ivar = rng.uniform(.1, .2, wave.size).astype("f4"); ivar[150_000:153_000] = 0
    for i in range(n):
        flux = np.where(ivar > 0, np.roll(base, i), 0).astype("f4")
        row = (flux, ivar) if not packed else pack(flux, ivar)[:2]
        rows.append(row)
        if len(rows) == chunk_rows or i == n - 1:
            write_chunk(folder / f"{name}.zarr", i // chunk_rows, rows, chunk_rows)
            manifest.commit([dict(kind="row", file=f"{k}", size=0, mtime=0, sum=str(k), coords=dict(spectrum_id=f"s{k}", object=f"HD {k}", ivar_origin="pipeline") | (dict(flux_scale=1.) if packed else {})) for k in range(i + 1 - len(rows), i + 1)])
            rows = []
    publish(folder / f"{name}.zarr", manifest)
    return folder / f"{name}.zarr"


def clock(run):
    start, cpu = time.perf_counter(), time.process_time()
    n = run()
    return (time.perf_counter() - start) / n, (time.process_time() - cpu) / n


def epoch(loader): return sum(len(flux) for flux, *_ in loader)


def mapped(planes, bs, rng):
    order, n = rng.permutation(len(planes[0])), 0
    for start in range(0, len(order), bs):
        rows = order[start:start + bs]
        flux, ivar = (torch.from_numpy(plane[rows]) for plane in planes)
        n += len(flux)
    return n


def bench_speed(folder, n, rounds, bs=32):
    wave = linear_grid(3785., 6910., .01)
    store, half = make_store(folder, "full", n, wave), make_store(folder, "half", n, wave, packed=True)
    planes, rng = [], np.random.default_rng(1)
    for name in ("flux", "ivar"):
        plane = np.memmap(folder / f"{name}.raw", "<f4", "w+", shape=(n, wave.size))
        for k in range(0, n, 12): plane[k:k + 12] = np.fromfile(store / name / "c" / str(k // 12) / "0", "<f4").reshape(12, -1)[:n - k]
        plane.flush()
        planes.append(np.memmap(folder / f"{name}.raw", "<f4", "r", shape=(n, wave.size)))
    loader = lambda path, recipe, **kwargs: SpectrumLoader(SpectrumRows(open_store(path), np.arange(n), recipe, memory_limit=0), bs=bs, shuffle=True, **kwargs)
    raw = PrepRecipe(normalise=None)
    loaders = {"ours, as stored": loader(store, raw), "ours, as stored, one thread": loader(store, raw, n_threads=1), "ours, divided by the median": loader(store, PrepRecipe()), "ours, packed": loader(half, raw)}
    assert all(l.dataset.raw for l in loaders.values())
    contestants = {"memory map": lambda: mapped(planes, bs, rng)} | {name: (lambda l=l: epoch(l)) for name, l in loaders.items()}
    for run in contestants.values(): run()
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items(): seconds[name].append(clock(run))
    for name, s in seconds.items():
        wall, cpu = (np.array(seconds["memory map"]) / np.array(s)).T
        times = 1 / np.median(s, axis=0)
        print(f"  {name:30} {times[0]:6.0f} rows a second" + ("" if name == "memory map" else f"; {np.median(wall):.2f} of the memory map (from {wall.min():.2f} to {wall.max():.2f}), {np.median(cpu):.2f} per second of the processor"), flush=True)
    first = [loader(store, raw, seed=4), loader(store, raw, seed=4)]
    same = [f.get_idxs() for f in first]
    print(f"one epoch's order is the same again: {same[0] == same[1]}; every row once: {sorted(same[0]) == list(range(n))}", flush=True)


CHILD = """
import resource, sys
import numpy as np
from specnb.loader import SpectrumLoader, SpectrumRows
from specnb.prep import PrepRecipe
from specnb.spectra import open_store
resource.setrlimit(resource.RLIMIT_AS, (1 << 46, resource.getrlimit(resource.RLIMIT_AS)[1])) # an address space with an end
ds = open_store(sys.argv[1])
loader = SpectrumLoader(SpectrumRows(ds, np.arange(ds.sizes["spectrum"]), PrepRecipe(), memory_limit=0), bs=int(sys.argv[3]), shuffle=True)
next(iter(loader))
used = int(open("/proc/self/statm").read().split()[0]) * 4096
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1e3
base = peak()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_AS)[1]))
seen = sorted(int(p) for _ in loader for p in loader.positions)
assert seen == list(range(ds.sizes["spectrum"]))
print(base, peak())
"""


def bench_memory(folder, bs=8):
    "One epoch under a cap on further memory, over a store at least three times as large."
    store = folder / "full.zarr"
    size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    cap = size // 3
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, store, str(cap), str(bs)], capture_output=True, text=True)
    if done.returncode: print(f"memory: the epoch failed under a cap of {cap / 1e6:.0f} MB\n{done.stderr[-800:]}"); return
    base, peak = map(float, done.stdout.split())
    print(f"memory: store {size / 1e6:.0f} MB, cap on growth {cap / 1e6:.0f} MB; the process held {base:.0f} MB after its first batch and at most {peak:.0f} MB during the epoch (batches of {bs})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to put the stores; a temporary folder if not given")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, zarr {zarr.__version__}, xarray {xr.__version__}; {platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        print(f"{arguments.rows} rows of 312,501 pixels, flux and ivar, batches of 32, warm:", flush=True)
        bench_speed(Path(scratch), arguments.rows, arguments.rounds)
        bench_memory(Path(scratch))


if __name__ == "__main__": main()
