"""Training and encoding at full length, 327,680 pixels, beside the published network as anyone would run it.

Run `python tests/benchmarks/bench_scale.py [--rounds 7] [--bs 16] [--threads 1 2] [--only step encode ...] [--device cpu]`. Every contestant is a process of its own, since the allocator is a
property of the process; they take turns, one training step each, and the medians of the ratios within a round are printed, by the clock. Contestants:

  eager            the published layers in PyTorch's own modules, mean squared error + KL, Adam, the system's allocator
  eager, tuned     the same with the allocator told to keep its memory
  compiled, tuned  the same through torch.compile (only with --compile; takes minutes to start)
  ours             specnb's network, masked loss + KL, gradient clip, AdamW, tuned; also in bfloat16, with checkpoint_rows=2, and with the system's allocator

Sections: `step`, `encode`, `gradients` (agreement with eager and with double precision), `fastai` (overhead of the Learner over a bare loop), `waiting` (share of the time spent waiting for a
warm store), `streaming` (encoding a store beside the forward pass alone), `plan` (what specnb.scale.plan says beside what is then measured), `presets` (our own networks at full length). On a GPU: `--device cuda`, with float32, tf32 and bfloat16.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

N_PIXELS = 327_680
STAGES = [(16, 7, 2), (16, 5, 2), (16, 5, 2), (32, 3, 2), (32, 3, 2), (32, 3, 2), (64, 3, 2), (64, 3, 2), (64, 3, 2), (128, 3, 2), (128, 3, 2), (128, 3, 2), (256, 3, 2), (512, 3, 2), (512, 3, 1)]


def published():
    "The published network in PyTorch's own modules; forward gives output, mean and log variance."
    import torch
    from torch import nn

    class Published(nn.Module):
        def __init__(self):
            super().__init__()
            down, up, inward = [], [], 1
            for outward, kernel, stride in STAGES:
                down += [nn.Conv1d(inward, outward, kernel, stride, (kernel - 1)//2), nn.LeakyReLU(0.1)]
                up = [nn.ConvTranspose1d(outward, inward, 4 if stride == 2 else 3, stride, 1), nn.LeakyReLU(0.1)] + up
                inward = outward
            self.down, self.up, self.last = nn.Sequential(*down), nn.Sequential(*up), nn.Conv1d(1, 1, 3, padding=1)
            self.mean, self.logvar, self.back = nn.Linear(10_240, 128), nn.Linear(10_240, 128), nn.Linear(128, 10_240)

        def encode(self, x):
            hidden = self.down(x[:, None]).flatten(1)
            return self.mean(hidden), self.logvar(hidden)

        def forward(self, x):
            mean, logvar = self.encode(x)
            z = mean + torch.randn_like(mean)*(0.5*logvar).exp()
            return self.last(self.up(self.back(z).unflatten(1, (512, 20))))[:, 0], mean, logvar
    return Published()


def kl(mean, logvar): return 0.5*(mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()


def contestant(name, bs, device):
    "Functions `step` and `encode` of one contestant."
    import torch
    from specnb.nets import build_network, net_config
    from specnb.objectives import masked_l2
    from specnb.scale import tune_allocator
    if name != "eager" and "system" not in name: tune_allocator()
    if "tf32" in name: torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    flux = (1 + 0.1*torch.randn(bs, N_PIXELS)).to(device)
    ivar = torch.full_like(flux, 100.); ivar[:, 150_000:153_000] = 0
    if name.startswith(("eager", "compiled")):
        model = published().to(device)
        opt = torch.optim.Adam(model.parameters(), lr=1e-4)
        run = torch.compile(model) if name.startswith("compiled") else model
        def loss():
            output, mean, logvar = run(flux)
            return torch.nn.functional.mse_loss(output, flux) + 1e-4*kl(mean, logvar)
    else:
        preset = next((p for p in ("demo_conv", "demo") if p in name), "paper")
        model = build_network(net_config(preset, N_PIXELS)).to(device)
        model.set_compute("bfloat16" if "bf16" in name else "float32", "plain" if "plain" in name else "stack" if "stack" in name else "auto", 2 if "checkpoint" in name else None)
        if not model.frontend.fitted: model.frontend.fit([(flux, ivar)])
        model.train()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
        def loss():
            out = model(flux, ivar)
            return masked_l2(*out[4:7]) + 1e-4*kl(*out[1:3])

    def step():
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad(set_to_none=True)
        return float(value.detach())

    def encode():
        with torch.inference_mode(): mean = (model.encode(flux) if name.startswith(("eager", "compiled")) else model.encode(flux, ivar))[0]
        return float(mean[0, 0])
    return dict(step=step, encode=encode)


def serve(name, bs, n_threads, device):
    "Do what is asked for on standard input, and say how long it took."
    import torch
    from specnb.progress import peak_memory
    torch.set_num_threads(n_threads)
    empty, does = peak_memory(device), None
    for line in sys.stdin:
        if does is None: does = contestant(name, bs, device)
        start, cpu = time.perf_counter(), time.process_time()
        does[line.strip()]()
        print(json.dumps(dict(clock=(time.perf_counter() - start)/bs, cpu=(time.process_time() - cpu)/bs, gib=peak_memory(device), empty=empty)), flush=True)


class Contestant:
    def __init__(self, name, bs, n_threads, device):
        self.name, words = name, [sys.executable, __file__, "--serve", name, str(bs), str(n_threads), device]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(n_threads)))

    def do(self, what):
        self.process.stdin.write(what + "\n"); self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self): self.process.stdin.close(); self.process.wait()


def race(what, names, rounds, bs, n_threads, device):
    "Contestants in turn; prints medians, and the median of each round's ratio to the first two."
    import numpy as np
    field = [Contestant(name, bs, n_threads, device) for name in names]
    for one in field:
        for _ in range(2): one.do(what) # warm
    rows = [[one.do(what) for one in field] for _ in range(rounds)]
    for one in field: one.end()
    clock = np.array([[r["clock"] for r in row] for row in rows])*1e3
    print(f"\n{what}, batch {bs}, {n_threads} thread(s), {device}: ms a spectrum (quartiles), times as fast as {names[0]!r} / {names[1]!r}, memory a spectrum")
    for i, name in enumerate(names):
        low, middle, high = np.percentile(clock[:, i], [25, 50, 75])
        memory = 1024*(rows[-1][i]["gib"] - rows[-1][i]["empty"])/bs
        print(f"  {name:28s}{middle:8.1f} ({low:.1f}-{high:.1f}){np.median(clock[:, 0]/clock[:, i]):8.2f} /{np.median(clock[:, 1]/clock[:, i]):6.2f}{memory:10.0f} MiB")


def gradients(bs=2):
    "Relative differences of all gradients: ours and eager in float32 beside eager in double precision."
    import torch
    from specnb.nets import build_network
    torch.manual_seed(0)
    flux = 1 + 0.1*torch.randn(bs, N_PIXELS)
    model, found = build_network("paper").eval(), {}
    for name, way, dtype, precision in (("double", "plain", torch.float64, "float32"), ("eager", "plain", torch.float32, "float32"), ("ours", "stack", torch.float32, "float32"), ("ours in bfloat16", "stack", torch.float32, "bfloat16")):
        model.to(dtype).set_compute(precision, way)
        x = flux.to(dtype)[:, None]
        if dtype == torch.float64: (mean, logvar), decode = model.encode_channels(x), model.decode_channels # the front end and `encode` are in float32
        else: (mean, logvar), decode = model.encode(x), lambda z: model.decode(z)[:, None]
        loss = (decode(mean) - x).square().mean() + 1e-4*kl(mean, logvar)
        found[name] = {n: g.double() for (n, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())))}
    difference = lambda a, b: (torch.cat([(a[n] - b[n]).flatten() for n in a]).norm()/torch.cat([b[n].flatten() for n in b]).norm()).item()
    worst = lambda a, b: max(((a[n] - b[n]).norm()/b[n].norm().clamp_min(1e-300)).item() for n in a)
    print("\ngradients: relative difference of the whole gradient (of the worst single parameter)")
    for a, b in (("ours", "eager"), ("eager", "double"), ("ours", "double"), ("ours in bfloat16", "double")):
        print(f"  {a:18s} against {b:8s}{difference(found[a], found[b]):10.1e} ({worst(found[a], found[b]):.1e})")


def make_store(folder, n=48):
    "A store of full-length spectra as ingest writes it: plain chunks, flux and inverse variance in float32."
    import numpy as np
    from specnb.spectra import make_spectra, save_store
    from specnb.wave import log_grid
    rng, wave = np.random.default_rng(0), log_grid(3785., 6910., N_PIXELS)
    flux = (1 + 0.1*rng.standard_normal((n, N_PIXELS))).astype("f4")
    ds = make_spectra(flux, np.full_like(flux, 100), wave, [f"s{i}" for i in range(n)], medium="air", frame="barycentric", coords=dict(object=np.array([f"star {i//2}" for i in range(n)])))
    path = save_store(ds, folder/"source.zarr", chunk_rows=12)
    import xarray as xr
    opened, plain = xr.open_zarr(path, consolidated=False), folder/"plain.zarr"
    for v in opened.variables.values(): v.encoding.clear()
    opened.to_zarr(plain, zarr_format=3, consolidated=False, encoding={name: dict(chunks=(12, N_PIXELS), compressors=None, filters=None) for name in ("flux", "ivar")})
    return plain


def learner_on(store, bs, **kwargs):
    import numpy as np
    from specnb.learner import spectrum_learner
    from specnb.loader import spectrum_dataloaders
    from specnb.spectra import open_store
    ds = open_store(store)
    split = np.where(np.arange(ds.sizes["spectrum"]) < ds.sizes["spectrum"] - 8, "train", "valid")
    dls = spectrum_dataloaders(ds, split=split, bs=bs, device="cpu", **kwargs)
    assert kwargs.get("memory_limit", 1) > 0 or dls.train.dataset.raw
    learn = spectrum_learner(dls, "paper", "beta_vae", lr=1e-4)
    learn.logger = lambda *row: None
    return learn


def fastai_overhead(store, rounds, bs, n_threads):
    "An epoch by Learner.fit and by a bare loop that computes the same, in turn, in one process."
    import numpy as np, torch
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from specnb.callbacks import objective_terms
    torch.set_num_threads(n_threads)
    learn = learner_on(store, bs)
    learn.remove_cb(ProgressCallback)
    class TrainOnly(Callback):
        order = 100 # after those that make ready for validation
        def before_validate(self):
            from fastai.callback.core import CancelValidException
            raise CancelValidException
        def before_fit(self): torch.manual_seed(0)
    learn.add_cb(TrainOnly())
    loader, model = learn.dls.train, learn.model
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)

    def bare():
        model.train()
        for flux, ivar, *_ in loader:
            out = model(flux, ivar)
            loss = learn.loss_func(out, flux, ivar)
            for value, weight in objective_terms(learn.disentangle.objective, 0.5, *out[1:4], len(loader.dataset)).values():
                if weight: loss = loss + weight*value
            float(loss.detach())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step(); opt.zero_grad()

    def by_fastai(): learn.fit(1)
    times = {bare: [], by_fastai: []}
    for round in range(rounds + 1):
        for way in (bare, by_fastai):
            start = time.perf_counter(); way(); times[way].append(time.perf_counter() - start)
    ratio = np.array(times[by_fastai][1:])/np.array(times[bare][1:])
    print(f"\nfastai: an epoch of {len(loader.dataset)} spectra, batch {bs}, {n_threads} thread(s): Learner.fit / bare loop = {np.median(ratio):.3f} (quartiles {np.percentile(ratio, 25):.3f}-{np.percentile(ratio, 75):.3f}); "
          f"{1e3*np.median(times[bare][1:])/len(loader.dataset):.1f} ms a spectrum bare")


def waiting(store, bs, n_threads):
    import torch
    torch.set_num_threads(n_threads)
    from fastai.callback.progress import ProgressCallback
    learn = learner_on(store, bs, memory_limit=0)
    learn.remove_cb(ProgressCallback)
    learn.fit(3)
    table = learn.throughput.frame()
    print(f"\nwaiting for a warm store, batch {bs}, {n_threads} thread(s): {', '.join(f'{w:.1%}' for w in table.waiting)} of three epochs; {table.spectra_per_second.iloc[-1]:.1f} spectra/s, peak {table.memory_gib.iloc[-1]:.1f} GiB")


def streaming(store, rounds, bs, n_threads):
    "A store encoded by specnb.encode, and the same spectra from memory by the network alone, in turn."
    import numpy as np, torch
    from specnb.encode import encode, encode_rows
    from specnb.learner import load_bundle, save_bundle
    from specnb.loader import ready_rows
    from specnb.spectra import open_store
    torch.set_num_threads(n_threads)
    learn, ds = learner_on(store, bs), open_store(store)
    data = learn.dls.train.dataset
    bundle = load_bundle(save_bundle(Path(store).parent/"bundle", learn.model, wavelength=data.wavelength, recipe=data.recipe))
    flux, ivar = ready_rows(ds, data.recipe)
    ways = dict(store=lambda: encode(bundle, ds, bs=bs, progress=False), memory=lambda: [encode_rows(bundle.model, flux[i:i + bs], ivar[i:i + bs]) for i in range(0, len(flux), bs)])
    times = {name: [] for name in ways}
    for round in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter(); way(); times[name].append(time.perf_counter() - start)
    ratio = np.array(times["store"][1:])/np.array(times["memory"][1:])
    print(f"\nstreaming: encoding {len(flux)} spectra (codes and chi-square, so encoder and decoder), batch {bs}, {n_threads} thread(s): from the store / from memory = {np.median(ratio):.3f}; {1e3*np.median(times['store'][1:])/len(flux):.1f} ms a spectrum")


def plan_check(store, bs, n_threads):
    import torch
    from specnb.scale import plan
    torch.set_num_threads(n_threads)
    told = plan(store, "paper", bs=bs, n_epoch=1, device="cpu")
    value = dict(zip(told.quantity, told.value))
    one = Contestant("ours", bs, n_threads, "cpu")
    rows = [one.do("step") for _ in range(4)]
    one.end()
    rate = 1/sorted(r["clock"] for r in rows[1:])[1]
    print(f"\nplan: computing {value['computing']:.1f} spectra/s, measured {rate:.1f}; memory at batch {bs} {value[f'memory at batch {bs}']:.2f} GiB, measured {rows[-1]['gib']:.2f}; "
          f"reading {value['reading']:.0f} spectra/s; largest batch {value['largest batch']:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7); parser.add_argument("--bs", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2]); parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true"); parser.add_argument("--serve", nargs=4)
    parser.add_argument("--only", nargs="+", default=["step", "encode", "gradients", "fastai", "waiting", "streaming", "plan", "presets"])
    args = parser.parse_args()
    if args.serve: return serve(args.serve[0], int(args.serve[1]), int(args.serve[2]), args.serve[3])
    import torch
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    on_gpu = args.device != "cpu"
    if on_gpu and not torch.cuda.is_available(): return print("no CUDA device here: nothing to measure")
    if on_gpu: print(torch.cuda.get_device_name())
    names = ["eager", "eager, tuned", "ours", "ours, system allocator", "ours, bf16", "ours, checkpoint"] + ["compiled, tuned"]*args.compile
    if on_gpu: names = ["eager", "eager, tf32", "ours", "ours, tf32", "ours, tf32, bf16", "ours, stack", "ours, stack, tf32", "ours, stack, tf32, bf16", "ours, stack, checkpoint"] + ["compiled, tf32"]*args.compile
    for n_threads in args.threads[:1] if on_gpu else args.threads:
        for what in ("step", "encode"):
            if what in args.only: race(what, names if what == "step" or on_gpu else names[:5], args.rounds, args.bs, n_threads, args.device)
        if "presets" in args.only: race("step", ["ours, plain", "ours", "ours, demo_conv", "ours, demo_conv, bf16"], max(args.rounds//2, 3), args.bs, n_threads, args.device)
    if on_gpu: return
    if "gradients" in args.only: gradients()
    if {"fastai", "waiting", "streaming", "plan"} & set(args.only):
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(Path(folder))
            from specnb.scale import tune_allocator
            tune_allocator()
            for n_threads in args.threads:
                if "fastai" in args.only: fastai_overhead(store, args.rounds, 8, n_threads)
                if "waiting" in args.only: waiting(store, 8, n_threads)
                if "streaming" in args.only: streaming(store, args.rounds, 16, n_threads)
                if "plan" in args.only: plan_check(store, args.bs, n_threads)


if __name__ == "__main__": main()
