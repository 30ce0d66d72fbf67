"""What all tests share: where the real data lie, a small survey, and which tests need more than a laptop."""
from pathlib import Path
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    import importlib.util
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pass --runslow"))
        if "net" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs the network"))
        if "gpu" in item.keywords:
            import torch
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def find_shared_data():
    "The folder of real spectra beside a checkout, or None."
    for parent in Path(__file__).resolve().parents:
        folder = parent / "shared" / "data"
        if (folder / "README.md").exists(): return folder
    return None


@pytest.fixture(scope="session")
def shared_data():
    "Folder of real spectra; the test is skipped where it is missing."
    folder = find_shared_data()
    if folder is None: pytest.skip("the folder of real spectra (shared/data beside the checkout) is not here")
    return folder


@pytest.fixture(scope="session")
def survey():
    "120 simulated stars with two exposures each, 512 pixels."
    from specnb.simulate import sample_survey
    from specnb.wave import log_grid
    return sample_survey(120, exposures=2, seed=11, wavelength=log_grid(5000, 5500, 512), random_labels=1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
