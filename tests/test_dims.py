"""How many nodes are informative: known populations, scale, rare nodes, odd input."""
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats
from specnb.dims import (beyond_labels, dead_cut, effective_rank, informative_nodes, intraclass_correlation, node_statistics, noise_null, shuffle_loss, variance_shares, weighted_quantile)


def population(rng, n_stars=300, n_exposures=3, n_live=4, n_dead=20, rare=0.05):
    "Live nodes of several widths, one rare node, and dead ones, as a latents Dataset."
    star = np.repeat(np.arange(n_stars), n_exposures)
    n = n_live + 1 + n_dead
    width = np.r_[np.linspace(0.1, 0.45, n_live), 1.0, np.ones(n_dead)]
    signal = rng.normal(size=(n_stars, n)) * np.sqrt(np.maximum(1 - width**2, 0))
    loud = rng.random(n_stars) < rare
    loud[:2] = True
    signal[:, n_live] = 3 * loud * rng.choice([-1, 1], n_stars)
    mean = signal[star] + 0.01 * rng.normal(size=(star.size, n)) + np.where(width < 0.99, 0.1 * width, 0) * rng.normal(size=(star.size, n))
    sigma = np.broadcast_to(width, mean.shape).copy()
    sigma[:, n_live] = np.where(loud[star], 0.3, 1.0)
    return xr.Dataset({"mean": (("spectrum", "latent"), mean), "sigma": (("spectrum", "latent"), sigma)},
                      {"latent": np.arange(n), "object": ("spectrum", np.char.add("s", star.astype(str)))})


@pytest.mark.parametrize("seed", range(6))
def test_planted_count_is_found(seed):
    rng = np.random.default_rng(seed)
    n_live = int(rng.integers(2, 7))
    found = informative_nodes(population(rng, n_live=n_live), groups="object", n_bootstrap=60)
    assert found.informative.values[: n_live].all() and not found.informative.values[n_live + 1:].any()
    assert found.informative.values[n_live]                                     # the rare one
    assert found.attrs["n_informative_low"] <= n_live + 1 <= found.attrs["n_informative_high"]
    assert (found.confidence.values[: n_live] > 0.95).all() and (found.confidence.values[n_live + 1:] < 0.05).all()


def test_scale_changes_no_verdict(rng):
    latents = population(rng)
    scale = xr.DataArray(rng.choice([0.01, 1, 100], latents.sizes["latent"]), dims="latent")
    scaled = latents.assign(mean=latents["mean"] * scale, sigma=latents["sigma"] * scale)
    a, b = (informative_nodes(d, groups="object", n_bootstrap=20) for d in (latents, scaled))
    assert a.informative.equals(b.informative)
    np.testing.assert_allclose(a.rate, b.rate, rtol=1e-6)
    assert not a.mad_paper.equals(b.mad_paper)                                  # the fixed cut does change


def test_one_star_does_not_decide(rng):
    latents = population(rng, n_exposures=1)
    crowd = xr.concat([latents] + [latents.isel(spectrum=[0])] * 900, "spectrum")
    a, b = (informative_nodes(d, groups="object", n_bootstrap=10) for d in (latents, crowd))
    np.testing.assert_allclose(a.rate, b.rate, atol=1e-9)
    np.testing.assert_allclose(a.mad, b.mad, atol=1e-9)


def test_intervals_cover():
    hits = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        mean = rng.normal(size=(200, 1)) * 0.8
        latents = xr.Dataset({"mean": (("spectrum", "latent"), mean), "sigma": (("spectrum", "latent"), np.full_like(mean, 0.6))})
        found = informative_nodes(latents, n_bootstrap=150, seed=seed)
        hits.append(found.rate_low.item() <= -np.log(0.6) <= found.rate_high.item())
    assert 0.75 <= np.mean(hits) <= 1.0


def test_decoder_loss(rng):
    latents = population(rng, n_dead=3)
    weights = rng.normal(size=(latents.sizes["latent"], 30)) * np.r_[1, 1, 0, 1, 1, 1, 0, 0][:, None]
    calls = []
    def decode(z):
        calls.append(len(z))
        return (1 + z @ weights).astype(np.float32)
    loss = shuffle_loss(latents, decode, groups="object", n_spectra=100)
    assert max(calls) <= 100 and loss.shuffle_loss[2] == 0 and loss.shuffle_loss[0] > 10 * loss.jitter_loss[0] and loss.shuffle_loss[5] < loss.jitter_loss[5]
    flux = decode(latents["mean"].values) + 0.1 * rng.normal(size=(latents.sizes["spectrum"], 30))
    with_data = shuffle_loss(latents, decode, groups="object", flux=flux, ivar=np.full_like(flux, 100.0))
    assert with_data.chi2_lost[0] > 10 and abs(with_data.chi2_lost[2]) < 1e-6
    found = informative_nodes(latents, groups="object", decode=decode, n_bootstrap=20)
    assert not found.vote_shuffle[2] and found.vote_shuffle[0] and found.informative[0]


