"""Several processes train one network as a single process with the same whole batch does: same losses, same weights, each spectrum once, files written once."""
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from specnb.simulate import sample_survey
from specnb.spectra import save_store
from specnb.wave import log_grid

pytest.importorskip("accelerate", reason="several processes need accelerate: pip install 'specnb[cluster]'")

SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    import numpy as np, torch
    from specnb.scale import join_processes
    from specnb.learner import fit_resumable, spectrum_learner
    from specnb.loader import spectrum_dataloaders
    from specnb.ranks import place
    from specnb.spectra import open_store
    from specnb.prep import split_by_object

    store, out, bs, objective, memory, n_rows, kind = sys.argv[1:]
    torch.set_num_threads(1)
    device = join_processes("cpu")
    rank, n_processes = place()
    gathers, gather = [], torch.distributed.all_gather
    def counted(*args): gathers.append(args[1].ndim == 2); return gather(*args) # codes, not numbers of rows, nor the loss that fastai smooths
    torch.distributed.all_gather = counted
    ds = open_store(store)
    split = np.asarray(split_by_object(ds, 0.2, 0.1, 0))
    train = np.flatnonzero(split == "train"); split[train[int(n_rows):]] = ""
    dls = spectrum_dataloaders(ds, split=split, bs=int(bs)//n_processes, seed=0, device=device, memory_limit=float(memory))
    cbs = []
    if kind == "augmented":
        from specnb.callbacks import NoiseAugmentation, VelocityWhitening
        cbs = [VelocityWhitening(30.), NoiseAugmentation()]
    if kind == "accumulated":
        from fastai.callback.training import GradientAccumulation
        cbs = [GradientAccumulation(2*int(bs)//n_processes)]
    learn = spectrum_learner(dls, "tiny", objective, seed=0, cbs=cbs)
    with learn.no_logging():
        history = fit_resumable(learn, 2, Path(out)/"checkpoints", every=None)
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).numpy()
    np.savez(Path(out)/f"{n_processes}-{rank}.npz", losses=np.array([float(v) for v in learn.recorder.losses]), weights=weights, history=history.to_numpy(), n=len(dls.train.dataset), gathers=sum(gathers), batches=2*(len(dls.train) + len(dls.valid)))
""")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A store of 120 simulated stars, two exposures each."
    path = tmp_path_factory.mktemp("ranks") / "survey.zarr"
    save_store(sample_survey(120, exposures=2, seed=3, wavelength=log_grid(5000, 5500, 512)), path)
    return path


def launch(n_processes, script, *words, cwd):
    "Run a script in one process, or as accelerate does in several; what it said."
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
                "--num_processes", str(n_processes)] # multi_gpu: its word for several processes, GPU or not
    command = [sys.executable, *(launcher if n_processes > 1 else []), *map(str, (script, *words))]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("objective, memory, n_rows, kind", [
    ("beta_tcvae", 1e9, 160, "plain"), # whole batches
    ("beta_tcvae", 0, 151, "plain"), # a last batch of 7 spectra, three and four
    ("beta_tcvae", 1e9, 160, "accumulated"),
    ("beta_vae", 1e9, 160, "augmented"),
])
def test_two_processes_reach_the_losses_of_one(store, tmp_path, objective, memory, n_rows, kind):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    found = {}
    for n_processes in (1, 2):
        out = tmp_path / str(n_processes)
        out.mkdir()
        launch(n_processes, script, store, out, 16, objective, memory, n_rows, kind, cwd=tmp_path)
        found[n_processes] = [np.load(out / f"{n_processes}-{rank}.npz") for rank in range(n_processes)]
        assert len(list((out / "checkpoints").glob("*"))) == 1
    (one,), (first, second) = found[1], found[2]
    assert one["n"] == first["n"] == n_rows and len(one["losses"]) == len(first["losses"]) == 2 * -(-n_rows // 16)
    np.testing.assert_array_equal(first["weights"], second["weights"])
    np.testing.assert_array_equal(first["losses"], second["losses"])
    assert one["gathers"] == 0 and first["gathers"] == first["batches"] # mean, log variance and sample go together
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-4)
    np.testing.assert_allclose(first["history"], one["history"], rtol=1e-3, atol=1e-4)
    assert np.abs(first["weights"] - one["weights"]).max() < 1e-3
    assert np.ptp(one["losses"]) > 10 * np.abs(first["losses"] - one["losses"]).max() # the losses move by far more than they differ


def test_command_line_in_two_processes_leaves_one_run(store, tmp_path):
    "train and encode of the command line, started by accelerate: one run folder, the same numbers as from one process."
    from specnb.run import open_run
    for n_processes in (1, 2):
        run = tmp_path / f"run{n_processes}"
        for words in (["train", store, run, "--net", "tiny", "--bs", "16", "--n-epoch", "2"], ["encode", run]):
            launch(n_processes, "-m", "specnb.cli", *words, "--device", "cpu", cwd=tmp_path)
    one, two = (open_run(tmp_path / f"run{n}") for n in (1, 2))
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())
    np.testing.assert_allclose(two.history.to_numpy(), one.history.to_numpy(), rtol=1e-3, atol=1e-4)
    assert (two.config["extra"]["compute"]["n_processes"], one.config["extra"]["compute"]["n_processes"]) == (2, 1)
    assert one.config["extra"]["run"] == two.config["extra"]["run"]
    assert np.abs(two.latents["mean"].values - one.latents["mean"].values).max() < 0.02
    assert (two.latents.spectrum_id.values == one.latents.spectrum_id.values).all()


def test_a_batch_that_cannot_be_shared_is_refused(store, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="bs = 15 cannot be shared by 2 processes: use a multiple of 2"):
        launch(2, "-m", "specnb.cli", "train", store, run, "--net", "tiny", "--bs", "15", "--device", "cpu", cwd=tmp_path)
    assert not run.exists()


def test_two_processes_from_a_notebook(store, tmp_path):
    "What a notebook would call, from a fresh interpreter: one run, told of once."
    script = tmp_path / "page.py"
    script.write_text(textwrap.dedent(f"""
        from accelerate import notebook_launcher
        def work():
            from specnb.run import train
            train({str(store)!r}, "run", net="tiny", bs=16, n_epoch=1, device="cpu")
        notebook_launcher(work, num_processes=2)
    """))
    told = launch(1, script, cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").exists() and told.count("valid_loss") == 1
