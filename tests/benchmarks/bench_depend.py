"""Speed and accuracy of specnb.depend beside scikit-learn and pandas.

Run `python tests/benchmarks/bench_depend.py [--large] [--accuracy] [--coverage] [--discoveries] [--threads]`. Contestants take turns
and the median of the ratios is printed, so that a busy machine slows both. CPU seconds of this process are counted, one thread (seconds
of the clock with two threads). scikit-learn, and ennemi where it is installed, are timed on a few pairs of the matrix, ours on the whole
matrix, ranking included. Ours is the default, which looks for nine neighbours and extrapolates; the others look for three.
"""
import os
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")
import argparse, importlib.metadata, platform, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import numba, scipy, sklearn
from sklearn.feature_selection import mutual_info_regression
sys.path.insert(0, str(Path(__file__).parent))
try: import ennemi
except ImportError: ennemi = None
import known_information
from specnb.depend import association, histogram_information, make_units, mutual_information, mutual_information_matrix, pearson_matrix, spearman_matrix, tested_statistics


def timed(f):
    "CPU seconds of one call, and what it returned."
    start = time.process_time()
    result = f()
    return time.process_time() - start, result


def survey(n_rows, n_latents, n_labels, rng, n_stars=None):
    "Latents, labels that depend on some of them (one row in ten missing), and star numbers."
    star = np.sort(rng.integers(0, n_stars, n_rows)) if n_stars else np.arange(n_rows)
    x = rng.normal(size=(n_rows, n_latents))
    y = x[:, :n_labels] * rng.uniform(0, 2, n_labels) + rng.normal(size=(n_rows, n_labels))
    y[rng.random(y.shape) < 0.1] = np.nan
    return x, y, star


def bench_information(n_rows, n_latents, n_labels, n_pairs, rounds, rng):
    x, y, _ = survey(n_rows, n_latents, n_labels, rng)
    def each(pair):
        def run():
            for a, b in pairs:
                here = np.isfinite(y[:, b])
                pair(x[here, a], y[here, b])
        return lambda: timed(run)[0] / n_pairs
    contestants = {"ours": lambda: timed(lambda: mutual_information_matrix(x, y))[0] / (n_latents * n_labels),
                   "ours, plain": lambda: timed(lambda: mutual_information_matrix(x, y, extrapolate=False))[0] / (n_latents * n_labels),
                   "scikit-learn": each(lambda u, v: mutual_info_regression(u[:, None], v, n_neighbors=3))}
    if ennemi: contestants["ennemi"] = each(lambda u, v: ennemi.estimate_mi(v, u, k=3, max_threads=1))
    for extrapolate in (False, True): mutual_information_matrix(x[:100, :2], y[:100], extrapolate=extrapolate)
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        pairs = [(rng.integers(n_latents), rng.integers(n_labels)) for _ in range(n_pairs)]
        for name, run in contestants.items(): seconds[name].append(run())
    print(f"information, N = {n_rows}, {n_latents} x {n_labels} with NaN, ms a pair: " + ", ".join(f"{name} {1e3 * np.median(v):.3f}" for name, v in seconds.items()))
    for mine in ("ours", "ours, plain"):
        ratios = {name: np.array(v) / seconds[mine] for name, v in seconds.items() if not name.startswith("ours")}
        print(f"  {mine}: " + ", ".join(f"{np.median(r):.0f} times {name} (from {r.min():.0f} to {r.max():.0f})" for name, r in ratios.items()), flush=True)


def bench_threads(n_rows, n_latents, n_labels, rounds, rng):
    x, y, _ = survey(n_rows, n_latents, n_labels, rng)
    mutual_information_matrix(x[:100, :2], y[:100])
    def clock(n_threads):
        wall, work = time.perf_counter(), time.process_time()
        mutual_information_matrix(x, y, n_threads=n_threads)
        return time.perf_counter() - wall, time.process_time() - work
    seconds = np.array([[clock(1), clock(2)] for _ in range(rounds)])               # (round, threads, clock or CPU)
    (one, cpu), (two, both) = 1e3 * np.median(seconds, axis=0) / n_latents / n_labels
    gain = seconds[:, 0, 0] / seconds[:, 1, 0]
    print(f"threads, N = {n_rows}, {n_latents} x {n_labels}, ms a pair by the clock (CPU): one {one:.3f} ({cpu:.3f}), two {two:.3f} ({both:.3f});"
          f" by the clock two are {np.median(gain):.2f} times as fast (best round {gain.max():.2f}), in CPU seconds they cost {both / cpu:.2f}", flush=True)


