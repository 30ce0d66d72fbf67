"""Speed and accuracy of specnb.depend beside scikit-learn and pandas.

Run `python tests/benchmarks/bench_depend.py [--large] [--accuracy]`. Contestants take turns and the median of the ratios is
printed, so that a busy machine slows both. CPU seconds of this process are counted, one thread. scikit-learn is timed on a few
pairs of the matrix, ours on the whole matrix, ranking included.
"""
import os
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")
import argparse, platform, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import numba, scipy, sklearn
from sklearn.feature_selection import mutual_info_regression
sys.path.insert(0, str(Path(__file__).parent))
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
    mutual_information_matrix(x[:100, :2], y[:100])
    ratios, ours, theirs = [], [], []
    for r in range(rounds):
        t, mi = timed(lambda: mutual_information_matrix(x, y))
        ours.append(t / mi.size)
        pairs = [(rng.integers(n_latents), rng.integers(n_labels)) for _ in range(n_pairs)]
        def sklearn_pairs():
            for a, b in pairs:
                here = np.isfinite(y[:, b])
                mutual_info_regression(x[here, a][:, None], y[here, b], n_neighbors=3)
        t, _ = timed(sklearn_pairs)
        theirs.append(t / n_pairs)
        ratios.append(theirs[-1] / ours[-1])
    print(f"information, N = {n_rows}, {n_latents} x {n_labels} with NaN: {1e3 * np.median(ours):.3f} ms a pair, scikit-learn {1e3 * np.median(theirs):.1f} ms,"
          f" ratio {np.median(ratios):.0f} (from {min(ratios):.0f} to {max(ratios):.0f})", flush=True)


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


def bench_null(n_rows, n_latents, n_labels, n_stars, rng, n_permutations=5):
    x, y, star = survey(n_rows, n_latents, n_labels, rng, n_stars)
    units = make_units(star)
    permutations = np.stack([rng.permutation(units.n_groups) for _ in range(n_permutations)])
    tested_statistics(x[:500], y[:500], make_units(star[:500]), np.arange(make_units(star[:500]).n_groups)[None])
    base, _ = timed(lambda: tested_statistics(x, y, units, permutations[:1]))
    full, _ = timed(lambda: tested_statistics(x, y, units, permutations))
    each = (full - base) / (n_permutations - 1)
    authors, _ = timed(lambda: [histogram_information(x[:, 0], y[:, 0], b) for b in (5, 10, 20, 40, 80, 160)])
    print(f"null, N = {n_rows}, {n_latents} x {n_labels}, {units.n_groups} stars, {units.n_draws} draws: {each:.3f} s a permutation, {1000 * each / 60:.1f} min for 1,000;"
          f" the histogram loop at one bin number {authors / 6 * n_latents * n_labels:.0f} s a permutation, ratio {authors / 6 * n_latents * n_labels / each:.0f}", flush=True)


def bench_accuracy(extrapolate):
    print(f"bias [nat], extrapolate={extrapolate}; scikit-learn in brackets")
    worst = {}
    for part in ("tuning", "test"):
        for name, (sample, truth) in getattr(known_information, part)().items():
            line = f"  {part:7s}{name:26s}{truth:8.4f}"
            for n, repeats in ((500, 100), (4000, 24), (50000, 5)):
                rng = np.random.default_rng(7)
                error, theirs = [], []
                for r in range(repeats):
                    x, y = sample(n, rng)
                    error.append(mutual_information(x, y, extrapolate=extrapolate) - truth)
                    if r < (20 if n < 50000 else 2): theirs.append(mutual_info_regression(x[:, None], y, random_state=0)[0] - truth)
                worst.setdefault(n, []).append((abs(np.mean(error)), abs(np.mean(theirs))))
                line += f"   {np.mean(error):+.4f} ({np.mean(theirs):+.4f})"
            print(line, flush=True)
    for n, pairs in worst.items(): print(f"  worst at N = {n}: {max(a for a, _ in pairs):.4f} (scikit-learn {max(b for _, b in pairs):.4f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also N = 270,000 (minutes)")
    parser.add_argument("--accuracy", action="store_true", help="bias over the known distributions (minutes)")
    given = parser.parse_args()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?") if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__},"
          f" numba {numba.__version__}, scikit-learn {sklearn.__version__}, pandas {pd.__version__}")
    rng = np.random.default_rng(0)
    bench_information(4061, 128, 10, 10, 5, rng)
    bench_correlation(4061, 138, 5, rng)
    if given.large:
        bench_information(270_000, 128, 10, 3, 2, rng)
        bench_null(270_000, 128, 10, 7007, rng)
    if given.accuracy:
        for extrapolate in (False, True): bench_accuracy(extrapolate)
