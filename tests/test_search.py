"""Neighbours against brute force, repeatability against simulated variance components, novelty against its promised false-alarm rate."""
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.spatial.distance import cdist

from specnb import search as S
from specnb.spectra import make_latents


def survey(n_stars=60, exposures=3, nodes=4, seed=0, within=0.1, chi2=None):
    rng = np.random.default_rng(seed)
    star = np.repeat(np.arange(n_stars), exposures)
    mean = rng.normal(size=(n_stars, nodes))[star] + within * rng.normal(size=(len(star), nodes))
    chi2 = rng.chisquare(300, len(star)) / 300 if chi2 is None else chi2
    latents = make_latents(mean, np.full(mean.shape, within), chi2, spectrum_id=[f"s{i:04d}" for i in range(len(star))])
    return latents.assign_coords(object=("spectrum", [f"star {s}" for s in star]), teff=("spectrum", 5000 + star.astype(float), {"role": "label"}))


@pytest.mark.parametrize("scale", ["data", None, True])
def test_neighbours_equal_brute_force(scale):
    latents = survey()
    z, sigma = latents["mean"].values.astype(float), latents["sigma"].values.astype(float)
    for query in range(0, 180, 30):
        if scale is True: d = np.sqrt((((z - z[query])**2) / (sigma**2 + sigma[query]**2)).sum(1))
        else:
            unit = S.distance_scale(latents, scale)[1]
            d = cdist(z[query:query + 1] / unit, z / unit)[0]
        out = S.neighbours(latents, query, 7, scale)
        np.testing.assert_array_equal(out.position, np.argsort(d, kind="stable")[1:8])
        np.testing.assert_allclose(out.distance, np.sort(d)[1:8], rtol=2e-5)
        assert list(out["rank"]) == list(range(1, 8)) and list(out.spectrum_id) == [f"s{i:04d}" for i in out.position]


def test_all_ways_to_ask_agree():
    latents = survey()
    by_position, by_name = S.neighbours(latents, 12), S.neighbours(latents, "s0012")
    pd.testing.assert_frame_equal(by_position, by_name)
    code = latents["mean"].values[12]
    by_code = S.neighbours(latents, code, 11, "data")
    assert by_code.position[0] == 12 and list(by_code.position[1:]) == list(S.neighbours(latents, 12, 10, "data").position)
    assert S.neighbours(latents, -1).position.tolist() == S.neighbours(latents, 179).position.tolist()
    of_star = S.neighbours(latents, "star 4", 3)
    assert of_star.same_object.all() and set(of_star.position) == {12, 13, 14}
    assert not S.neighbours(latents, "star 4", 50, exclude_same_object=True).same_object.any()


def test_coordinates_and_nodes_come_along():
    out = S.neighbours(survey(), 0, 2, nodes=[0, 1])
    assert {"spectrum_id", "object", "distance", "same_object", "position", "teff"} <= set(out.columns) and out.attrs["scale"] == "posterior"
    z = survey()["mean"].values.astype(float)[:, :2]
    assert out.position[0] == np.argsort(((z - z[0])**2).sum(1))[1]


def test_plain_arrays_and_missing_codes():
    z = np.random.default_rng(1).normal(size=(40, 3)); z[5] = np.nan
    out = S.neighbours(z, 0, 100)
    assert len(out) == 38 and 5 not in set(out.position) and list(out.columns) == ["rank", "distance", "same_object", "position"]


def test_unnamed_spectra_are_nobody_s_exposures():
    latents = survey().assign_coords(object=("spectrum", [""] * 180))
    assert not S.neighbours(latents, 0, 20).same_object.any()


def test_a_dead_node_does_not_decide():
    latents = survey(nodes=2)
    dead = np.random.default_rng(2).normal(size=(180, 20)) * 0.02
    both = make_latents(np.c_[latents["mean"], dead], np.c_[latents.sigma, np.ones((180, 20))], np.ones(180), spectrum_id=latents.spectrum_id.values)
    for scale in ("data", "posterior"):
        assert list(S.neighbours(both, 0, 5, scale).position) == list(S.neighbours(latents, 0, 5, scale).position)


