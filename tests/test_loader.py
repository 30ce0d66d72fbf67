"""Loader: every row once an epoch from any storage, in bounded memory, the same for the same seed."""
import subprocess
import sys

import dask.array
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from specnb.loader import RawStore, SpectrumLoader, SpectrumRows, epoch_groups, raw_store, ready_rows, spectrum_dataloaders
from specnb.prep import PrepRecipe
from specnb.spectra import make_spectra, open_store, save_store
from specnb.wave import doppler_shift, log_grid

RAW = PrepRecipe(normalise=None)


def numbered(n=90, n_pixels=40):
    "Spectrum i has flux i+1; pixel 3 of every third is a masked NaN."
    flux = np.repeat(np.arange(1., n + 1)[:, None], n_pixels, 1)
    ivar = np.ones_like(flux)
    ivar[::3, 3], flux[::3, 3] = 0, np.nan
    return make_spectra(flux, ivar, np.linspace(5000., 5100., n_pixels), [f"s{i}" for i in range(n)], medium="air", frame="rest",
                        coords=dict(object=[f"star {i//3}" for i in range(n)]))


@pytest.fixture
def store(tmp_path):
    return open_store(save_store(numbered(), tmp_path/"spectra of stars.zarr", chunk_rows=8))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), chunk=st.integers(1, 60), buffer=st.integers(1, 120), seed=st.integers(0, 9), epoch=st.integers(0, 3), data=st.data())
def test_every_row_once_whatever_the_storage(n, chunk, buffer, seed, epoch, data):
    rows = np.flatnonzero(np.random.default_rng(data.draw(st.integers(0, 99))).random(n) < 0.7)
    if len(rows) == 0: rows = np.array([0])
    for shuffle in (False, True):
        groups = epoch_groups(rows, chunk, buffer, shuffle, (seed, epoch))
        order = np.concatenate(groups)
        assert sorted(order) == list(range(len(rows)))
        assert max(map(len, groups)) <= max(buffer, chunk)
        if not shuffle: assert list(order) == list(range(len(rows)))


@pytest.mark.parametrize("bs", [1, 7, 16, 200])
@pytest.mark.parametrize("drop_last", [False, True])
def test_store_and_memory_give_the_same_rows(store, bs, drop_last):
    rows = np.arange(5, 85)
    for limit in (0, 1e9):
        loader = SpectrumLoader(SpectrumRows(store, rows, RAW, memory_limit=limit), bs=bs, shuffle=True, drop_last=drop_last, buffer_rows=20, seed=4)
        assert (loader.dataset.cache is None) == (limit == 0)
        batches = list(loader)
        seen = [int(v) for flux, *_ in batches for v in flux[:, 0]]
        assert len(batches) == len(loader)
        assert sorted(seen) == list(rows + 1) if not drop_last else len(seen) == len(set(seen)) == 80//bs*bs
        for flux, ivar, target, target_ivar in batches:
            assert flux.dtype == ivar.dtype == torch.float32 and torch.equal(flux, target) and torch.equal(ivar, target_ivar)
            assert torch.isfinite(flux).all() and (flux[ivar == 0] == 0).all()


def test_memory_is_bounded_by_the_buffer(store):
    data, largest = SpectrumRows(store, np.arange(90), RAW, memory_limit=0), []
    read = data._read
    data._read = lambda rows: (largest.append(len(rows)), read(rows))[1]
    list(SpectrumLoader(data, bs=10, shuffle=True, buffer_rows=24))
    assert sum(largest) == 90 and max(largest) <= 24