def test_principal_components(rng):
    star = np.repeat(np.arange(200), 3)
    scores = (rng.normal(size=(200, 12)) * np.r_[5, 3, 2, np.zeros(9)])[star] + 0.2 * rng.normal(size=(600, 12))
    found = informative_nodes(scores, groups=star, n_bootstrap=40)
    assert found.attrs["n_informative"] == 3 and found.informative.values[:3].all() and "rate" not in found
    assert informative_nodes(pd.DataFrame(scores), n_bootstrap=10).attrs["n_informative"] == 3


def test_intraclass_correlation_by_hand(rng):
    values, star = rng.normal(size=(60, 1)), np.repeat(np.arange(20), 3)
    values += rng.normal(size=20)[star][:, None]
    groups = values.reshape(20, 3)
    between, within = 3 * groups.mean(1).var(ddof=1), groups.var(1, ddof=1).mean()
    found = intraclass_correlation(values, star)
    assert found.icc.item() == pytest.approx((between - within) / (between + 2 * within))
    assert found.icc_low < found.icc < found.icc_high
    truth = [intraclass_correlation(np.random.default_rng(s).normal(size=(200, 1)), np.repeat(np.arange(50), 4)) for s in range(60)]
    assert 0.8 <= np.mean([f.icc_low.item() <= 0 <= f.icc_high.item() for f in truth]) <= 0.99


