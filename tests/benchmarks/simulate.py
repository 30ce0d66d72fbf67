"""How many spectra a second the simulator makes, at the lengths that matter, and how long a survey of 10,000 spectra takes.

    OMP_NUM_THREADS=1 python tests/benchmarks/simulate.py [--threads 1 2] [--survey 10000]

Each figure is the median of several repetitions after the templates are in the cache; the first call, which makes them, is timed apart.
"""
import argparse
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from specnb.simulate import sample_survey
from specnb.wave import log_grid

SIZES = {4_096: 512, 32_768: 48, 327_680: 12}  # pixels: spectra in a repetition


def machine():
    "Processor, cores and versions, in one line."
    name = platform.processor() or "processor unknown"
    if os.path.exists("/proc/cpuinfo"):
        found = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = found[0] if found else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in ("numpy", "scipy", "xarray", "specnb"))


def seconds(function):
    start = time.perf_counter(); function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--survey", type=int, default=10_000, help="spectra of the demo's survey; 0 leaves it out")
    args = parser.parse_args()
    print(machine()); print(f"load {os.getloadavg()[0]:.1f} at the start, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    for pixels, n in SIZES.items():
        grid = log_grid(3785, 6910, pixels)
        print(f"{pixels:>7,} pixels: first call {seconds(lambda: sample_survey(1, wavelength=grid)):.1f} s", flush=True)
        for threads in args.threads:
            taken = [seconds(lambda: sample_survey(n, seed=i, wavelength=grid, n_threads=threads)) for i in range(args.repeat)]
            rates = [n / t for t in taken]
            print(f"        {threads} thread{'s' * (threads > 1)}: {statistics.median(rates):7.1f} spectra a second (range {min(rates):.1f}-{max(rates):.1f}, {args.repeat} repetitions of {n})", flush=True)
    hidden = seconds(lambda: sample_survey(512, hidden=("activity", "epoch", "companion"), n_threads=1))
    print(f"with every hidden cause, 4,096 pixels, 1 thread: {512 / hidden:.1f} spectra a second")
    if args.survey:
        before, taken = time.process_time(), seconds(lambda: sample_survey(args.survey, n_threads=max(args.threads)))
        print(f"survey of {args.survey:,} spectra of 4,096 pixels, {max(args.threads)} threads: {taken:.1f} s, {time.process_time() - before:.1f} CPU s")
    return 0


if __name__ == "__main__": sys.exit(main())
