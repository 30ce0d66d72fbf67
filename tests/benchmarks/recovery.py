"""Does training find the planted factors, and does it invent anything? One row a seed, on stars that training never saw.

    python tests/benchmarks/recovery.py --mode agnostic --seeds 5

Population, network and randomness all change with the seed. Three modes, which never share a table: `agnostic` (the demo's network, which
knows no physics), `doppler` (a decoder that can shift lines: label-free, but its velocity node is built in) and `paper` (the published
layer pattern and a plain beta-VAE, trained on the same spectra for the CPU-seconds that the agnostic network took).

Which node stands for a factor, and the calibration of a velocity, are settled on the training stars; every number is of the test stars.
PCA and ICA with as many components see the same prepared spectra, once as prepared (pixels without a measurement are zero, so that the
moving detector gap is itself a signal: the Earth's velocity) and once with such pixels at their training mean, as the network sees them.
The second is what the network competes with. Three labels are drawn at random: a pair of node and random label at q < 0.05 is an invention.

`--hidden activity` adds a cause that no catalogue reports (a chromosphere in Ca II H and K), gives every star two exposures (and so half the
stars), and asks whether the node that follows it is found without knowing it: as one that holds more of its star than the labels explain.
"""
import argparse
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from scipy.stats import rankdata
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import IsotonicRegression
from specnb.depend import association, mutual_information
from specnb.dims import beyond_labels, informative_nodes
from specnb.disentangle import mig
from specnb.encode import decoder, encode
from specnb.learner import fit_starts, load_bundle, save_bundle, spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.nets import PRESETS, LineFrontEnd
from specnb.prep import PrepRecipe, split_by_object
from specnb.run import versions
from specnb.simulate import FACTORS, sample_survey, simulate
from specnb.wave import SPEED_OF_LIGHT, log_grid

MODES = dict(agnostic=dict(net="demo", objective="beta_tcvae", epochs=12, bs=32, lr=3e-3),
             doppler=dict(net="doppler", objective="beta_tcvae", epochs=80, bs=128, lr=3e-3),
             paper=dict(net="paper_scaled", objective="beta_vae", epochs=None, bs=32, lr=1e-3))
#: what is planted in every spectrum and can be seen in it; the signal-to-noise ratio is reported, but division by the median leaves only its noise
PLANTED = (*(n for n in FACTORS if n != "snr"), "berv", "slope")
SHOWN = (*PLANTED, "snr")
VELOCITIES = np.arange(-200., 200.1, 5.) # of the shifted templates [km/s]


class StopAfter(Callback):
    "End a fit after so many CPU-seconds."
    order = 65
    def __init__(self, seconds): self.seconds = seconds
    def before_fit(self): self.start = time.process_time()
    def after_batch(self):
        if self.training and time.process_time() - self.start > self.seconds: raise CancelFitException


