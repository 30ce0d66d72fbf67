"""Association of latents and labels: estimators against oracles, calibration of the nulls, faults and odd input."""
import subprocess, sys
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.special import digamma

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import known_information
from specnb.depend import (association, benjamini_hochberg, conditional_association, conditional_mutual_information, confounder_view, family_wise_p, gaussian_copula_information,
                           histogram_information, local_permutation, make_units, matrix_frame, mutual_information, mutual_information_matrix, pearson_matrix,
                           permutation_p, spearman_matrix)

KNOWN = {**known_information.tuning(), **known_information.test()}


def ksg_by_hand(x, y, k):
    "The estimator on ranks from all pairs of distances; boundary points count half."
    n = len(x)
    u, v = stats.rankdata(x) - 1, stats.rankdata(y) - 1
    dx, dy = abs(u[:, None] - u), abs(v[:, None] - v)
    reach = np.sort(np.maximum(dx, dy), axis=1)[:, k]
    count = lambda d: ((d < reach[:, None]).sum(1) + (d <= reach[:, None]).sum(1)) / 2 - 1
    psi = lambda c: (digamma(c + 1) + digamma(c + 0.5)) / 2                   # with and without half the neighbour itself
    return digamma(k) + digamma(n) - np.mean(psi(count(dx)) + psi(count(dy)))


