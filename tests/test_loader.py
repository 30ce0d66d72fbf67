"""Loader: every row once an epoch from any storage, in bounded memory, the same for the same seed."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specnb.loader import SpectrumLoader, SpectrumRows, epoch_groups, ready_rows, spectrum_dataloaders
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
