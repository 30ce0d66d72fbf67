"""Does the demonstration find the planted factors, and does it invent anything? One row a seed, on stars that training never saw.

    python tests/benchmarks/recovery.py --seeds 5

The population, the network and the randomness all change with the seed. Three labels are drawn at random: a pair of node and random
label that comes out at q < 0.05 is an invention. PCA with as many components stands beside the network, on the same spectra.
"""
import argparse
import tempfile
import time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from specnb import run
from specnb.depend import association, mutual_information
from specnb.encode import encode
from specnb.learner import load_bundle, save_bundle, spectrum_learner
from specnb.loader import ready_rows, spectrum_dataloaders
from specnb.prep import PrepRecipe, split_by_object
from specnb.simulate import FACTORS
from specnb.spectra import make_latents, open_store


def best_nodes(latents):
    "For every factor: the best node's |Spearman| and its mutual information [nat]."
    z, out = latents["mean"].values, {}
    for name in FACTORS:
        rho = np.abs([spearmanr(z[:, j], latents[name].values)[0] for j in range(z.shape[1])])
        out[name] = (rho.max(), mutual_information(z[:, rho.argmax()], latents[name].values))
    return out


def one_seed(seed, n_stars, folder):
    store = open_store(run.simulate(folder / f"{seed}.zarr", n_stars=n_stars, seed=seed)).load()
    split = split_by_object(store, 0.05, 0.15, seed)
    dls = spectrum_dataloaders(store, PrepRecipe(), split=split, bs=32, seed=seed, device="cpu")
    learn = spectrum_learner(dls, "demo", "beta_tcvae", lr=3e-3, seed=seed)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 3e-3)
    seconds = time.perf_counter() - start
    bundle = load_bundle(save_bundle(folder / f"{seed}", learn.model, wavelength=dls.train.dataset.wavelength, recipe=PrepRecipe()))
    held = store.isel(spectrum=np.flatnonzero(split.values == "test"))
    latents = encode(bundle, held, progress=False)
    table = association(latents, groups="object", n_permutations=999, seed=seed)
    random = [n for n in table.label.values if n.startswith("random")]
    flux = {side: ready_rows(store.isel(spectrum=np.flatnonzero(split.values == side)), PrepRecipe())[0] for side in ("train", "test")}
    components = PCA(latents.sizes["latent"], random_state=seed, svd_solver="randomized").fit(flux["train"])
    principal = best_nodes(make_latents(components.transform(flux["test"]), coords_from=held))
    row = dict(seed=seed, seconds=seconds, inventions=int((table.q.sel(label=random) < 0.05).sum()), tests=10 * len(random), below_5_percent=int((table.p.sel(label=random) < 0.05).sum()))
    for name, (rho, information) in best_nodes(latents).items(): row.update({f"{name}_rho": rho, f"{name}_mi": information, f"{name}_pca": principal[name][0]})
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stars", type=int, default=7000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for seed in range(options.first, options.first + options.seeds):
            rows.append(one_seed(seed, options.stars, Path(folder)))
            r = rows[-1]
            print(f"seed {seed}: {r['seconds']:.0f} s, velocity {r['radial_velocity_rho']:.3f} / {r['radial_velocity_mi']:.2f} nat, Teff {r['teff_rho']:.3f} / {r['teff_mi']:.2f} nat, "
                  f"inventions {r['inventions']} of {r['tests']}, p < 0.05: {r['below_5_percent']}", flush=True)
    frame = pd.DataFrame(rows)
    summary = pd.DataFrame({f: {"median |Spearman|": frame[f + "_rho"].median(), "worst |Spearman|": frame[f + "_rho"].min(), "median MI [nat]": frame[f + "_mi"].median(),
                                "worst MI [nat]": frame[f + "_mi"].min(), "PCA median |Spearman|": frame[f + "_pca"].median()} for f in FACTORS}).T
    print(summary.round(3).to_string())
    print(f"random labels: {frame.inventions.sum()} of {frame.tests.sum()} pairs at q < 0.05, {frame.below_5_percent.sum()} at p < 0.05; training {frame.seconds.median():.0f} s on one thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