def bench_correlation(n_rows, n_columns, rounds, rng):
    x, y, _ = survey(n_rows, n_columns - 10, 10, rng)
    table = np.c_[x, y]
    frame = pd.DataFrame(table)
    for name, ours in (("pearson", pearson_matrix), ("spearman", spearman_matrix)):
        ratios = []
        for _ in range(rounds):
            a, mine = timed(lambda: [ours(x, y) for _ in range(5)][0])
            s, square = timed(lambda: ours(table, table))
            b, theirs = timed(lambda: frame.corr(name).values)
            ratios.append((5 * b / a, b / s))
        assert np.abs(mine - theirs[:-10, -10:]).max() < 1e-6 and np.abs(square - theirs).max() < 1e-6
        wanted, full = np.median(ratios, axis=0)
        print(f"{name}, N = {n_rows}, with NaN: {n_columns - 10} x 10 in {200 * a:.1f} ms, pandas (which does {n_columns} x {n_columns}) {1e3 * b:.0f} ms,"
              f" ratio {wanted:.1f}; all {n_columns} x {n_columns}: ratio {full:.1f}", flush=True)


def bench_null(n_rows, n_latents, n_labels, n_stars, rng, n_permutations=41):
    x, y, star = survey(n_rows, n_latents, n_labels, rng, n_stars)
    units = make_units(star)
    permutations = np.stack([rng.permutation(units.n_groups) for _ in range(n_permutations)])
    tested_statistics(x[:500], y[:500], make_units(star[:500]), np.arange(make_units(star[:500]).n_groups)[None])
    base = min(timed(lambda: tested_statistics(x, y, units, permutations[:1]))[0] for _ in range(2))
    full, _ = timed(lambda: tested_statistics(x, y, units, permutations))
    each = (full - base) / (n_permutations - 1)
    authors, _ = timed(lambda: [histogram_information(x[:, 0], y[:, 0], b) for b in (5, 10, 20, 40, 80, 160)])
    print(f"null, N = {n_rows}, {n_latents} x {n_labels}, {units.n_groups} stars, {units.n_draws} draws: {each:.3f} s a permutation, {1000 * each / 60:.1f} min for 1,000;"
          f" the histogram loop at one bin number {authors / 6 * n_latents * n_labels:.0f} s a permutation, ratio {authors / 6 * n_latents * n_labels / each:.0f}", flush=True)


def bench_accuracy():
    "Bias of both estimators, scikit-learn and ennemi over the known distributions."
    estimators = {"ours": lambda x, y: mutual_information(x, y), "ours, plain": lambda x, y: mutual_information(x, y, extrapolate=False),
                  "scikit-learn": lambda x, y: mutual_info_regression(x[:, None], y, random_state=0)[0]}
    if ennemi: estimators["ennemi"] = lambda x, y: ennemi.estimate_mi(y, x, k=3, max_threads=1).item()
    sizes, worst = {500: (200, 20), 4000: (60, 12), 50000: (8, 2)}, {}
    print(f"bias [nat] at N = {list(sizes)}, with its standard error: " + " | ".join(estimators))
    for part in ("tuning", "test"):
        for name, (sample, truth) in getattr(known_information, part)().items():
            line = f"  {part:7s}{name:26s}{truth:8.4f}"
            for n, (repeats, others) in sizes.items():
                rng = np.random.default_rng(7)
                pairs = [sample(n, rng) for _ in range(repeats)]
                for label, estimate in estimators.items():
                    error = np.array([estimate(*p) for p in pairs[:repeats if label.startswith("ours") else others]]) - truth
                    worst.setdefault((part, n), {}).setdefault(label, []).append((abs(error.mean()), error.std() / len(error) ** 0.5, error.std()))
                    line += f" {error.mean():+.3f}({error.std() / len(error) ** 0.5:.3f})"
                line += " |"
            print(line, flush=True)
    for (part, n), by in worst.items():
        print(f"  {part}, N = {n}, worst: " + ", ".join(f"{label} {max(v)[0]:.4f} (standard error {max(v)[1]:.4f}; mean scatter {np.mean([s for *_, s in v]):.3f})" for label, v in by.items()))


