"""How quickly the inspector answers, in a real headless browser.

Run `python tests/benchmarks/bench_app.py [slider] [paper] [map] [start]`. Each case serves the inspector from a process of its own, drives Chromium
through it, and prints the median of the time from the hand to the second animation frame after the new data arrived in the browser, so that the
new pixels are on the screen. The networks have fresh weights: how long a decoder takes does not depend on what it has learned.
The bars are those of the project: slider 200 ms at 32,768 pixels and 500 ms with the network of the paper at 327,680; zoom 250 ms at
327,680 pixels; map of 270,000 points 500 ms; ready 5 s after the start. The load of the machine is printed beside each, as it moves them.
"""
import argparse, importlib.metadata, os, platform, shutil, subprocess, sys, tempfile, time
import numpy as np

PARTS = '''
import sys, time, types
import numpy as np, xarray as xr
from specnb.app import inspector, serve
from specnb.spectra import make_latents, make_spectra
from specnb.wave import linear_grid
rng = np.random.default_rng(0)

def with_network(config, n_spectra=20):
    import torch
    from specnb.encode import decoder
    from specnb.nets import build_network
    torch.manual_seed(0)
    model = build_network(config)
    n, grid = model.config.n_latent, np.linspace(3785., 6910., model.config.n_pixels)
    decode = decoder(types.SimpleNamespace(model=model, config=model.config))
    z = rng.normal(size=(n_spectra, n)).astype("float32")
    flux = np.concatenate([1 + 0.05 * rng.normal(size=(1, len(grid))) for _ in z]).astype("float32")
    coords = dict(object=[f"star {i}" for i in range(n_spectra)], radial_velocity=(rng.normal(0, 30, n_spectra), dict(units="km/s", role="label")))
    spectra = make_spectra(flux, np.full_like(flux, 400.), grid, [f"s{i}" for i in range(n_spectra)], medium="air", frame="barycentric", coords=coords)
    return dict(latents=make_latents(z, np.full_like(z, .1), coords_from=spectra), decode=decode, spectra=spectra)

def many(n=270_000, n_latent=128):
    z = rng.normal(size=(n, n_latent)).astype("float32") * np.r_[np.ones(6), np.full(n_latent - 6, 1e-3)].astype("float32")
    z[:, 1] += z[:, 0]**2
    coords = dict(object=[f"star {i // 40}" for i in range(n)], teff=(5500 + 500 * z[:, 2].astype(float), dict(units="K", role="label")), snr=(np.exp(rng.normal(4, .5, n)), dict(units="")))
    return dict(latents=make_latents(z, np.full_like(z, .1), chi2=np.ones(n), spectrum_id=np.array([f"s{i}" for i in range(n)]), coords_from=None).assign_coords({k: ("spectrum", *(v if isinstance(v, tuple) else (v,))) for k, v in coords.items()}))
'''
SERVE = {
    "slider": "from specnb.nets import net_config\nparts = with_network(net_config('demo', n_pixels=32_768))",
    "paper": "parts = with_network('paper')",
    "map": "parts = many()",
}
FIND = "const find=css=>{const out=[];const walk=r=>r.querySelectorAll('*').forEach(e=>{if(e.matches(css))out.push(e);if(e.shadowRoot)walk(e.shadowRoot)});walk(document);return out};"
# waits until a data source of a glyph of this kind was given new data, then for two frames, and returns the milliseconds since `act`
WAIT = FIND + """const [kind, act, seconds, done] = arguments;
const sources = () => {const out=new Map();for(const doc of Bokeh.documents)for(const m of doc._all_models.values())if(m.type=='GlyphRenderer'&&kind.includes(m.glyph.type)){const d=m.data_source.data;
  const v=d.get?[...d.values()]:Object.values(d);out.set(m.data_source.id,[d,...v])}return out};
const figure = range => {for(const doc of Bokeh.documents)for(const m of doc._all_models.values()){if(m.type!='Figure'||m.x_range.type!='Range1d')continue;const v=Bokeh.index.find_one(m);
  if(v&&v.el&&v.el.isConnected&&v.el.getBoundingClientRect().width>50)return m}};
const before = sources(), start = performance.now();
eval(act);
const same=(a,b)=>a.length==b.length&&a.every((x,i)=>x===b[i]);
const look=()=>{const now=sources();let fresh=false;for(const [id,data] of now)if(!before.has(id)||!same(before.get(id),data))fresh=true;
  if(fresh){const arrived=performance.now()-start;requestAnimationFrame(()=>requestAnimationFrame(()=>done([performance.now()-start,arrived])))}else if(performance.now()-start>seconds*1000)done([-1,-1]);else requestAnimationFrame(look)};
look()"""
KEY = "find('.noUi-handle')[0].dispatchEvent(new KeyboardEvent('keydown',{key:'%s',bubbles:true,cancelable:true}))"
# one turn of the wheel over the middle of the plot, as a hand makes it
ZOOM = """const v=Bokeh.index.find_one(figure()),f=v.frame.bbox,box=v.el.getBoundingClientRect(),x=box.left+(f.left+f.right)/2,y=box.top+(f.top+f.bottom)/2;
let e=document.elementFromPoint(x,y);while(e.shadowRoot&&e.shadowRoot.elementFromPoint(x,y)&&e.shadowRoot.elementFromPoint(x,y)!==e)e=e.shadowRoot.elementFromPoint(x,y);
e.dispatchEvent(new WheelEvent('wheel',{deltaY:%d,clientX:x,clientY:y,bubbles:true,cancelable:true,composed:true}))"""


