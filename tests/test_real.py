"""Real spectra, where they lie beside the checkout: the whole way from files to nodes."""
import sys
from pathlib import Path
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import real_spectra


def test_a_node_follows_temperature_in_miles(shared_data, tmp_path):
    stars = real_spectra.miles(shared_data)
    split = real_spectra.split_by_object(stars, 0.1, 0.3, 0)
    latents, _ = real_spectra.train_and_encode(stars, split, tmp_path, n_epoch=30)
    held = np.flatnonzero(split.values == "test")
    node, rho, information = real_spectra.best(latents, "teff", held)
    assert len(held) > 150 and rho > 0.9 and information > 0.8


def test_nodes_follow_the_atmosphere_in_harps(shared_data, tmp_path):
    "Telluric oxygen wanders with the Earth's motion in barycentric spectra: some node must follow BERV on nights never seen."
    crops = real_spectra.harps_crops(shared_data)
    assert crops.sizes["spectrum"] == 177
    split = real_spectra.split_by_object(crops, 0.2, 0.4, 0, by="night")
    latents, _ = real_spectra.train_and_encode(crops, split, tmp_path, n_epoch=60, bs=16)
    rows = np.flatnonzero((split.values == "test") & (crops.object.values == "HD128621"))
    node, rho, _ = real_spectra.best(latents, "berv", rows)
    assert len(np.unique(crops.night.values[rows])) >= 3 and rho > 0.7