def test_variance_shares_recover_the_parts():
    truth, covered, shares = np.array([1, 0.49, 0.25]) / 1.74, [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        star = np.repeat(np.arange(200), 6)
        night = rng.integers(0, 3, star.size)
        parts = rng.normal(size=(200, 1))[star] + 0.7 * rng.normal(size=(200, 3))[star, night][:, None] + 0.5 * rng.normal(size=(star.size, 1))
        found = variance_shares(parts, star, night, n_bootstrap=200)
        shares.append(found.share.values[0])
        covered.append((found.share_low.values[0] < truth) & (truth < found.share_high.values[0]))
    np.testing.assert_allclose(np.mean(shares, axis=0), truth, atol=0.015)
    assert 0.8 <= np.mean(covered) <= 0.98


def test_beyond_labels():
    rng = np.random.default_rng(9)
    star = np.repeat(np.arange(150), 3)
    teff, other = rng.normal(size=(2, 150))
    nodes = np.c_[teff[star] ** 2, teff[star] + other[star], rng.normal(size=450)] + 0.1 * rng.normal(size=(450, 3))
    gaps = np.where(rng.random(150) < 0.1, np.nan, teff)[star]
    found = beyond_labels(nodes, {"teff": gaps}, groups=star)
    assert found.r2[0] > 0.5 and found.unexplained[1] > 0.3 and found.beyond[1] and not found.beyond[2]
    assert found.r2[2] < 0.05


def test_every_criterion_has_a_null(rng):
    "Live nodes are told from their own noise by every criterion that can see them, dead ones by none, the rare one by its tail."
    latents = population(rng)
    weights = rng.normal(size=(latents.sizes["latent"], 30))
    found = informative_nodes(latents, groups="object", decode=lambda z: 1 + 0.01 * z @ weights, n_bootstrap=20, n_null=99)
    names = ["p_mad", "p_active_units", "p_kl", "p_rate", "p_signal_fraction", "p_tail_signal", "p_shuffle", "p_icc"]
    for name in names: assert (found[name].values[:4] <= 0.02).all(), name
    for name in names[:-1]: assert (found[name].values[5:] > 0.2).all(), name
    assert found.p_tail_signal[4] <= 0.02 < found.p_mad[4]
    assert (found.p_icc.values[5:] <= 0.05).mean() < 0.25
    assert found.attrs["effective_rank_low"] < found.attrs["effective_rank"] < found.attrs["effective_rank_high"] and found.attrs["effective_rank_null"] > 20
    bare = informative_nodes(rng.normal(size=(60, 3)), n_bootstrap=5)
    assert bare.p_mad.isnull().all() and "p_kl" not in bare                     # neither widths nor repeats: no null


def test_noise_null_is_uniform_on_the_boundary():
    rng = np.random.default_rng(4)
    sigma = rng.uniform(0.3, 0.8, (120, 200))
    p = noise_null(sigma * rng.normal(size=sigma.shape), sigma, sigma, 99, rng)
    for name in ("mad", "active_units", "kl", "rate", "signal_fraction", "tail_signal"):
        assert stats.kstest(p[name] - rng.random(200) / 100, "uniform").pvalue > 0.003, name


def test_repeatability_p_is_uniform_for_noise(rng):
    star = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    p = intraclass_correlation(rng.normal(size=(star.size, 500)), star).p.values
    assert stats.kstest(p, "uniform").pvalue > 0.005


def test_informative_count_against_the_planted_count_over_seeds():
    "Twelve populations, from nothing but dead nodes to eight live ones."
    off = []
    for seed in range(12):
        rng = np.random.default_rng(100 + seed)
        n_live = int(rng.integers(1, 8))
        found = informative_nodes(population(rng, n_live=n_live), groups="object", n_bootstrap=20, n_null=0)
        off.append(found.attrs["n_informative"] - n_live - 1)
    assert off == [0] * 12


def test_functions_of_the_labels_are_not_beyond_them():
    "Curved functions of two labels, measured well: their remainder repeats, because no regression is perfect."
    called, caught, real = [], [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        star = np.repeat(np.arange(120), 3)
        a, b, own = rng.normal(size=(3, 120))
        nodes = np.c_[np.tanh(2 * a), a * b, np.exp(b), np.sin(2 * a) + b, 0.5 * own + a][star] + 0.1 * rng.normal(size=(360, 5))
        found = beyond_labels(nodes, {"a": a[star], "b": b[star]}, groups=star, n_null=39, seed=seed)
        called.append(found.beyond.values[:4]); caught.append(found.icc_low.values[:4] > 0); real.append(bool(found.beyond[4]))
    assert np.mean(caught) > 0.5                                                # repeatability alone is fooled
    assert np.mean(called) < 0.1 and all(real)


def test_kinks_and_steps_are_not_beyond_the_labels():
    "Functions that no smooth regression follows, of one label each, added up; and a jump in three labels at once, which the page names as out of reach."
    called = []
    for seed in range(8):
        rng = np.random.default_rng([5, seed])
        star, labels = np.repeat(np.arange(200), 3), rng.normal(size=(200, 3))
        kink = np.abs(labels[:, 0] - 0.3) + np.maximum(labels[:, 2], 0)
        steps = np.floor(1.5 * labels[:, 0]) + np.floor(labels[:, 1])
        nodes = np.c_[kink / kink.std(), steps / steps.std()][star] + 0.1 * rng.normal(size=(600, 2))
        called.append(beyond_labels(nodes, dict(enumerate(labels[star].T)), groups=star, n_null=39, seed=seed).beyond.values)
    assert np.mean(called) <= 0.125


def test_small_pieces(rng):
    values = rng.normal(size=(101, 2))
    np.testing.assert_allclose(weighted_quantile(values, np.ones(101), 0.5), np.median(values, axis=0))
    assert dead_cut(np.array([1.0])) == 0 and dead_cut(np.array([])) == 0 and dead_cut(np.zeros(4)) == 0
    assert effective_rank(np.ones((10, 3))) == 1
    kl = node_statistics(np.full((5, 1), 2.0), np.full((5, 1), 0.5), np.ones(5))["kl"]
    assert kl[0] == pytest.approx(0.5 * (4 + 0.25 - 1 - np.log(0.25)))


def test_odd_input(rng):
    latents = population(rng, n_stars=40)
    latents["mean"][3, 2] = np.nan
    latents["mean"].attrs["note"] = "kept"
    found = informative_nodes(latents, groups="object", n_bootstrap=10)
    assert found.attrs["n"] == latents.sizes["spectrum"] - 1
    constant = latents.assign(mean=latents["mean"] * 0 + 1.0)
    assert informative_nodes(constant.fillna(1.0), n_bootstrap=10).attrs["n_informative"] == 0
    with pytest.raises(ValueError, match="too few"): informative_nodes(latents.isel(spectrum=[0, 1]), n_bootstrap=5)
    with pytest.raises(ValueError, match="at least two groups"): intraclass_correlation(latents, np.zeros(latents.sizes["spectrum"]))
    with pytest.raises(ValueError, match="no coordinate 'star'"): informative_nodes(latents, groups="star")
    a, b = (informative_nodes(latents, groups="object", n_bootstrap=10, seed=3) for _ in range(2))
    assert a.identical(b)