def survey(seed, n_spectra, n_pixels, hidden=()):
    "Independent stars, one exposure each (two where a cause is hidden), with the simulator's unrecorded continuum slope as a further truth."
    exposures = 2 if hidden else 1
    ds = sample_survey(n_spectra//exposures, exposures, seed, log_grid(3785, 6910, n_pixels), random_labels=3, hidden=hidden)
    slope = [np.random.default_rng([seed, row]).normal() for row in range(ds.sizes["spectrum"])]
    return ds.assign_coords(slope=("spectrum", slope, {"role": "factor", "note": "drawn by the simulator, not among its factors"}))


def fit(dls, mode, seed, options, seconds=None):
    "Train; the learner, its seconds and CPU-seconds (all starts and the independent axes included) and its epochs."
    settings, clock, cpu = MODES[mode], time.perf_counter(), time.process_time()
    def make(seed):
        learn = spectrum_learner(dls, settings["net"], settings["objective"], lr=settings["lr"], seed=seed, precision=options.precision)
        learn.logger = lambda *row: None
        return learn.remove_cb(ProgressCallback)
    if mode == "paper": (learn := make(seed)).fit(10_000, settings["lr"], cbs=StopAfter(seconds))
    else:
        with tempfile.TemporaryDirectory() as folder:
            learn, _, starts = fit_starts(make, [1000*k + seed for k in range(options.starts)], options.epochs or settings["epochs"], folder)
        if options.starts > 1: print(starts[["seed", "valid_loss", "reconstruction", "kl", "kept"]].round(4).to_string(index=False), flush=True)
    return learn, time.perf_counter() - clock, time.process_time() - cpu, learn.epoch + learn.iter/len(dls.train) if mode == "paper" else learn.n_epoch


def paper_seconds(dls, seed, options):
    "CPU-seconds for the paper's recipe: those given, or those of an agnostic run on the same spectra."
    return options.seconds or fit(dls, "agnostic", seed, options)[2]


def _abs_rank_correlation(codes, values):
    "|Spearman| of every node with a factor, 0 for a node that is constant."
    ranks, own = rankdata(codes, axis=0), rankdata(values)
    ranks, own = ranks - ranks.mean(0), own - own.mean()
    return np.abs(own @ ranks)/np.maximum(np.sqrt((ranks**2).sum(0)*(own**2).sum()), 1e-12)


def best_nodes(codes, truth):
    "For every factor: the node chosen on training stars, its |Spearman| and mutual information [nat] on test stars."
    out = {}
    for name in truth["train"]:
        j = int(_abs_rank_correlation(codes["train"], truth["train"][name]).argmax())
        out[name] = j, float(_abs_rank_correlation(codes["test"], truth["test"][name])[j]), mutual_information(codes["test"][:, j], truth["test"][name])
    return out


def velocity_scatter(value, truth):
    "Robust scatter [km/s] on test stars after monotone calibration on training stars; `value` holds one number a star."
    calibrate = IsotonicRegression(increasing="auto", out_of_bounds="clip").fit(value["train"], truth["train"]["radial_velocity"])
    left = calibrate.predict(value["test"]) - truth["test"]["radial_velocity"]
    return float(1.4826*np.median(np.abs(left - np.median(left))))


def linear_codes(flux, valid, n, seed):
    "Scores of PCA and of ICA on them, spectra as prepared and with masked pixels at the training mean."
    mean = (flux["train"]*valid["train"]).sum(0)/np.maximum(valid["train"].sum(0), 1)
    out = {}
    for kind in ("as is", "filled"):
        x = flux if kind == "as is" else {side: np.where(valid[side], flux[side], mean.astype(np.float32)) for side in flux}
        pca = PCA(n, svd_solver="randomized", random_state=seed).fit(x["train"])
        out[f"PCA {kind}"] = scores = {side: pca.transform(x[side]) for side in x}
        with warnings.catch_warnings(): # some components stay unsettled where several are normal; they are as good as any
            warnings.simplefilter("ignore", ConvergenceWarning)
            ica = FastICA(n, whiten="unit-variance", random_state=seed, max_iter=400).fit(scores["train"])
        out[f"ICA {kind}"] = {side: ica.transform(scores[side]) for side in x}
    return out


def template_lines(wavelength, lines):
    "Continuum-removed lines of a noiseless Sun at the velocities of the search, and the pixels where the Earth's air changes less than 0.3 %."
    def make(**factors):
        ds = simulate(factors, wavelength, seed=0, noise=False, gap=None)
        return lines(ds.flux.values/np.median(ds.flux.values, axis=1, keepdims=True), ds.ivar.values)
    dry, wet = make(airmass=[1.], water=[0.])[0], make(airmass=[2.2], water=[8.])[0]
    shifted = make(radial_velocity=VELOCITIES, airmass=np.ones(len(VELOCITIES)), water=np.zeros(len(VELOCITIES)))
    return shifted, np.abs(wet - dry) < 0.003


def _parabola(score, step, first):
    "Place of the peak of every row."
    k = score.argmax(1).clip(1, score.shape[1] - 2)
    low, top, high = (score[np.arange(len(score)), k + i] for i in (-1, 0, 1))
    return first + step*(k + (0.5*(low - high)/np.minimum(low - 2*top + high, -1e-12)).clip(-1, 1))


def cross_correlation(flux, ivar, wavelength):
    "Velocity of every spectrum [km/s] from one template: shifted by whole pixels, and simulated at velocities 5 km/s apart."
    front = LineFrontEnd(len(wavelength), len(wavelength)/128)
    def lines(flux, ivar):
        raw, valid = front.raw_channels(torch.as_tensor(flux), torch.as_tensor(ivar))
        return (raw[:, 0]*valid).numpy()
    templates, clear = template_lines(wavelength, lines)
    step = SPEED_OF_LIGHT*np.log(wavelength[-1]/wavelength[0])/(len(wavelength) - 1)
    reach, rest = int(np.ceil(200/step)), templates[len(VELOCITIES)//2]*clear
    rolled = np.stack([np.roll(rest, k) for k in range(-reach, reach + 1)])
    fine = templates*clear
    seen = {side: lines(flux[side], ivar[side])*clear for side in flux}
    normal = lambda t: t/np.linalg.norm(t, axis=1, keepdims=True)
    whole = {side: _parabola(seen[side] @ normal(rolled).T, step, -reach*step) for side in seen}
    return {"cross-correlation, whole pixels": whole, "cross-correlation, 5 km/s": {side: _parabola(seen[side] @ normal(fine).T, 5., VELOCITIES[0]) for side in seen}}


def inventions(latents, seed):
    "How often a label drawn at random passes for a finding."
    table = association(latents, groups="object", n_permutations=999, seed=seed)
    chance = [n for n in table.label.values if n.startswith("random")]
    return dict(inventions=int((table.q.sel(label=chance) < 0.05).sum()), p_below_5=int((table.p.sel(label=chance) < 0.05).sum()), pairs=latents.sizes["latent"]*len(chance))


def discovery(latents, hidden, node, seed):
    "Whether the node that follows the hidden cause stands out without it: beyond the labels, and how close any label comes to it."
    labels = [n for n, c in latents.coords.items() if c.attrs.get("role") in ("label", "factor") and not c.attrs.get("hidden") and n != "slope"]
    left = beyond_labels(latents, labels, groups="object", seed=seed).isel(latent=node)
    nearest = {n: float(_abs_rank_correlation(latents["mean"].values[:, [node]], latents[n].values)[0]) for n in labels if np.isfinite(latents[n].values).all()}
    return {"hidden|beyond": bool(left.beyond), "hidden|unexplained": float(left.unexplained), "hidden|p": float(left.p), "hidden|nearest label": max(nearest, key=nearest.get), "hidden|nearest rho": max(nearest.values())}


def one_seed(seed, mode, options):
    "Everything of one seed as one row."
    ds = survey(seed, options.stars, options.pixels, options.hidden)
    split, recipe = split_by_object(ds, 0.05, 0.15, seed), PrepRecipe()
    dls = spectrum_dataloaders(ds, recipe, split=split, bs=MODES[mode]["bs"], seed=seed, device="cpu", memory_limit=8e9)
    seconds = paper_seconds(spectrum_dataloaders(ds, recipe, split=split, bs=32, seed=seed, device="cpu", memory_limit=8e9), seed, options) if mode == "paper" else None
    learn, clock, cpu, epochs = fit(dls, mode, seed, options, seconds)
    with tempfile.TemporaryDirectory() as folder:
        bundle = load_bundle(save_bundle(Path(folder)/"bundle", learn.model, wavelength=dls.train.dataset.wavelength, recipe=recipe))
    rows = {side: np.flatnonzero(split.values == side) for side in ("train", "test")}
    latents = {side: encode(bundle, ds.isel(spectrum=rows[side]), progress=False) for side in rows}
    truth = {side: {n: latents[side][n].values for n in (*SHOWN, *options.hidden)} for side in rows}
    flux, ivar = {"train": dls.train.dataset.cache[0], "test": dls[2].dataset.cache[0]}, {"train": dls.train.dataset.cache[1], "test": dls[2].dataset.cache[1]}
    n = latents["test"].sizes["latent"]
    codes = {"node": {side: latents[side]["mean"].values for side in rows}} | linear_codes(flux, {side: ivar[side] > 0 for side in ivar}, n, seed)
    row = dict(seed=seed, seconds=clock, cpu_seconds=cpu, epochs=epochs, test_stars=len(rows["test"]), nodes=n)
    for kind, of_kind in codes.items():
        best = best_nodes(of_kind, truth)
        for name, (j, rho, information) in best.items(): row |= {f"{name}|{kind}|rho": rho, f"{name}|{kind}|mi": information, f"{name}|{kind}|which": j}
        j = best["radial_velocity"][0]
        row[f"scatter|{kind}"] = velocity_scatter({side: of_kind[side][:, j] for side in rows}, truth)
    for kind, value in cross_correlation(flux, ivar, ds.wavelength.values).items(): row[f"scatter|{kind}"] = velocity_scatter(value, truth)
    judged = informative_nodes(latents["test"], decode=decoder(bundle), seed=seed)
    row |= dict(informative=judged.attrs["n_informative"], mig=float(mig(latents["test"], list(PLANTED), n_subsamples=0, seed=seed).score))
    for name in options.hidden: row |= discovery(latents["test"], name, row[f"{name}|node|which"], seed)
    return row | inventions(latents["test"], seed)


def factor_table(frame, hidden=()):
    "Median and worst |Spearman| and mutual information of the best node, and the median |Spearman| of the linear methods, factor by factor."
    kinds = ["PCA as is", "PCA filled", "ICA as is", "ICA filled"]
    table = {}
    for name in (*SHOWN, *hidden):
        of = lambda kind, what: frame[f"{name}|{kind}|{what}"]
        table[name] = {"rho median": of("node", "rho").median(), "rho worst": of("node", "rho").min(), "MI median": of("node", "mi").median(), "MI worst": of("node", "mi").min()}
        for kind in kinds: table[name] |= {f"{kind} rho": of(kind, "rho").median(), f"{kind} MI": of(kind, "mi").median()}
        table[name]["below filled"] = int((of("node", "rho") < frame[[f"{name}|{k}|rho" for k in kinds if "filled" in k]].max(axis=1)).sum())
    return pd.DataFrame(table).T


def processor():
    "Name of the processor, as far as the system tells."
    try: return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def report(frame, mode, options):
    "The tables of a mode."
    print(f"\nmode {mode}: {NOTES[mode]}\n{len(frame)} seeds, {options.stars} stars each, {options.pixels} pixels, {int(frame.test_stars.median())} test stars; MI in nat; "
          "'below filled' counts the seeds in which PCA or ICA of the filled spectra did better than the best node\n")
    print(factor_table(frame, options.hidden).round(3).to_string())
    if options.hidden: print("\nthe node that follows the hidden cause\n" + frame.filter(like="hidden|").rename(columns=lambda n: n.split("|")[1]).round(3).to_string(index=False))
    scatter = frame.filter(like="scatter|").rename(columns=lambda n: n.split("|")[1])
    print("\nvelocity scatter after monotone calibration [km/s]\n" + pd.DataFrame({"median": scatter.median(), "worst": scatter.max()}).round(2).to_string())
    print(f"\ninformative nodes {frame.informative.median():.0f} ({frame.informative.min()}-{frame.informative.max()}), planted {len(PLANTED)}: {', '.join(PLANTED)}"
          f"\nMIG over the planted: median {frame.mig.median():.3f}, worst {frame.mig.min():.3f}"
          f"\nrandom labels: {frame.inventions.sum()} of {frame.pairs.sum()} pairs at q < 0.05, {frame.p_below_5.sum()} at p < 0.05"
          f"\ntraining, axes included: median {frame.seconds.median():.0f} s, longest {frame.seconds.max():.0f} s; {frame.cpu_seconds.median():.0f} CPU-seconds; {frame.epochs.median():.1f} epochs of {options.starts} start(s); {options.threads} thread(s) of {os.cpu_count()} cores, {processor()}"
          f"\n{', '.join(f'{k} {v}' for k, v in versions().items())}")


NOTES = dict(agnostic="no physics in network or objective",
             doppler="a decoder that shifts its lines by node 0; no labels, but the velocity node is built in",
             paper="published layer pattern and constant beta, trained for the CPU-seconds of the agnostic mode (or of --seconds) on the same spectra; PCA and ICA have as many components as it has nodes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="agnostic")
    for name, value in dict(seeds=5, first=0, stars=10_000, pixels=4096, threads=1).items(): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--epochs", type=int, help="of the agnostic and the Doppler mode; default: those of MODES")
    parser.add_argument("--starts", type=int, default=1, help="trainings from different seeds, of which the lowest validation loss is kept")
    parser.add_argument("--seconds", type=float, help="CPU-seconds of the paper's recipe; default: an agnostic run on the same spectra is timed first")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of products inside the layers")
    parser.add_argument("--hidden", action="append", default=[], choices=["activity"], help="a cause that no label reports; two exposures a star")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    options = parser.parse_args()
    if MODES[options.mode]["net"] not in PRESETS: parser.error(f"mode {options.mode} needs the network preset {MODES[options.mode]['net']!r}, which this version of specnb lacks; it has {', '.join(PRESETS)}")
    torch.set_num_threads(options.threads)
    rows = []
    for seed in range(options.first, options.first + options.seeds):
        rows.append(r := one_seed(seed, options.mode, options))
        print(f"{options.mode}, seed {seed}: {r['seconds']:.0f} s ({r['cpu_seconds']:.0f} CPU), {r['epochs']:.1f} epochs; " + ", ".join(f"{n} {r[f'{n}|node|rho']:.3f} / {r[f'{n}|node|mi']:.2f} nat" for n in (*SHOWN, *options.hidden))
              + f"; scatter {r['scatter|node']:.2f} km/s; {r['informative']} informative; MIG {r['mig']:.3f}; inventions {r['inventions']} of {r['pairs']}", flush=True)
        if options.csv: pd.DataFrame(rows).to_csv(options.csv, index=False)
    report(pd.DataFrame(rows), options.mode, options)


if __name__ == "__main__":
    main()