def test_icc_and_scatter_of_simulated_variance_components():
    "Between 1, 0.5, 0; within 0.5, 0.5, 1; unequal numbers of exposures."
    rng = np.random.default_rng(3)
    star = np.repeat(np.arange(2000), rng.integers(1, 6, 2000))
    between, within = np.array([1, 0.5, 0.0]), np.array([0.5, 0.5, 1.0])
    z = (between * rng.normal(size=(2000, 3)))[star] + within * rng.normal(size=(len(star), 3))
    out = S.repeatability(z, star)
    np.testing.assert_allclose(out.icc, between**2 / (between**2 + within**2), atol=0.03)
    np.testing.assert_allclose(out["within"], within, rtol=0.03)
    np.testing.assert_allclose(out["between"], between, atol=0.12)
    assert (out.p.values[:2] < 1e-10).all() and out.p.values[2] > 1e-3
    assert "sigma_ratio" not in out


def test_repeatability_of_a_balanced_table_by_hand():
    "The worked one-way analysis: two stars, two exposures, values 1, 3 and 7, 9: MSB 36, MSW 2."
    z = np.array([[1.0], [3], [7], [9]])
    out = S.repeatability(z, ["a", "a", "b", "b"])
    assert float(out.icc[0]) == pytest.approx((36 - 2) / (36 + 2))
    assert float(out["within"][0]) == pytest.approx(np.sqrt(2)) and float(out["between"][0]) == pytest.approx(np.sqrt(17))
    assert out.flag[0] == "fewer than 10 groups"


def test_sigma_ratio_says_whether_the_posterior_tells_the_truth():
    honest = survey(200, within=0.1)
    boastful = honest.assign(sigma=honest.sigma / 3)
    np.testing.assert_allclose(S.repeatability(honest).sigma_ratio, 1, atol=0.1)
    np.testing.assert_allclose(S.repeatability(boastful).sigma_ratio, 3, atol=0.3)


def test_repeatability_interval_covers():
    groups, held = np.repeat(np.arange(15), 3), 0
    z = np.sqrt(0.5) * np.random.default_rng(4).normal(size=(15, 800))[groups] + np.sqrt(0.5) * np.random.default_rng(5).normal(size=(45, 800))
    out = S.repeatability(z, groups)
    held = float(((out.icc_low <= 0.5) & (out.icc_high >= 0.5)).mean())
    assert 0.86 < held < 0.94


def test_star_means_leave_out_the_unnamed_and_the_missing():
    z = np.array([[1.0], [3], [5], [np.nan], [9]])
    out = S.star_means(z, np.array(["a", "a", "", "b", None], dtype=object))
    assert list(out.group.values) == ["a"] and float(out["mean"][0, 0]) == 2 and int(out.n[0]) == 2
    assert float(out.scatter[0, 0]) == pytest.approx(np.sqrt(2))