def browser():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    folder = tempfile.mkdtemp()
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-dev-shm-usage",
                   "window-size=1400,1000", f"user-data-dir={folder}"): options.add_argument(f"--{switch}")
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    window.set_script_timeout(60)
    return window


def tab(window, name):
    script = FIND + "const t=find('.bk-tab').filter(e=>e.innerText.trim()==arguments[0]);if(t.length)t[0].click();return t.length"
    end = time.perf_counter() + 60
    while not window.execute_script(script, name):
        if time.perf_counter() > end: raise SystemExit(f"no tab {name!r} within a minute")
        time.sleep(0.05)
    time.sleep(4)


def measure(window, kind, actions, pause=1.5):
    "Milliseconds of each action, to the screen and to the arrival of the data; the first, which compiles and warms up, is left out."
    took = []
    for act in actions:
        took.append(window.execute_async_script(WAIT, kind, act, 20))
        time.sleep(pause)
    return took[1:]


def report(name, took, bar):
    lost = sum(painted < 0 for painted, _ in took)
    painted, arrived = np.array([pair for pair in took if pair[0] >= 0] or [(np.nan, np.nan)]).T
    print(f"{name:<56} {np.median(painted):6.0f} ms   (data arrived {np.median(arrived):.0f}; smallest {painted.min():.0f}, largest {painted.max():.0f}, n {len(painted)}"
          f"{f', {lost} without an answer' if lost else ''})   bar {bar} ms   load {os.getloadavg()[0]:.1f}", flush=True)


def memory(pid):
    "Resident memory of a process [MiB], and its peak."
    lines = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status") if line.startswith(("VmRSS", "VmHWM")))
    return [int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]


def stop(server):
    "End a server, by force if it does not go by itself."
    server.terminate()
    try: server.wait(10)
    except subprocess.TimeoutExpired: server.kill(), server.wait()


def case(name, n):
    code = PARTS + SERVE[name] + "\nserve(lambda: inspector(**parts, title='bench'))\n"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    window = browser()
    try:
        address = server.stdout.readline().split()[0]
        start = time.perf_counter()
        window.get(address)
        tab(window, "Nodes")
        keys = [KEY % ("ArrowRight" if i % 2 else "ArrowLeft") for i in range(n)]
        if name == "slider": report("slider to pixels, 32,768 pixels, preset demo", measure(window, ["Line"], keys), 200)
        if name == "paper":
            report("slider to pixels, 327,680 pixels, network of the paper", measure(window, ["Line"], keys, 3.), 500)
            tab(window, "Spectrum")
            report("zoom to redraw, 327,680 pixels", measure(window, ["Line"], [ZOOM % (-240 if i % 8 < 5 else 240) for i in range(n)]), 250)
        if name == "map":
            tab(window, "Map")
            report("zoom of the map, 270,000 points", measure(window, ["Image"], [ZOOM % (-240 if i % 8 < 5 else 240) for i in range(n)], 2.), 500)
            print("server at 270,000 latents of 128 nodes: {:.0f} MiB resident, {:.0f} MiB at most".format(*memory(server.pid)), flush=True)
        worst = [entry["message"] for entry in window.get_log("browser") if entry["level"] == "SEVERE"]
        if worst: print("the console complains:", *worst, sep="\n  ")
    finally:
        window.quit()
        stop(server)


def started(n=3):
    "Seconds from the command `specnb inspect` to tabs and the observed spectrum in an open browser, and to what the network makes of it; for a small run that is made first."
    import psutil
    from specnb import run
    took, window = [], browser()
    with tempfile.TemporaryDirectory() as folder:
        store = run.simulate(f"{folder}/survey.zarr", n_stars=1000, n_pixels=4096)
        trained = run.train(store, f"{folder}/run", n_epoch=1)
        run.encode(trained, progress=False)
        run.analyse(trained, n_permutations=99)
        for _ in range(n):
            start = time.perf_counter()
            server = subprocess.Popen([sys.executable, "-c", f"from specnb.run import inspect; inspect({str(trained)!r}, show=False)"], stdout=subprocess.PIPE, text=True)
            window.get(server.stdout.readline().split()[0])
            answered = time.perf_counter() - start
            script = FIND + "return find('.bk-tab').length*find('canvas').length"
            while not window.execute_script(script): time.sleep(0.02)
            plots = time.perf_counter() - start
            script = "return [...Bokeh.documents].flatMap(d=>[...d._all_models.values()]).filter(m=>m.type=='GlyphRenderer'&&m.glyph.type=='Line').length"
            while window.execute_script(script) < 4: time.sleep(0.02)       # observed, reconstruction, moved, response
            times = psutil.Process(server.pid).cpu_times()
            took.append((answered, plots, time.perf_counter() - start, times.user + times.system))
            stop(server)
    window.quit()
    middle = np.median(took, axis=0)
    print(f"start of the command to tabs and plots in the browser      {middle[1]:6.1f} s    (page loaded {middle[0]:.1f} s, reconstruction {middle[2]:.1f} s, processor time of the server {middle[3]:.1f} s, n {n})   bar 5 s   load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("-n", type=int, default=13, help="actions of each kind, the first of which is not counted")
    asked = parser.parse_args()
    if not (shutil.which("chromium") or shutil.which("google-chrome")) or not shutil.which("chromedriver"): print("skipped: needs a browser, apt-get install chromium chromium-driver"); sys.exit()
    names = ("panel", "holoviews", "bokeh", "datashader", "torch", "numpy")
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    for name in asked.cases or (*SERVE, "start"): started() if name == "start" else case(name, asked.n)