def test_chunks_are_read_once_an_epoch(store):
    data, chunks = SpectrumRows(store, np.arange(90), RAW, memory_limit=0), []
    read = data._read
    data._read = lambda rows: (chunks.extend(np.unique(rows//8)), read(rows))[1]
    list(SpectrumLoader(data, bs=10, shuffle=True, buffer_rows=24))
    assert sorted(chunks) == list(range(12))


def test_order_depends_on_seed_and_epoch_alone(store):
    def orders(seed, limit):
        loader = SpectrumLoader(SpectrumRows(store, np.arange(90), RAW, memory_limit=limit), bs=90, shuffle=True, seed=seed, buffer_rows=24)
        return [next(iter([b[0][:, 0].tolist() for b in loader])) for _ in range(3)]
    first = orders(1, 0)
    assert first == orders(1, 0) and first != orders(2, 0)
    assert len({tuple(o) for o in first}) == 3
    loader = SpectrumLoader(SpectrumRows(store, np.arange(90), RAW, memory_limit=0), bs=90, shuffle=True, seed=1, buffer_rows=24)
    loader.epoch = 2
    assert [b[0][:, 0].tolist() for b in loader][0] == first[2]


def test_stopping_in_the_middle_of_an_epoch_does_not_change_the_next(store):
    loader = SpectrumLoader(SpectrumRows(store, np.arange(90), RAW, memory_limit=0), bs=10, shuffle=True, buffer_rows=24)
    loader.one_batch()
    iterator = iter(loader); next(iterator); next(iterator); iterator.close()
    assert loader.epoch == 0
    assert sorted(int(v) for flux, *_ in loader for v in flux[:, 0]) == list(range(1, 91))


def test_copies_keep_settings_and_take_new_ones():
    loader = SpectrumLoader(SpectrumRows(numbered(), np.arange(30), RAW), bs=4, shuffle=True, seed=9)
    copy = loader.new(shuffle=False, bs=8)
    assert (copy.bs, copy.shuffle, copy.seed) == (8, False, 9) and copy.dataset is loader.dataset
    assert copy.get_idxs() == list(range(30))


def test_no_star_is_in_two_splits():
    ds = numbered(300)
    dls = spectrum_dataloaders(ds, bs=8, seed=3)
    stars = [set(ds.object.values[loader.dataset.rows]) for loader in dls.loaders]
    assert len(dls.loaders) == 3 and sum(map(len, stars)) == len(set.union(*stars)) == 100


def test_split_by_name_of_a_coordinate_and_left_out_rows():
    ds = numbered()
    words = np.where(np.arange(90) < 50, "train", np.where(np.arange(90) < 70, "valid", ""))
    dls = spectrum_dataloaders(ds.assign_coords(part=("spectrum", words)), split="part", bs=8)
    assert [len(loader.dataset) for loader in dls.loaders] == [50, 20]


def test_recipe_is_applied_everywhere():
    ds = numbered(300)
    recipe = PrepRecipe(wavelength_range=(5010., 5090.), mask_ranges=((5030., 5040.),), pad_to=48)
    dls = spectrum_dataloaders(ds, recipe, bs=8)
    flux, ivar, *_ = dls.train.one_batch()
    wave = dls.train.dataset.wavelength.values
    assert flux.shape == (8, 48) == (8, dls.train.dataset.n_pixels) == (8, len(wave))
    assert (ivar[:, (wave >= 5030) & (wave <= 5040)] == 0).all()
    valid = ivar > 0
    assert torch.allclose(flux[valid], torch.ones(())) and (flux[~valid] == 0).all()


def test_rows_without_any_measurement_become_zeros():
    ds = numbered()
    ds.ivar[4] = 0
    flux, ivar = ready_rows(ds, PrepRecipe())
    assert (flux[4] == 0).all() and (ivar[4] == 0).all() and np.isfinite(flux).all()


@pytest.mark.parametrize("split, message", [(["train"]*90, "split 'valid'"), (["train"]*3, "one word for each"), (["tain"]*90, "split holds")])
def test_bad_splits_are_named(split, message):
    with pytest.raises(ValueError, match=message): spectrum_dataloaders(numbered(), split=split)


@pytest.mark.parametrize("limit", [0, 1e9])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_coord_belongs_to_the_batch_in_hand(store, limit, drop_last):
    loader = SpectrumLoader(SpectrumRows(store, np.arange(5, 85), RAW, memory_limit=limit), bs=7, shuffle=True, drop_last=drop_last, buffer_rows=20, seed=4)
    for flux, *_ in loader: assert list(loader.batch_coord("spectrum_id")) == [f"s{int(value) - 1}" for value in flux[:, 0]]
    with pytest.raises(ValueError, match="no coordinate 'wavelength', only .*'object'.*: add it"): loader.batch_coord("wavelength")


def test_pixel_shift_moves_a_line_to_where_doppler_puts_it():
    wave = log_grid(4000., 7000., 5000)
    ds = make_spectra(np.ones((2, 5000)), np.ones((2, 5000)), wave, ["a", "b"], medium="air", frame="rest", coords=dict(object=["a", "b"]))
    for recipe in (RAW, PrepRecipe(normalise=None, pad_to=6000)):
        rows = SpectrumRows(ds, np.array([0, 1]), recipe)
        grid, velocity = rows.wavelength.values, np.array([-300., -0.1, 0., 5., 5000.])
        shift = rows.pixel_shift(velocity)
        assert shift.shape == (5,) and shift[2] == 0
        np.testing.assert_allclose(np.interp(doppler_shift(5500., velocity), grid, np.arange(len(grid))) - np.interp(5500., grid, np.arange(len(grid))), shift, atol=1e-3)
    for grid in (np.linspace(4000., 7000., 5000), np.where(np.arange(5000) < 2500, wave, wave*1.00001)):
        rows = SpectrumRows(ds.assign_coords(wavelength=("wavelength", grid, ds.wavelength.attrs)), np.array([0, 1]), RAW)
        with pytest.raises(ValueError, match="not uniform in log wavelength .*log_grid"): rows.pixel_shift(1.)


# ---- stores of plain rows

@pytest.fixture
def plain(tmp_path):
    "The numbered spectra, without compression, as ingest stores them; flux varies along the row."
    ds = numbered()
    ds["flux"] = (ds.flux * (1 + .3 * np.sin(ds.wavelength))).astype("float32")
    return write_plain(ds, tmp_path / "plain.zarr")


def write_plain(ds, path, chunk_rows=8):
    encoding = {n: dict(chunks=(chunk_rows, ds.sizes["wavelength"]), compressors=None, filters=None) for n in ("flux", "ivar")}
    ds.assign_coords({n: c.astype(object) for n, c in ds.coords.items() if c.dtype.kind == "U"}).to_zarr(path, zarr_format=3, consolidated=False, encoding=encoding)
    return open_store(path)


RECIPES = [RAW, PrepRecipe(), PrepRecipe(min_median=20.), PrepRecipe(wavelength_range=(5010., 5081.), mask_ranges=((5030., 5040.), (5049., 5051.)), pad_to=61, pad_left=3), PrepRecipe(normalise=None, pad_to=50)]


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("limit", [0, 1e9])
def test_plain_rows_are_those_of_xarray_to_the_bit(plain, recipe, limit):
    data = SpectrumRows(plain, np.arange(4, 90), recipe, memory_limit=limit)
    assert isinstance(data.raw, RawStore) and (data.cache is None) == (limit == 0)
    positions = np.random.default_rng(0).permutation(86)[:50]
    for _ in range(2):  # the second time with the remembered medians
        for mine, theirs in zip(data.take(positions), ready_rows(plain.isel(spectrum=positions + 4), recipe)):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == np.float32


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_rows_are_written_into_used_memory(plain, recipe):
    data = SpectrumRows(plain, np.arange(4, 90), recipe, memory_limit=0)
    positions = np.array([70, 3, 41, 85])
    out = np.full((2, 4, data.n_pixels), np.nan, np.float32)
    for mine, theirs in zip(data.read_raw(positions, out), ready_rows(plain.isel(spectrum=positions + 4), recipe)): np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(out, data.take(positions))


def test_a_changed_dataset_is_no_longer_its_store(plain, store, tmp_path):
    assert raw_store(store) is None and raw_store(numbered()) is None    # compressed; in memory
    assert isinstance(raw_store(plain), RawStore) and isinstance(raw_store(xr.open_zarr(str(tmp_path / "plain.zarr"), consolidated=False)), RawStore)
    assert isinstance(raw_store(plain.assign_coords(label=("spectrum", np.arange(90.)))), RawStore)
    for changed in (plain.isel(spectrum=slice(1, None)), plain.sortby("spectrum_id"), plain.assign(flux=plain.flux * 2), plain.assign(ivar=plain.ivar.where(plain.wavelength > 5010, 0)),
                    plain.sel(wavelength=slice(5010, 5050)), plain.compute(), plain.assign(flux=plain.ivar, ivar=plain.flux)):
        assert raw_store(changed) is None
    loader = SpectrumLoader(SpectrumRows(plain.assign(flux=plain.flux * 2), np.arange(90), RAW, memory_limit=0), bs=90)
    np.testing.assert_array_equal(next(iter(loader))[0].numpy(), ready_rows(plain, RAW)[0] * 2)


def test_a_chunk_that_ends_early_is_named(plain, tmp_path):
    data = SpectrumRows(plain, np.arange(90), RAW, memory_limit=0)
    chunk = tmp_path / "plain.zarr" / "ivar" / "c" / "3" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    data.take(np.array([0, 20]))
    with pytest.raises(OSError, match="chunk 3 of ivar ends too early"): list(SpectrumLoader(data, bs=10))


def test_packed_store_through_the_loader(tmp_path):
    from specnb.eso import write_adp
    from specnb.ingest import ingest
    rng = np.random.default_rng(0)
    for i in range(12):
        flux = 1e5 * rng.normal(100, 2, (1, 500))
        write_adp(make_spectra(flux, np.full((1, 500), .25e-10), 5000 + .02 * np.arange(500), [f"star-{i}"], medium="air", frame="barycentric", coords=dict(object=[f"HD {i}"])), tmp_path / f"{i}.fits")
    full, half = (ingest(tmp_path / "*.fits", tmp_path / f"{name}.zarr", progress=False, packed=name == "half").open() for name in ("full", "half"))
    a, b = (SpectrumRows(ds, np.arange(12), PrepRecipe(), memory_limit=0) for ds in (full, half))
    assert a.raw.dtype == np.float32 and b.raw.dtype == np.float16
    for mine, theirs in zip(b.take(np.arange(12)), ready_rows(half, PrepRecipe())): np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(b.take(np.arange(12))[0], a.take(np.arange(12))[0], rtol=2**-10)
    np.testing.assert_allclose(b.take(np.arange(12))[1], a.take(np.arange(12))[1], rtol=2**-9)


# ---- several threads, several ranks

@pytest.mark.parametrize("kind", ["plain", "compressed", "memory"])
@pytest.mark.parametrize("world_size, n_threads, n_rows", [(1, 1, 90), (1, 4, 90), (2, 3, 90), (2, 2, 85), (3, 4, 89), (7, 2, 5)])
def test_every_row_once_over_threads_and_ranks(plain, store, kind, world_size, n_threads, n_rows):
    ds, rows = plain if kind == "plain" else store, np.random.default_rng(1).permutation(90)[:n_rows]
    rows.sort()
    for epoch in range(2):
        seen = []
        for rank in range(world_size):
            loader = SpectrumLoader(SpectrumRows(ds, rows, RAW, memory_limit=1e9 if kind == "memory" else 0), bs=4, shuffle=True, seed=3, buffer_rows=20, n_threads=n_threads, rank=rank, world_size=world_size)
            loader.epoch = epoch
            order, batches = loader.get_idxs(), []
            for batch in loader:
                batches.append(batch)
                assert len(batch[0]) == len(loader.positions) or (len(loader.positions) == 0 and len(batch[0]) == 1 and not batch[1].any())
            assert len({len(SpectrumLoader(loader.dataset, bs=4, rank=r, world_size=world_size)) for r in range(world_size)}) == 1
            mine = [int(round(float(f[0] / (1 + .3 * np.sin(5000.))))) - 1 if kind == "plain" else int(f[0]) - 1 for batch in batches for f, w in zip(batch[0], batch[1]) if w.any()]
            assert mine == rows[order].tolist() and len(batches) == len(loader)
            seen.append(mine)
        assert sorted(sum(seen, [])) == rows.tolist()
        assert max(map(len, seen)) - min(map(len, seen)) <= 1


def test_ranks_have_equally_many_full_batches(plain):
    loaders = [SpectrumLoader(SpectrumRows(plain, np.arange(89), RAW, memory_limit=0), bs=4, shuffle=True, drop_last=True, rank=r, world_size=4) for r in range(4)]
    counts = [[len(flux) for flux, *_ in loader] for loader in loaders]
    assert counts == [[4] * 5] * 4 and {len(loader) for loader in loaders} == {5}


RANK = """
import sys, torch, torch.distributed as dist
import numpy as np
from specnb.loader import SpectrumLoader, SpectrumRows
from specnb.prep import PrepRecipe
from specnb.spectra import open_store
store, meeting, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
loader = SpectrumLoader(SpectrumRows(open_store(store), np.arange(90), PrepRecipe(normalise=None), memory_limit=0), bs=4, shuffle=True, seed=5)
print([int(p) for _ in range(2) for _ in loader for p in loader.positions])
dist.destroy_process_group()
"""


def test_two_processes_of_torch_distributed_share_an_epoch(plain, tmp_path):
    if not torch.distributed.is_available(): pytest.skip("this torch has no distributed")
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path / "plain.zarr"), str(tmp_path / "meeting"), str(r)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=120) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said[0][1] + said[1][1]
    first, second = (eval(out.splitlines()[-1]) for out, _ in said)
    assert len(first) == len(second) == 90
    for epoch in (slice(0, 45), slice(45, 90)): assert sorted(first[epoch] + second[epoch]) == list(range(90))
    assert first[:45] != first[45:]


CAPPED = """
import resource, sys
import numpy as np
from specnb.loader import SpectrumLoader, SpectrumRows
from specnb.prep import PrepRecipe
from specnb.spectra import open_store
resource.setrlimit(resource.RLIMIT_AS, (1 << 46, resource.getrlimit(resource.RLIMIT_AS)[1])) # an address space with an end
ds = open_store(sys.argv[1])
data = SpectrumRows(ds, np.arange(ds.sizes["spectrum"]), PrepRecipe(), memory_limit=0)
loader = SpectrumLoader(data, bs=8, shuffle=True)
next(iter(loader))  # whatever is loaded or compiled on first use
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
base = peak()
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_AS)[1]))
seen = sorted(int(p) for _ in loader for p in loader.positions)
assert seen == list(range(len(data))), "not every row once"
print(peak() - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory by /proc")
def test_a_store_three_times_the_cap_passes_through(tmp_path):
    "The process may grow by 64 MB; the store has 240 MB."
    n, n_pixels = 600, 50_000
    few = make_spectra(np.ones((1, n_pixels)), np.ones((1, n_pixels)), 4000. + .05 * np.arange(n_pixels), ["a"], medium="air", frame="rest", coords=dict(object=["a"]))
    pixels = dask.array.ones((n, n_pixels), chunks=(8, -1), dtype="float32")
    ds = xr.Dataset({v: (("spectrum", "wavelength"), pixels, few[v].attrs) for v in ("flux", "ivar")}, {"wavelength": few.wavelength, "spectrum_id": ("spectrum", [f"s{i}" for i in range(n)]), "object": ("spectrum", ["a"] * n)})
    write_plain(ds, tmp_path / "tall.zarr")
    size = sum(p.stat().st_size for p in (tmp_path / "tall.zarr").rglob("0"))
    cap = 64_000_000
    assert size > 3 * cap
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CAPPED, str(tmp_path / "tall.zarr"), str(cap)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < cap


@pytest.mark.gpu
def test_pinned_batches_arrive_on_the_device(plain):
    loader = SpectrumLoader(SpectrumRows(plain, np.arange(90), PrepRecipe(), memory_limit=0), bs=7, shuffle=True, device=torch.device("cuda"), n_threads=3)
    seen = {}
    for flux, ivar, *_ in loader:
        assert flux.is_cuda and ivar.is_cuda
        for position, f, w in zip(loader.positions, flux, ivar): seen[int(position)] = (f, w)
    torch.cuda.synchronize()
    expected = ready_rows(plain, PrepRecipe())
    for i in range(90):
        for mine, theirs in zip(seen[i], expected): np.testing.assert_array_equal(mine.cpu().numpy(), theirs[i])
    assert len(seen) == 90