@given(st.integers(0, 10**6), st.integers(6, 180), st.sampled_from([1, 3]), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_search_equals_all_pairs(seed, n, k, strength):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = strength * np.sin(2 * x) + (1 - strength) * rng.normal(size=n)
    plain = ksg_by_hand(x, y, k)
    assert mutual_information(x, y, k, extrapolate=False) == pytest.approx(plain, abs=1e-9)
    expected = plain + 0.75 * (plain - ksg_by_hand(x, y, 3 * k)) if n >= 3 * k + 2 else plain  # too few rows to extrapolate
    assert mutual_information(x, y, k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_information(name):
    sample, truth = KNOWN[name]
    rng = np.random.default_rng(5)
    pairs = [sample(4000, rng) for _ in range(16)]
    assert np.mean([mutual_information(x, y) for x, y in pairs]) == pytest.approx(truth, abs=0.04)
    assert np.mean([mutual_information(x, y, extrapolate=False) for x, y in pairs]) == pytest.approx(truth, abs=0.06)


@pytest.mark.parametrize("name", ["independent", "normal 0.8", "sine + 0.3 normal", "Student 3, rho 0.6", "two clumps"])
def test_against_scikit_learn(name):
    from sklearn.feature_selection import mutual_info_regression
    x, y = KNOWN[name][0](2500, np.random.default_rng(3))
    assert mutual_information(x, y) == pytest.approx(mutual_info_regression(x[:, None], y, random_state=0)[0], abs=0.05)


def test_classes_against_scikit_learn(rng):
    from sklearn.feature_selection import mutual_info_classif
    kind = rng.choice(5, 3000, p=[0.4, 0.3, 0.2, 0.08, 0.02])
    x = rng.normal(size=3000) + kind
    truth = mutual_info_classif(x[:, None], kind, random_state=0)[0]
    assert mutual_information(x, kind) == pytest.approx(truth, abs=0.02)
    assert mutual_information(x, np.array(list("abcde"))[kind]) == mutual_information(x, kind)
    assert mutual_information(np.array(list("abcde"))[kind], x) == pytest.approx(mutual_information(x, kind), abs=1e-9)


def test_monotone_maps_change_nothing_and_order_of_arguments_neither(rng):
    x, e = rng.normal(size=(2, 1500))
    y = x + e
    assert mutual_information(x, y) == pytest.approx(mutual_information(np.exp(4 * x), -y**3), abs=1e-12)
    assert mutual_information(x, y) == pytest.approx(mutual_information(y, x), abs=1e-12)


def test_noise_scatters_around_zero(rng):
    values = np.array([mutual_information(*rng.normal(size=(2, 500))) for _ in range(200)])
    assert abs(values.mean()) < 0.02 and (values < 0).mean() > 0.3


def test_ties_are_broken_fairly(rng):
    x = rng.normal(size=3000)
    y = x + rng.normal(size=3000)
    rounded = [mutual_information(x, np.round(y * 4) / 4, seed=s) for s in range(4)]
    assert np.mean(rounded) == pytest.approx(0.5 * np.log(2), abs=0.04) and np.ptp(rounded) < 0.06
    shared = np.where(rng.random(3000) < 0.5, 0.0, rng.normal(size=3000))      # half of the values tie, in both columns at the same rows or not
    assert mutual_information(shared, rng.permutation(shared)) == pytest.approx(0, abs=0.05)


def test_missing_and_infinite_values_are_dropped(rng):
    x, y = rng.normal(size=(2, 400))
    x[:20], y[10:40] = np.nan, np.inf
    keep = np.isfinite(x) & np.isfinite(y)
    assert mutual_information(x, y) == mutual_information(x[keep], y[keep])
    assert np.isnan(mutual_information(np.full(50, np.nan), rng.normal(size=50)))
    assert np.isnan(mutual_information([1.0, 2.0], [1.0, 2.0]))


def test_refusals():
    with pytest.raises(ValueError, match="same length"): mutual_information([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one neighbour"): mutual_information(np.arange(9.0), np.arange(9.0), 0)
    with pytest.raises(ValueError, match="spectrum, latent"): association(np.zeros(5), {"a": np.zeros(5)})
    with pytest.raises(ValueError, match="teff.*join"): association(np.zeros((5, 1)), {"teff": np.zeros(4)})
    with pytest.raises(ValueError, match="no labels"): association(np.zeros((5, 1)))
    with pytest.raises(ValueError, match="night"): association(np.zeros((5, 1)), {"a": np.zeros(5)}, groups="night")
    with pytest.raises(ValueError, match="'mean'"): association(xr.Dataset({"flux": ("spectrum", np.zeros(5))}), {"a": np.zeros(5)})


def test_matrix_equals_pairs(rng):
    x, y = rng.normal(size=(700, 3)), rng.normal(size=(700, 3))
    y[:, 0] += x[:, 1]
    x[rng.random(x.shape) < 0.1], y[rng.random(y.shape) < 0.2] = np.nan, np.nan
    for extrapolate in (False, True):
        expected = [[mutual_information(u, v, extrapolate=extrapolate) for v in y.T] for u in x.T]
        np.testing.assert_allclose(mutual_information_matrix(x, y, extrapolate=extrapolate), expected, atol=1e-12)


@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([(3, 2), (2, 7), (6, 5), (1, 1)]))
@settings(max_examples=40, deadline=None)
def test_correlations_equal_pandas(seed, gaps_x, gaps_y, shape):
    "Few columns, many, and many of which some share their gaps: three ways through the ranks."
    rng, (a, b) = np.random.default_rng(seed), shape
    x, y = rng.normal(size=(60, a)), np.round(rng.normal(size=(60, b)), 1) + 1e5
    x[:, -1] = np.round(x[:, -1])
    if gaps_x: x[rng.random(x.shape) < 0.3] = np.nan
    if gaps_y: y[rng.random(len(y)) < 0.3, :4] = np.nan; y[rng.random(len(y)) < 0.3, 1:2] = np.nan
    frame = pd.DataFrame(np.c_[x, y])
    for ours, method in ((pearson_matrix, "pearson"), (spearman_matrix, "spearman")):
        np.testing.assert_allclose(ours(x, y), frame.corr(method).values[:a, a:], atol=1e-7)


def test_correlations_of_long_tables_with_offsets_and_nothing(rng):
    "More rows than a block; dates in days; columns that are constant, empty, or have one value."
    x = rng.normal(size=(3000, 5)) + 2.4e6
    y = np.c_[x[:, 0] + rng.normal(size=3000), np.full(3000, 7.3), np.full(3000, np.nan), np.where(np.arange(3000) == 5, 1.0, np.nan)]
    for ours, theirs in ((pearson_matrix, "pearson"), (spearman_matrix, "spearman")):
        found = ours(x, y)
        np.testing.assert_allclose(found[:, 0], pd.DataFrame(np.c_[x, y]).corr(theirs).values[:5, 5], atol=1e-9)
        assert np.isnan(found[:, 1:]).all()
        assert ours(x[:0], y[:0]).shape == (5, 4)


def test_weights_equal_repetition(rng):
    x, y, times = rng.normal(size=(80, 2)), np.round(rng.normal(size=(80, 2))), rng.integers(1, 5, 80)
    gaps = y.copy(); gaps[:9, 0] = np.nan
    for ours in (pearson_matrix, spearman_matrix):
        for labels in (y, gaps):
            np.testing.assert_allclose(ours(x, labels, times), ours(np.repeat(x, times, 0), np.repeat(labels, times, 0)), atol=1e-10)


def test_other_measures(rng):
    x, e = rng.normal(size=(2, 4000))
    assert gaussian_copula_information(x, 0.6 * x + 0.8 * e) == pytest.approx(-0.5 * np.log(0.64), abs=0.03)
    assert gaussian_copula_information(x, x**2 + 0.1 * e) < 0.01
    assert histogram_information(x, e, 160) > 1.0                             # the bias that the page warns of


def null_p(rng, sizes, wander, n_tables, **settings):
    "p-values of unrelated nodes and labels, both nearly fixed for a group or wandering slowly through it."
    groups, p = np.repeat(np.arange(len(sizes)), sizes), []
    def table():
        if not wander: return rng.normal(size=(len(sizes), 8))[groups] + 0.05 * rng.normal(size=(groups.size, 8))
        return np.concatenate([np.cumsum(rng.normal(size=(m, 8)) / 3, 0) + rng.normal(size=(1, 8)) for m in sizes])
    for seed in range(n_tables):
        p.append(association(table(), dict(enumerate(table().T)), groups=groups, n_permutations=199, level=None, seed=seed, **settings))
    return p


@pytest.mark.parametrize("sizes, wander", [(np.full(60, 10), False), (np.r_[np.full(30, 2), np.full(20, 25)], False), (np.full(40, 10), True), (np.r_[1:31], True)],
                         ids=["equal", "unequal", "equal wandering", "unequal wandering"])
def test_null_is_uniform_when_groups_are_exchanged(sizes, wander):
    """Only pairs (node i, label i) are compared with the uniform distribution: all pairs of a table share their columns and permutations,
    so they are no independent sample, and the test of Kolmogorov and Smirnov would reject too often."""
    rng = np.random.default_rng(0)
    results = null_p(rng, sizes, wander, 16)
    for name in ("p", "p_spearman"):
        p = np.concatenate([np.diagonal(r[name].values) for r in results])
        assert stats.kstest(p - rng.random(p.size) / 200, "uniform").pvalue > 0.01
        assert (p <= 0.05).mean() < 0.085
    assert sum((r.q < 0.05).any().item() for r in results) <= 3 # of 16; 0.8 are expected, more than 3 once in a hundred times


def test_exchanging_exposures_is_wrong(rng):
    star = np.repeat(np.arange(60), 10)
    nodes, labels = (rng.normal(size=(60, 6))[star] + 0.05 * rng.normal(size=(600, 6)) for _ in range(2))
    wrong = association(nodes, dict(enumerate(labels.T)), n_permutations=99, level=None)
    right = association(nodes, dict(enumerate(labels.T)), groups=star, n_permutations=99, level=None)
    assert (wrong.p <= 0.05).mean() > 0.9 and (right.p <= 0.05).mean() < 0.2
    assert wrong.mi.mean() > right.mi.mean() + 0.5                            # and the estimate is inflated as well


def test_p_values_by_hand():
    statistic = np.array([[5.0, 1.0], [4.0, 2.0], [5.0, 0.5], [1.0, 3.0]])
    assert permutation_p(statistic).tolist() == [0.5, 0.75]
    assert (family_wise_p(statistic) >= permutation_p(statistic)).all()
    p = np.random.default_rng(0).random(50) ** 2
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))


def survey_table(rng, n_stars=80):
    star = np.repeat(np.arange(n_stars), rng.integers(1, 6, n_stars))
    teff, noise = rng.normal(5800, 500, n_stars)[star], rng.normal(size=(star.size, 3))
    z = np.c_[(teff - 5800) / 500, noise[:, 0], noise[:, 1]] + 0.1 * noise
    coords = {"latent": [3, 7, 9], "object": ("spectrum", [f"s{s}" for s in star]), "teff": ("spectrum", teff, {"role": "label"}),
              "instrument": ("spectrum", np.where(noise[:, 1] > 0, "A", "B"), {"role": "label"}), "gap": ("spectrum", np.where(star % 3 == 0, np.nan, noise[:, 2]), {"role": "factor"})}
    return xr.Dataset({"mean": (("spectrum", "latent"), z)}, coords)


def test_contract_and_round_trip(rng, tmp_path):
    latents = survey_table(rng)
    found = association(latents, groups="object", n_permutations=199)
    assert found.mi.dims == ("latent", "label") and found.label.values.tolist() == ["gap", "instrument", "teff"] and found.latent.values.tolist() == [3, 7, 9]
    for name in "n n_groups pearson spearman spearman_low spearman_high mi mi_low mi_high p q p_family p_spearman flag gaussian_mi linfoot".split():
        assert name in found and "long_name" in found[name].attrs
    assert found.q.sel(latent=3, label="teff") < 0.05 < found.p.sel(latent=7, label="teff") or found.p.sel(latent=7, label="teff") > 0.005
    assert found.q.sel(latent=9, label="instrument") < 0.05
    assert found.n.sel(latent=3, label="gap").item() == int(np.isfinite(latents.gap).sum())
    assert (found.mi_low <= found.mi).all() and (found.mi <= found.mi_high).all()
    found.to_zarr(tmp_path / "a.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "a.zarr", consolidated=False).load()
    np.testing.assert_array_equal(again.flag.values.astype(str), found.flag.values)
    rows = matrix_frame(found)
    rows.to_csv(tmp_path / "association.csv", index=False)
    assert len(pd.read_csv(tmp_path / "association.csv")) == 9


def test_same_seed_same_table_and_other_inputs(rng):
    latents = survey_table(rng)
    a, b, c = (association(latents, groups="object", n_permutations=49, seed=s) for s in (1, 1, 2))
    assert a.identical(b) and not a.mi.equals(c.mi)
    z, teff, star = latents["mean"].values, latents.teff.values, latents.object.values
    for table in (z, pd.DataFrame(z), xr.DataArray(z, dims=("row", "node")), latents["mean"]):
        other = association(table, pd.DataFrame({"teff": teff}), groups=star, n_permutations=49, seed=1)
        np.testing.assert_allclose(other.mi.sel(label="teff").values, a.mi.sel(label="teff").values)
    np.testing.assert_allclose(association(latents, ["teff"], groups="object", n_permutations=0).spearman.values, a.spearman.sel(label=["teff"]).values)


def test_flags_carry_the_estimate(rng):
    latents = survey_table(rng)
    latents["mean"][:, 2] = 4.2
    found = association(latents, {"teff": latents.teff.values, "flat": np.ones(latents.sizes["spectrum"]), "berv": rng.normal(size=latents.sizes["spectrum"])}, groups="object", n_permutations=19)
    assert found.flag.sel(latent=3, label="teff") == "group_label" and found.flag.sel(latent=3, label="berv") == ""
    assert (found.flag.sel(label="flat") == "constant").all() and "constant" in found.flag.sel(latent=9, label="teff").item()
    assert (found.mi.sel(label="flat") == 0).all() and found.p.sel(label="flat").isnull().all()
    assert found.mi.sel(latent=3, label="teff") > 0.5
    few = association(latents.isel(spectrum=slice(0, 40)), ["teff"], groups="object", n_permutations=19)
    assert "few_groups" in few.flag.sel(latent=3).item() and np.isfinite(few.mi.sel(latent=3)).all()
    assert (association(latents, ["teff"], n_permutations=0).flag.sel(latent=3) == "repeats").all()


def test_unknown_groups_are_left_out(rng):
    latents = survey_table(rng)
    names = latents.object.values.copy(); names[:7] = ""
    found = association(latents, ["teff"], groups=names, n_permutations=19)
    assert (found.n == latents.sizes["spectrum"] - 7).all()
    kept = association(latents.isel(spectrum=slice(7, None)), ["teff"], groups=names[7:], n_permutations=19)
    np.testing.assert_allclose(found.mi.values, kept.mi.values)
    assert np.isfinite(found.p.values).all()


def coverage(sample, truth, n, repeats, exposures=1):
    "Share of 90 % intervals of the information that hold the truth."
    rng, hits = np.random.default_rng(8), []
    for seed in range(repeats):
        x, y = sample(n, rng)
        star = np.repeat(np.arange(n), exposures)
        found = association(x[star, None], {"y": y[star]}, groups=star if exposures > 1 else None, n_permutations=0, seed=seed, n_draws=1).isel(latent=0, label=0)
        hits.append(found.mi_low.item() <= truth <= found.mi_high.item())
    return np.mean(hits)


@pytest.mark.parametrize("name", ["normal 0.8", "uniform noise 0.1", "x^2 + 0.1 normal", "two clumps"])
def test_interval_covers_the_truth(name):
    "Also where the plain estimator is biased by more than its scatter and covers the truth one time in four or less."
    assert 0.78 < coverage(*KNOWN[name], 400, 60) < 0.995


def test_interval_counts_stars_and_not_exposures():
    assert 0.78 < coverage(*KNOWN["normal 0.8"], 250, 60, exposures=4) < 0.995


def test_interval_of_spearman_covers():
    rng, hits = np.random.default_rng(9), []
    for seed in range(80):
        x = rng.normal(size=(400, 1))
        found = association(x, {"y": 0.7 * x[:, 0] + np.sqrt(0.51) * rng.normal(size=400)}, n_permutations=0, seed=seed).isel(latent=0, label=0)
        hits.append(found.spearman_low.item() <= 6 / np.pi * np.arcsin(0.35) <= found.spearman_high.item())
    assert 0.8 < np.mean(hits) < 0.98


def test_conditional_information(rng):
    z = rng.normal(size=1500)
    x, y = z + rng.normal(size=1500), z + rng.normal(size=1500)
    assert conditional_mutual_information(x, y, z) == pytest.approx(0, abs=0.05)
    assert conditional_mutual_information(x, x + rng.normal(size=1500), z) == pytest.approx(0.5 * np.log(2), abs=0.06)
    two = conditional_mutual_information(x, x + z + rng.normal(size=1500), np.c_[z, rng.normal(size=1500)])
    assert two == pytest.approx(0.5 * np.log(2), abs=0.12)
    with pytest.raises(ValueError, match="differ in length"): conditional_mutual_information(x, y, z[:9])
    given = local_permutation(z[:, None], rng)
    assert np.abs(z[given] - z).mean() < 0.05 and (given != np.arange(1500)).mean() > 0.5


@pytest.mark.parametrize("partial", [0.0, 0.4, 0.8, -0.9])
@pytest.mark.parametrize("conditions", [1, 2])
def test_conditional_information_of_normals_agrees_with_the_partial_correlation(partial, conditions):
    "Any monotone map of any of the columns, and one or two conditions on which both depend."
    truth, nearest, copula = -0.5 * np.log(1 - partial**2), [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        z, (a, b) = rng.normal(size=(2000, conditions)), rng.normal(size=(2, 2000))
        x, y = z.sum(1) + a, -0.5 * z.sum(1) + partial * a + np.sqrt(1 - partial**2) * b
        nearest.append(conditional_mutual_information(np.exp(x), y**3, np.sinh(z)))
        copula.append(conditional_association(x[:, None], {"y": y**3}, given=pd.DataFrame(np.sinh(z)).rename(columns=str), n_permutations=0).gaussian_cmi.item())
    assert np.mean(copula) == pytest.approx(truth, abs=0.03)
    assert np.mean(nearest) < truth + 0.05
    assert np.mean(nearest) > truth - 0.05


def _bent(rng, n, conditions):
    "Trends of both that are no straight lines."
    z, (a, b) = rng.normal(size=(n, conditions)), rng.normal(size=(2, n))
    return 2 * np.sin(2 * z[:, 0]) + a, z[:, 0]**2 + z[:, -1] + 0.8 * a + 0.6 * b, z


def _spread(rng, n, conditions):
    "Scatter of both that changes with what is given."
    z, (a, b) = rng.normal(size=(n, conditions)), rng.normal(size=(2, n))
    return z[:, 0] + np.exp(0.5 * z[:, -1]) * a, z.sum(1) + np.exp(-0.5 * z[:, 0]) * (0.8 * a + 0.6 * b), z


@pytest.mark.parametrize("sample", [_bent, _spread])
@pytest.mark.parametrize("conditions, low", [(1, 0.06), (2, 0.08), (4, 0.12)])
def test_conditional_information_survives_trends_and_changing_scatter(sample, conditions, low):
    truth = -0.5 * np.log(1 - 0.8**2)
    found = np.mean([conditional_mutual_information(*sample(np.random.default_rng(s), 2000, conditions)) for s in range(4)])
    assert truth - low < found < truth + 0.03


@pytest.mark.parametrize("x, y", [(np.positive, lambda v: v**3), (np.abs, np.square), (np.square, np.floor), (lambda v: np.sin(9 * v), lambda v: np.cos(7 * v))])
def test_nothing_is_left_of_labels_computed_from_what_is_given(x, y, rng):
    z = rng.normal(size=2000)
    assert mutual_information(x(z), y(z)) > 0.5
    assert abs(conditional_mutual_information(x(z), y(z), z)) < 0.06


def test_chain_rule():
    "I(x; y, z) = I(x; z) + I(x; y | z), the joint term by the formula for normals."
    rng = np.random.default_rng(3)
    x, e, f = rng.normal(size=(3, 4000))
    z, y = x + e, x + f
    joint = 0.5 * np.log(1 + 1 + 1)                                            # two independent readings of x, each with noise of its size
    assert mutual_information(x, z) + conditional_mutual_information(x, y, z) == pytest.approx(joint, abs=0.04)


def test_conditional_null_is_calibrated():
    rng, p = np.random.default_rng(2), []
    for seed in range(80):
        z = rng.normal(size=150)
        nodes, label = z[:, None] + rng.normal(size=(150, 1)), z + rng.normal(size=150)
        p.append(conditional_association(nodes, {"y": label}, given={"z": z}, n_permutations=39, seed=seed).p.item())
    assert np.mean(np.array(p) <= 0.1) < 0.19 and stats.kstest(np.array(p) - rng.random(80) / 40, "uniform").pvalue > 0.005


def test_confounder_view_by_star(rng):
    "A node that follows mass, which follows temperature: given mass nothing is left of temperature, given temperature mass is left."
    star = np.repeat(np.arange(200), 4)
    teff, own, other = rng.normal(size=(3, 200))
    mass = teff + 0.7 * own
    node = (mass[star] + 0.2 * rng.normal(size=800))[:, None]
    labels = {"teff": teff[star], "mass": mass[star], "random": other[star]}
    view = confounder_view(node, labels, groups=star, n_permutations=99).isel(latent=0)
    assert view.mi.sel(label="teff", given="nothing") > 0.3 and view.p.sel(label="teff", given="nothing") <= 0.02
    assert view.p.sel(label="teff", given="mass") > 0.02 and view.p.sel(label="mass", given="teff") <= 0.02 and view.p.sel(label="mass", given="all others") <= 0.02
    assert (view.p.sel(label="random").dropna("given") > 0.01).all() and (view.n_groups.sel(label="mass").dropna("given") == 200).all()
    assert view.mi.sel(label="mass", given="mass").isnull() and view.q.sel(given="nothing").isnull().all()


def test_no_learning_library_is_imported():
    code = "import sys, specnb.depend, specnb.dims; assert not {'torch', 'fastai', 'astropy', 'holoviews', 'panel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_humidity_is_not_found_when_nights_are_the_unit(shared_data):
    from astropy.io import fits
    table = pd.read_csv(shared_data / "labels" / "harps_timeseries_labels.csv")
    table = table[table.object == "HD128621"]
    flux = np.array([fits.getdata(shared_data / f) for f in table.file], float)
    flux /= np.median(flux, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(flux - flux.mean(0), full_matrices=False)
    labels = table[["airmass", "berv", "rhum"]].reset_index(drop=True)
    by_night = association(u[:, :6] * s[:6], labels, groups=table.night_mjd.values, n_permutations=499, level=None)
    by_row = association(u[:, :6] * s[:6], labels, n_permutations=499, level=None)
    assert (by_row.q.sel(label="rhum") < 0.05).any()                          # the trap
    assert (by_night.q.sel(label="rhum") > 0.05).all() and (by_night.p_family.sel(label="rhum") > 0.1).all()
    assert (by_night.p_family.sel(label="berv") < 0.05).any()


def test_miles_temperature(shared_data):
    archive = np.load(next((shared_data / "miles").glob("*.npz")))
    flux = archive["flux_i16"] * archive["scale"][:, None]
    flux = flux / np.median(flux, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(flux - flux.mean(0), full_matrices=False)
    labels = pd.read_csv(shared_data / "labels" / "miles_labels.csv").set_index("miles_id").loc[archive["miles_id"]]
    found = association(u[:, :5] * s[:5], labels[["teff", "logg", "feh"]], n_permutations=199, level=None)
    assert found.spearman.sel(label="teff").values.__abs__().max() > 0.95 and found.mi.sel(label="teff").max() > 1.5 and found.p_family.sel(label="teff").min() <= 0.01
