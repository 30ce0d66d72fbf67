"""At full scale: the allocator, plans, encoding that is killed and goes on."""
import os
import platform
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import xarray as xr

from specnb.encode import Parts, encode
from specnb.learner import load_bundle, save_bundle, spectrum_learner
from specnb.loader import spectrum_dataloaders
from specnb.nets import net_config
from specnb.run import plan
from specnb.scale import join_processes, network_work, paper_budget, step_costs, tune_allocator
from specnb.simulate import sample_survey
from specnb.spectra import open_store, save_store
from specnb.wave import log_grid


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A store of 120 spectra in chunks of 16, and an untrained bundle for it."
    folder = tmp_path_factory.mktemp("scale")
    ds = sample_survey(120, seed=5, wavelength=log_grid(5000, 5500, 512))
    store = save_store(ds, folder / "survey.zarr", chunk_rows=16)
    dls = spectrum_dataloaders(ds, bs=16, device="cpu")
    learn = spectrum_learner(dls, "tiny")
    return store, save_bundle(folder / "bundle", learn.model, wavelength=dls.train.dataset.wavelength, recipe=dls.train.dataset.recipe)


ENCODE = textwrap.dedent("""
    import os, signal, sys
    import specnb.encode as module
    from specnb.learner import load_bundle
    from specnb.spectra import open_store, save_store
    store, bundle, parts, out, after = sys.argv[1:]
    whole, n = module.encode_rows, []
    def counted(*args):
        n.append(1)
        if len(n) == int(after): os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)
    module.encode_rows = counted
    save_store(module.encode(load_bundle(bundle), open_store(store), bs=8, progress=False, parts=parts), out)
    print(len(n))
""")


def test_encoding_survives_being_killed(trained, tmp_path):
    store, bundle = trained
    def run(after): return subprocess.run([sys.executable, "-c", ENCODE, str(store), str(bundle), str(tmp_path/"parts"), str(tmp_path/"out.zarr"), str(after)], capture_output=True, text=True, timeout=200, env=os.environ | dict(OMP_NUM_THREADS="1"))
    for _ in range(2):
        done = run(6)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run(0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120//8 - 4 # what the first two had finished was not done again
    expected = encode(load_bundle(bundle), open_store(store), bs=8, progress=False)
    found = xr.open_zarr(tmp_path/"out.zarr", consolidated=False)
    np.testing.assert_array_equal(found["mean"].values, expected["mean"].values)
    assert found.spectrum_id.values.tolist() == expected.spectrum_id.values.tolist() and not (tmp_path/"parts").exists()


def test_blocks_of_another_network_or_store_are_not_used(trained, tmp_path):
    store, bundle = trained
    one, ds = load_bundle(bundle), open_store(store)
    kept = Parts(tmp_path, one, ds)
    kept.put((0, 16), np.full((16, 6), 7.), np.ones((16, 6)), np.ones(16))
    assert Parts(tmp_path, one, ds).get((0, 16)) is not None and Parts(tmp_path, one, ds).get((0, 32)) is None
    assert Parts(tmp_path, one, ds.isel(spectrum=slice(0, 50))).get((0, 16)) is None
    latents = encode(one, ds.isel(spectrum=slice(0, 50)), progress=False, parts=tmp_path)
    assert not (latents["mean"] == 7).any() and kept.get((0, 16)) is not None # and they are left alone
    assert (encode(one, ds, bs=16, progress=False, parts=tmp_path)["mean"][:16] == 7).all() # those of the same are


def test_allocator_says_what_it_did(monkeypatch):
    told = subprocess.run([sys.executable, "-c", "from specnb.scale import tune_allocator; print(tune_allocator())"], capture_output=True, text=True, timeout=100).stdout
    assert ("mmap_max" in told) == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert tune_allocator() == dict(allocator="jemalloc", settings={})


def test_costs_are_those_of_the_measured_process_alone():
    "A parent with much memory changes nothing, and a spectrum costs about what its activations take."
    block = np.ones(150_000_000) # 1.2 GB
    costs = step_costs(net_config("paper_scaled", 65_536), bs=(2, 10), n_threads=1)
    assert block.sum() == 150_000_000
    activations = network_work(net_config("paper_scaled", 65_536))["activations"]/2**30
    assert max(row["gib"] for row in costs["measured"]) < 1.2 and 0.3*activations < costs["gib"] < 4*activations


def test_plan_of_a_store(trained):
    store, _ = trained
    told = plan(store, net="tiny", bs=8, n_epoch=2, device="cpu")
    assert "2 epochs" in told and "GiB" in told
    with pytest.raises(ValueError, match="327,680 pixels"): plan(store, net="paper", device="cpu")


def test_plan_where_the_system_tells_no_memory(trained, monkeypatch):
    "As on systems without /proc: the rows are unknown, and no batch is called too large."
    monkeypatch.setattr("specnb.scale.memory_at_hand", lambda device: float("nan"))
    told = plan(trained[0], net="tiny", bs=8, n_epoch=2, device="cpu")
    assert told.count("unknown") == 2 and "does not fit" not in told


def test_arithmetic_of_the_published_network():
    work = network_work(net_config("paper"))
    assert work["flop"] == pytest.approx(4.14e9, rel=0.05) # counted by hand
    one, eight = (paper_budget(net_config("paper"), n_gpus=n) for n in (1, 8))
    assert one["epoch"] == pytest.approx(8*eight["epoch"]) and one["epoch"] == max(one["arithmetic"], one["memory"])
    assert paper_budget(net_config("paper"), precision="bfloat16")["epoch"] < one["epoch"]


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes("cpu") == torch.device("cpu")


@pytest.mark.gpu
def test_stack_on_a_gpu_is_the_plain_network():
    from specnb.nets import build_network
    torch.manual_seed(0)
    model, flux = build_network("paper").cuda().eval(), (1 + 0.1*torch.randn(2, 327_680)).cuda()
    with torch.no_grad(): plain, stacked = (model.set_compute(convolutions=way).encode(flux)[0] for way in ("plain", "stack"))
    torch.testing.assert_close(stacked, plain, rtol=1e-3, atol=1e-4)