def test_conformal_p_by_hand():
    p = S.conformal_p([1.0, 2, 3, 4], ["a", "b", "c", "d"])
    np.testing.assert_allclose(p, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(S.conformal_p([5.0, 1, 3], ["a", "a", "b"]), [0.5, 1, 0.75])      # star a votes half above 3
    assert np.isnan(S.conformal_p([1.0, np.nan], ["a", "b"])[1])


@pytest.mark.parametrize("exposures", [1, 4])
def test_false_alarms_come_at_the_promised_rate(exposures):
    rates, latent_rates = [], []
    for seed in range(40):
        out = S.novelty(survey(150, exposures, seed=100 + seed), false_alarm=0.05)
        rates.append(out.novel.mean()); latent_rates.append((out.p_latent <= 0.05).mean())
    assert 0.02 < np.mean(rates) <= 0.055
    assert 0.035 < np.mean(latent_rates) < 0.06


def test_artefact_and_unusual_star_get_their_names():
    latents = survey(200, 3, seed=6)
    mean, chi2 = latents["mean"].values.copy(), latents["chi2"].values.copy()
    mean[30:33] += 6                                                           # a whole star, far away
    mean[60] += [8, -8, 8, -8]                                                 # one exposure only
    chi2[90] = 4                                                               # one exposure, badly rebuilt
    chi2[120:123] = 3                                                          # a star that the network cannot rebuild
    out = S.novelty(latents.assign(mean=(latents["mean"].dims, mean), chi2=("spectrum", chi2)), false_alarm=0.02)
    assert set(out.kind[30:33]) == {"unusual star"} and out.kind[60] == "artefact" and out.kind[90] == "artefact" and set(out.kind[120:123]) == {"unusual star"}
    assert out.attrs["n_stars"] == 200 and out.attrs["expected_false_alarms"] == pytest.approx(12)


def test_single_exposures_are_not_judged():
    latents = survey(100, 1, seed=7)
    mean, chi2 = latents["mean"].values.copy(), latents["chi2"].values.copy()
    mean[3] += 8; chi2[4] = 5
    out = S.novelty(latents.assign(mean=(latents["mean"].dims, mean), chi2=("spectrum", chi2)), false_alarm=0.02)
    assert out.kind[3] == "unusual, single exposure" and out.kind[4] == "badly rebuilt, single exposure"


def test_a_star_with_many_exposures_does_not_make_itself_ordinary():
    rng = np.random.default_rng(8)
    star = np.r_[np.zeros(500, int), np.arange(1, 101)]
    z = rng.normal(size=(101, 3))[star] + 0.05 * rng.normal(size=(600, 3))
    z[:500] += 9
    out = S.novelty(z, star, false_alarm=0.02)
    assert out.novel[:500].all() and out.novel[500:].mean() < 0.05


@pytest.mark.parametrize("nodes", [3, 12])
def test_isolation_equals_brute_force(nodes):
    latents = survey(80, 2, nodes=nodes, seed=9)
    z = latents["mean"].values.astype(float) / S.distance_scale(latents)[1]
    means = z.reshape(80, 2, nodes).mean(1)
    expected = [np.sort(np.delete(cdist(z[i:i + 1], means)[0], i // 2))[4] for i in range(160)]
    np.testing.assert_allclose(S.isolation(latents, latents["object"].values, k=5), expected, rtol=1e-6)


@pytest.mark.parametrize("call, message", [
    (lambda t: S.neighbours(t, "HD 1"), "neither a spectrum_id nor an object"),
    (lambda t: S.neighbours(t, 999), "no spectrum 999"),
    (lambda t: S.neighbours(t, np.zeros(3)), "a code has 4 nodes"),
    (lambda t: S.neighbours(t, 0, 0), "one neighbour or more"),
    (lambda t: S.neighbours(t, 0, scale="x"), "scale='x'"),
    (lambda t: S.neighbours(t, 0, nodes=[9]), "unknown nodes"),
    (lambda t: S.neighbours(t["mean"], 0, scale="posterior"), "no posterior sigma"),
    (lambda t: S.repeatability(t, "night"), "no coordinate 'night'"),
    (lambda t: S.repeatability(t, np.arange(180)), "one that repeats"),
    (lambda t: S.repeatability(t, np.arange(5)), "5 entries"),
    (lambda t: S.novelty(t, false_alarm=1e-3), "60 stars cannot tell"),
    (lambda t: S.novelty(t, "night"), "no coordinate 'night'"),
    (lambda t: S.isolation(t, t["object"].values, k=60), "smaller k"),
])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message): call(survey())


def test_large_survey_is_searched_in_bounded_time():
    from time import perf_counter
    z = np.random.default_rng(10).normal(size=(270_000, 12)).astype("f4")
    latents = make_latents(z, np.full_like(z, 0.1), spectrum_id=np.arange(len(z)).astype(str))
    start = perf_counter()
    out = S.neighbours(latents, 7, 10)
    assert perf_counter() - start < 5 and len(out) == 10
    d = ((z.astype(float) - z[7])**2).sum(1)
    np.testing.assert_array_equal(out.position, np.argsort(d)[1:11])


def test_graph_equals_brute_force_with_copies_and_missing_codes():
    "In few dimensions (a tree) and in many (all pairs); copies crowd each other out, incomplete codes have no neighbours."
    rng = np.random.default_rng(4)
    for nodes in (3, 12):
        z = rng.normal(size=(150, nodes))
        z[10:13] = z[9]                                                    # four copies of one code
        z[40, 1] = np.nan
        graph = S.neighbour_graph(z, 6, None)
        complete = np.flatnonzero(np.isfinite(z).all(1))
        truth = cdist(z[complete], z[complete])
        np.fill_diagonal(truth, np.inf)
        np.testing.assert_allclose(graph.distance.values[complete], np.sort(truth, axis=1)[:, :6], rtol=1e-5, atol=1e-6)
        assert (graph.position.values[40] == -1).all() and np.isnan(graph.distance.values[40]).all() and not (graph.position.values == 40).any()
        assert (graph.position.values[complete] != complete[:, None]).all()
        assert graph.attrs["approximate"] == 0 and graph.attrs["recall"] == 1


@pytest.mark.slow
def test_approximate_graph_says_what_it_misses():
    z = np.random.default_rng(5).normal(size=(4000, 16))
    near, truth = S.neighbour_graph(z, 10, None, approximate=True, seed=1), S.neighbour_graph(z, 10, None)
    found = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(near.position.values, truth.position.values)])
    assert found > 0.9 and abs(found - near.attrs["recall"]) < 0.03       # the recall of 200 spectra stands for all
    assert near.identical(S.neighbour_graph(z, 10, None, approximate=True, seed=1))