def bench_coverage(repeats=300, sizes=(500, 2500), choices=(True,)):
    "Share of the 90 % intervals of `association` that hold the truth, over all known distributions."
    for n in sizes:
        for extrapolate in choices:
            share = {}
            for part in ("tuning", "test"):
                for name, (sample, truth) in getattr(known_information, part)().items():
                    rng, hits = np.random.default_rng(11), []
                    for r in range(repeats):
                        x, y = sample(n, rng)
                        found = association(x[:, None], {"y": y}, n_permutations=0, seed=r, extrapolate=extrapolate).isel(latent=0, label=0)
                        hits.append((found.mi_low.item() <= truth <= found.mi_high.item(), found.mi.item() - truth))
                    inside, error = np.array(hits).T
                    share[part, name] = inside.mean()
                    print(f"  {part:7s}{name:26s} covered {share[part, name]:.3f} (standard error {np.sqrt(0.09 / repeats):.3f}), bias {error.mean():+.4f}, scatter {error.std():.4f}", flush=True)
            for part in ("tuning", "test"):
                here = np.array([v for (p, _), v in share.items() if p == part])
                print(f"coverage of the 90 % interval, N = {n}, extrapolate={extrapolate}, {part}, {repeats} repeats: mean {here.mean():.3f}, from {here.min():.3f} to {here.max():.3f},"
                      f" between 0.85 and 0.95: {((here >= 0.85) & (here <= 0.95)).sum()} of {len(here)}", flush=True)


def bench_discoveries(n_surveys=20, n_stars=150, n_latents=16, n_labels=8):
    "Surveys of repeated stars: first with no relation at all, then with a few; how many relations are invented?"
    null, power, invented, called = [], [], 0, 0
    for seed in range(n_surveys):
        rng = np.random.default_rng((77, seed))
        star = np.repeat(np.arange(n_stars), rng.integers(1, 20, n_stars))
        level = lambda columns, within: rng.normal(size=(n_stars, columns))[star] + within * rng.normal(size=(len(star), columns))
        nodes, labels = level(n_latents, rng.uniform(0.05, 0.5)), level(n_labels, 0.0)
        labels[:, ::3] = np.exp(labels[:, ::3])
        labels[:, 1] = labels[:, 0] ** 2 + 0.3 * labels[:, 1]                       # labels depend on one another
        labels[rng.random(n_stars)[star] < 0.3, 2] = np.nan
        null.append(association(nodes, dict(enumerate(labels.T)), groups=star, n_permutations=999, level=None, seed=seed))
        true = np.zeros((n_latents, n_labels), bool)
        for a, b in ((0, 3), (1, 4), (2, 5)): nodes[:, a] += (2 * labels[:, b] if b != 5 else labels[:, b] ** 2); true[a, b] = True
        power.append(association(nodes, dict(enumerate(labels.T)), groups=star, n_permutations=999, level=None, seed=seed))
        found = power[-1].q.values < 0.05
        invented, called = invented + (found & ~true).sum(), called + found.sum()
    tests = n_surveys * n_latents * n_labels
    print(f"{n_surveys} null surveys, {n_stars} stars of 1 to 19 exposures, {tests} pairs: p <= 0.05 in {sum((r.p <= 0.05).sum().item() for r in null) / tests:.3f} (Spearman {sum((r.p_spearman <= 0.05).sum().item() for r in null) / tests:.3f});"
          f" surveys with any q < 0.05: {sum((r.q < 0.05).any().item() for r in null)}, with any family-wise p <= 0.05: {sum((r.p_family <= 0.05).any().item() for r in null)}")
    print(f"the same with three relations each: {called} called at q < 0.05, {invented} of them invented (share {invented / max(called, 1):.3f}), {called - invented} of {3 * n_surveys} found", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also N = 270,000 (minutes)")
    parser.add_argument("--accuracy", action="store_true", help="bias over the known distributions (minutes)")
    parser.add_argument("--coverage", action="store_true", help="coverage of the intervals, 300 samples of every known distribution (minutes)")
    parser.add_argument("--discoveries", action="store_true", help="false discoveries over 20 surveys")
    parser.add_argument("--threads", action="store_true", help="one thread against two")
    given = parser.parse_args()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?") if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__},"
          f" numba {numba.__version__}, scikit-learn {sklearn.__version__}, ennemi {importlib.metadata.version('ennemi') if ennemi else 'not installed'}, pandas {pd.__version__}")
    if not ennemi: print("ennemi is not installed and takes no part; `pip install ennemi==1.5.0` brings it in")
    rng = np.random.default_rng(0)
    bench_information(4061, 128, 10, 10, 5, rng)
    bench_correlation(4061, 138, 5, rng)
    if given.large:
        bench_information(270_000, 64, 10, 2, 2, rng)
        bench_null(270_000, 128, 10, 7007, rng)
    if given.threads: bench_threads(4061, 128, 10, 7, rng)
    if given.threads and given.large: bench_threads(270_000, 32, 10, 2, rng)
    if given.discoveries: bench_discoveries()
    if given.accuracy: bench_accuracy()
    if given.coverage: bench_coverage()
