"""What the nodes of a small network follow in real spectra: 783 MILES stars, and 177 HARPS exposures of two stars held out by night.

Run it where the folder of real spectra lies beside the checkout (shared/data). It prints what it finds and asserts nothing;
tests/test_real.py asserts. Labels never reach the training.
"""
import argparse
import tempfile
import time
from pathlib import Path
import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from specnb.depend import association, mutual_information
from specnb.encode import encode
from specnb.fits import read_spectrum
from specnb.learner import load_bundle, save_bundle, spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.nets import net_config
from specnb.prep import PrepRecipe, split_by_object
from specnb.spectra import make_spectra


def shared_data():
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared" / "data" / "README.md").exists(): return parent / "shared" / "data"
    raise SystemExit("the folder of real spectra (shared/data beside the checkout) is not here")


def miles(folder):
    "783 stars, 3800-6900 Angstrom, with Teff, log g and [Fe/H]."
    with np.load(folder / "miles" / "miles_3800_6900_int16.npz") as z:
        flux = z["flux_i16"] * z["scale"][:, None]
        wave, ids = z["wave0"] + z["dwave"] * np.arange(flux.shape[1]), z["miles_id"].astype(int)
    table = pd.read_csv(folder / "labels" / "miles_labels.csv").set_index("miles_id").reindex(ids)
    labels = {n: (table[n].values.astype(float), {"units": u}) for n, u in (("teff", "K"), ("logg", "dex"), ("feh", "dex"))}
    return make_spectra(flux, None, wave, [f"m{i:04d}" for i in ids], medium="air", frame="rest",
                        coords={"object": table["name"].fillna("").values, **labels}, label_names=list(labels))


def harps_crops(folder, star=None):
    "4,096 pixels from 6275 Angstrom with the telluric O2 band, of HD128621 (153) and HD189733 (24)."
    table = pd.read_csv(folder / "labels" / "harps_timeseries_labels.csv")
    table = table[table.object.isin(["HD128621", "HD189733"])] if star is None else table[table.object == star]
    rows = [read_spectrum(folder / f) for f in table.file]
    grid = rows[0].wavelength.values
    assert all(np.abs(r.wavelength.values - grid).max() < 0.006 for r in rows)
    flux, ivar = (np.concatenate([r[n].values for r in rows]) for n in ("flux", "ivar"))
    missing = lambda v: np.where(np.isin(v, (-1.0, 99999.0)), np.nan, v)
    labels = {n: (missing(table[n].values.astype(float)), {}) for n in ("berv", "airmass", "snr50", "rhum", "our_rv")}
    return make_spectra(flux, ivar, grid, table.dp.values, medium="air", frame="barycentric", label_names=list(labels),
                        coords={"object": table.object.values, "night": table.night_mjd.values, "mjd_obs": table.mjd_obs.values, **labels})


def train_and_encode(ds, split, folder, net="demo", n_epoch=60, bs=32, lr=2e-3, seed=0, objective="beta_tcvae", **overrides):
    "The demo network, as it comes: below a thousand spectra it starts without components of the continuum by itself."
    recipe = PrepRecipe()
    dls = spectrum_dataloaders(ds, recipe, split=split, bs=bs, seed=seed, device="cpu")
    learn = spectrum_learner(dls, net_config(net, ds.sizes["wavelength"], **overrides), objective, lr=lr, seed=seed)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, lr)
    seconds = time.perf_counter() - start
    bundle = load_bundle(save_bundle(folder, learn.model, wavelength=dls.train.dataset.wavelength, recipe=recipe))
    return encode(bundle, ds, progress=False), seconds


def best(latents, label, rows=slice(None)):
    "Node with the largest |Spearman| among the rows, its value, and its mutual information [nat]."
    y = latents[label].values[rows]
    known = np.isfinite(y)
    z = latents["mean"].values[rows][known]
    rho = np.array([abs(spearmanr(z[:, j], y[known])[0]) for j in range(z.shape[1])])
    node = int(np.nanargmax(rho))
    return node, float(rho[node]), mutual_information(z[:, node], y[known])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    folder, work = shared_data(), tempfile.mkdtemp()
    stars = miles(folder)
    print(f"MILES: {stars.sizes['spectrum']} stars, {stars.sizes['wavelength']} pixels, held out: 30 % of the stars")
    for seed in seeds:
        split = split_by_object(stars, 0.1, 0.3, seed)
        latents, seconds = train_and_encode(stars, split, work, n_epoch=60, seed=seed)
        held = np.flatnonzero(split.values == "test")
        words = "  ".join(f"{n}: node {j} |Spearman| {r:.3f} MI {m:.2f}" for n in ("teff", "logg", "feh") for j, r, m in [best(latents, n, held)])
        print(f"  seed {seed}  {seconds:4.0f} s  {words}")
    crops = harps_crops(folder)
    print(f"HARPS crops: {crops.sizes['spectrum']} exposures, {len(np.unique(crops.night))} nights, held out: 40 % of the nights")
    for seed in seeds:
        split = split_by_object(crops, 0.2, 0.4, seed, by="night")
        latents, seconds = train_and_encode(crops, split, work, n_epoch=150, bs=16, seed=seed)
        one = latents.isel(spectrum=np.flatnonzero((split.values == "test") & (crops.object.values == "HD128621")))
        words = "  ".join(f"{n}: node {j} |Spearman| {r:.3f} MI {m:.2f}" for n in ("berv", "airmass", "rhum") for j, r, m in [best(one, n)])
        print(f"  seed {seed}  {seconds:4.0f} s  held-out nights of HD128621 ({one.sizes['spectrum']} exposures)  {words}")
        for groups in ("night", None):
            table = association(latents.isel(spectrum=np.flatnonzero(crops.object.values == "HD128621")), ["berv", "airmass", "rhum"], groups=groups, n_permutations=999)
            words = "  ".join(f"{n}: p {float(table.p.sel(label=n).min()):.3f} q {float(table.q.sel(label=n).min()):.3f}" for n in table.label.values)
            print(f"      {'nights' if groups else 'exposures'} as units, smallest over nodes:  {words}")


if __name__ == "__main__":
    main()
