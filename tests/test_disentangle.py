"""Disentanglement scores against codes whose score is known, and what they do with missing labels, repeats and bad input."""
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from specnb import disentangle as D
from specnb.spectra import make_latents


def turn(degrees):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


@pytest.mark.parametrize("n", [120, 1500])
@pytest.mark.parametrize("share_missing", [0, 0.5])
def test_mig_of_a_perfect_code_is_one_whatever_its_distortion(n, share_missing):
    rng = np.random.default_rng(n)
    v = rng.normal(size=(n, 3))
    code = np.c_[np.exp(2 * v[:, 0]), -v[:, 1]**3, np.arctan(v[:, 2]), rng.normal(size=n)]
    v[rng.random((n, 3)) < share_missing] = np.nan
    out = D.mig(code, v, n_subsamples=0)
    assert out.mig.values == pytest.approx(1, abs=0.12 if n == 120 else 0.04)
    assert list(out.best.values) == [0, 1, 2] and list(out.n.values) == list(np.isfinite(v).sum(0))


def test_mig_does_not_depend_on_units_or_on_monotone_maps():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(600, 2))
    code = v @ turn(20) + 0.1 * rng.normal(size=v.shape)
    first = D.mig(code, v, n_subsamples=0)
    again = D.mig(np.exp(code) * 1e6, np.c_[v[:, 0]**3 - 7, 1e-9 * v[:, 1]], n_subsamples=0)
    np.testing.assert_allclose(first.mi, again.mi, atol=1e-9)
    np.testing.assert_allclose(first.mig, again.mig, atol=1e-9)


def test_mig_falls_steadily_as_axes_turn_and_vanishes_at_45_degrees():
    rng = np.random.default_rng(1)
    v = rng.normal(size=(3000, 2))
    scores = [float(D.mig(v @ turn(angle), v, n_subsamples=0).score) for angle in (0, 10, 25, 45)]
    assert np.all(np.diff(scores) < -0.05) and abs(scores[-1]) < 0.03


def test_mig_of_gaussian_pairs_agrees_with_the_formula():
    "Node 0 knows v with correlation r, node 1 with s: the gap without blur is -1/2 ln(1-r^2) + 1/2 ln(1-s^2), and the blur is far finer."
    rng = np.random.default_rng(2)
    v, r, s = rng.normal(size=6000), 0.8, 0.5
    code = np.c_[r * v + np.sqrt(1 - r * r) * rng.normal(size=6000), s * v + np.sqrt(1 - s * s) * rng.normal(size=6000)]
    out = D.mig(code, v[:, None], levels=200, n_subsamples=0)
    truth = -0.5 * np.log(1 - r * r) + 0.5 * np.log(1 - s * s)
    assert float(out.mig[0] * out.entropy[0]) == pytest.approx(truth, abs=0.05)


def test_entropy_of_a_discrete_factor_is_its_own():
    p = np.array([0.5, 0.25, 0.25])
    classes = np.repeat([0.0, 1, 2], (4000 * p).astype(int))
    assert D.blurred_entropy(classes) == pytest.approx(-(p * np.log(p)).sum(), abs=0.06)
    assert D.blurred_entropy(np.random.default_rng(0).random(4000), levels=50) == pytest.approx(np.log(50), abs=0.1)


def test_repeated_exposures_do_not_inflate_information():
    "Independent star-level factors, 10 exposures each: twins taken for strangers give false structure."
    rng = np.random.default_rng(3)
    star = np.repeat(np.arange(150), 10)
    v = rng.normal(size=(150, 2))[star]
    code = v + 0.02 * rng.normal(size=v.shape)
    assert abs(D.information_matrix(code, v, star)[0, 1]) < 0.15
    assert D.information_matrix(code, v, np.arange(1500))[0, 1] > 0.5
    out = D.modularity(code, v, groups=star, n_subsamples=0)
    assert float(out.score) > 0.98 and set(out.n_groups.values) == {150}


def test_dci_of_linear_codes_agrees_with_the_rotation():
    "Lasso on a code turned by an angle: importances |cos| and |sin|, so disentanglement is one less their binary entropy."
    rng = np.random.default_rng(4)
    v = rng.normal(size=(2000, 2))
    for angle in (0, 15, 30, 45):
        c, s = np.abs(np.cos(np.deg2rad(angle))), np.abs(np.sin(np.deg2rad(angle)))
        p = np.array([c, s]) / (c + s)
        truth = 1 + np.sum(p[p > 0] * np.log(p[p > 0])) / np.log(2)
        out = D.dci(v @ turn(angle), v, model="lasso", n_subsamples=0)
        assert float(out.score) == pytest.approx(truth, abs=0.05), angle
        assert out.informativeness.values == pytest.approx(1, abs=0.01)


def test_dci_forest_on_a_curved_one_to_one_code_with_a_dead_node():
    rng = np.random.default_rng(5)
    v = rng.normal(size=(600, 2))
    code = np.c_[v[:, 0]**3, np.exp(v[:, 1]), 0.01 * rng.normal(size=600)]
    out = D.dci(code, {"a": v[:, 0], "b": v[:, 1]}, n_subsamples=4)
    assert float(out.score) > 0.95 and float(out.completeness_score) > 0.95
    assert (out.score_low <= out.score) and (out.score <= out.score_high)
    again = D.dci(code, {"a": v[:, 0], "b": v[:, 1]}, n_subsamples=4)
    xr.testing.assert_identical(out, again)


def test_dci_scores_by_hand():
    d, c, d_mean, c_mean = D.dci_scores(np.array([[0.9, 0.1], [0.1, 0.9], [0.0, 0.0]]))
    h = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(d[:2], 1 - h / np.log(2))
    np.testing.assert_allclose(c, 1 - h / np.log(3))
    assert np.isnan(d[2]) and d_mean == pytest.approx(1 - h / np.log(2)) and c_mean == pytest.approx(1 - h / np.log(3))
    assert np.isnan(D.dci_scores(np.array([[1.0], [0.0]]))[2])                       # one factor: nothing to be disentangled from


def test_sap_is_the_gap_of_squared_correlations():
    rng = np.random.default_rng(6)
    v = rng.normal(size=20_000)
    code = np.c_[0.8 * v + 0.6 * rng.normal(size=20_000), 0.3 * v + np.sqrt(0.91) * rng.normal(size=20_000)]
    assert float(D.sap(code, v[:, None], n_subsamples=0).score) == pytest.approx(0.64 - 0.09, abs=0.02)


def test_intervals_by_star_cover_and_intervals_by_exposure_do_not():
    truth, hits, naive = 0.64 - 0.09, 0, 0
    star = np.repeat(np.arange(120), 3)
    for trial in range(120):
        rng = np.random.default_rng(trial)
        v, e = rng.normal(size=120), rng.normal(size=(120, 2))
        code = np.c_[0.8 * v + 0.6 * e[:, 0], 0.3 * v + np.sqrt(0.91) * e[:, 1]][star]
        out = D.sap(code, v[star][:, None], groups=star, n_subsamples=40, seed=trial)
        wrong = D.sap(code, v[star][:, None], groups=np.arange(360), n_subsamples=40, seed=trial)
        hits += bool(out.score_low <= truth <= out.score_high)
        naive += bool(wrong.score_low <= truth <= wrong.score_high)
    assert 0.80 <= hits / 120 <= 0.97, hits / 120
    assert naive / 120 < hits / 120 - 0.1


def test_modularity_by_hand_and_without_votes():
    rng = np.random.default_rng(7)
    v = rng.normal(size=(800, 3))
    out = D.modularity(np.c_[v[:, 0], v[:, 1] + v[:, 2], rng.normal(size=800)], v, n_subsamples=0)
    assert float(out.modularity[0]) > 0.99 and 0.4 < float(out.modularity[1]) < 0.75      # two of three factors alike: 1 - 1/2
    assert list(out.votes.values) == [True, True, False]
    assert np.isnan(D.modularity(rng.normal(size=(50, 2)), v[:50, :1], n_subsamples=0).score)


@pytest.mark.parametrize("n", [40, 200, 2000])
def test_total_correlation_is_unbiased_at_every_sample_size(n):
    R = 0.5 * np.eye(4) + 0.5
    truth = -0.5 * np.log(np.linalg.det(R))
    root, found = np.linalg.cholesky(R), []
    for trial in range(60):
        z = np.random.default_rng(trial).normal(size=(n, 4)) @ root.T
        found.append(float(D.total_correlation(np.sinh(z), n_subsamples=0).score))
    error = np.std(found) / np.sqrt(60)
    assert abs(np.mean(found) - truth) < 3 * error + 0.03 * (n < 100) + 0.012
    free = [float(D.total_correlation(np.random.default_rng(t).normal(size=(n, 4)), n_subsamples=0).score) for t in range(60)]
    assert abs(np.mean(free)) < 3 * np.std(free) / np.sqrt(60) + 1e-3


def test_nodes_are_matched_by_identifier_not_by_row():
    rng = np.random.default_rng(8)
    z = rng.normal(size=(80, 3))
    names = [f"s{i}" for i in range(80)]
    order = rng.permutation(80)[:60]
    a = make_latents(z, spectrum_id=names)
    b = make_latents(-z[order][:, [2, 0, 1]], spectrum_id=np.array(names)[order])
    pairs = D.match_nodes(a, b)
    assert dict(zip(pairs.latent_a, pairs.latent_b)) == {0: 1, 1: 2, 2: 0}
    np.testing.assert_allclose(pairs.spearman, -1)
    assert set(pairs.n) == {60}
    with pytest.raises(ValueError, match="share 0 spectrum_id"):
        D.match_nodes(a, make_latents(z, spectrum_id=[f"x{i}" for i in range(80)]))


def test_matching_is_one_to_one_where_greed_is_not():
    rng = np.random.default_rng(9)
    u = rng.normal(size=(500, 2))
    a = np.c_[u[:, 0], u[:, 0] + 0.3 * rng.normal(size=500)]                   # both nodes like the other code's node 0 best
    b = np.c_[u[:, 0], u[:, 0] + 0.9 * rng.normal(size=500)]
    pairs = D.match_nodes(a, b)
    assert sorted(pairs.latent_b) == [0, 1]


def test_more_nodes_on_one_side_leave_some_over():
    z = np.random.default_rng(10).normal(size=(100, 5))
    assert len(D.match_nodes(z, z[:, [4, 1]])) == 2
    table = D.stability([z, z[:, [4, 1]]], threshold=0.9)
    assert list(table[table.run == 0].survives) == [False, True, False, False, True]


def test_udr_and_survival_know_the_training_that_disagrees():
    rng = np.random.default_rng(11)
    v = rng.normal(size=(400, 2))
    def training(x): return x + 0.02 * rng.normal(size=x.shape)
    runs = [training(v), training(-v[:, ::-1]), training(v * [1, -1]), training(v @ turn(45))]
    ranking = D.udr(runs)
    assert int(ranking.udr.argmin()) == 3 and float(ranking.udr[0]) > 0.8
    findings = D.surviving_findings(runs, {"a": v[:, 0], "b": v[:, 1]})
    assert list(findings.survives) == [True, True] and len(findings) == 2
    lone = D.surviving_findings(runs[:1], {"a": v[:, 0]})
    assert not lone.survives.any()                                                    # nobody else has looked


def test_constant_and_empty_factors_are_flagged_and_leave_the_mean():
    rng = np.random.default_rng(12)
    v = rng.normal(size=200)
    labels = {"good": v, "constant": np.ones(200), "empty": np.full(200, np.nan), "few": np.where(np.arange(200) < 15, v, np.nan)}
    code = np.c_[v, rng.normal(size=200)]
    for score in (D.mig, D.sap, D.dci):
        out = score(code, labels, n_subsamples=0)
        assert list(out.flag.values) == ["", "constant", "no values", "fewer than 30 groups"], score
    assert float(D.mig(code, labels, n_subsamples=0).mig.sel(factor="good")) > 0.95
    assert np.isnan(D.mig(code, labels, n_subsamples=0).mig.sel(factor=["constant", "empty"])).all()


def test_every_score_comes_with_its_interval_and_survives_a_file(tmp_path):
    rng = np.random.default_rng(13)
    v = rng.normal(size=(60, 2))
    latents = make_latents(v, spectrum_id=np.arange(60).astype(str)).assign_coords(a=("spectrum", v[:, 0], {"role": "factor"}), b=("spectrum", v[:, 1], {"role": "label"}))
    for score in (D.mig, D.sap, D.modularity, D.total_correlation):
        out = score(latents, n_subsamples=10) if score is not D.total_correlation else score(latents, n_subsamples=10)
        assert {"score", "score_low", "score_high"} <= set(out.data_vars)
        out.to_zarr(tmp_path / f"{score.__name__}.zarr", consolidated=False)
        assert float(xr.open_zarr(tmp_path / f"{score.__name__}.zarr", consolidated=False).score) == pytest.approx(float(out.score))


@pytest.mark.parametrize("call, message", [
    (lambda z: D.mig(z[:, :1], z), "one"),
    (lambda z: D.mig(z), "no labels"),
    (lambda z: D.sap(z, {"x": z[:5, 0]}), "join them by spectrum_id"),
    (lambda z: D.dci(z, z, model="tree"), "unknown importance model"),
    (lambda z: D.sap(z, {"kind": np.full(50, "K")}), "turn it into numbers"),
    (lambda z: D.mig(z, {"x": np.full(50, np.inf)}), "infinities"),
    (lambda z: D.mig(z, z, groups="night"), "night"),
    (lambda z: D.mig(z, z, groups=np.arange(3)), "3 entries for 50"),
    (lambda z: D.total_correlation(z[:8]), "groups for 3 nodes"),
    (lambda z: D.total_correlation(np.c_[z, z[:, 0]]), "copies"),
    (lambda z: D.total_correlation(np.c_[z, np.zeros(50)]), "constant"),
    (lambda z: D.udr([z]), "two trainings"),
    (lambda z: D.udr([z, z], [[0]]), "1 lists"),
    (lambda z: D.match_nodes(z, z[:40]), "no spectrum_id"),
])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message): call(np.random.default_rng(0).normal(size=(50, 3)))


def test_rows_with_missing_codes_are_left_out():
    rng = np.random.default_rng(14)
    v = rng.normal(size=(300, 2))
    code = v + 0.1 * rng.normal(size=v.shape)
    holed = code.copy(); holed[:40] = np.nan
    assert float(D.sap(holed, v, n_subsamples=0).score) == pytest.approx(float(D.sap(code[40:], v[40:], n_subsamples=0).score), abs=1e-12)
    assert float(D.mig(holed, v, n_subsamples=0).score) == pytest.approx(float(D.mig(code, v, n_subsamples=0).score), abs=0.1)
    assert np.isfinite(D.dci(holed, v, model="lasso", n_subsamples=0).score)
    assert np.isfinite(D.total_correlation(holed, n_subsamples=0).score)


def test_random_tables_never_break_a_score():
    for seed in range(25):
        rng = np.random.default_rng(seed)
        n, nodes, labels = rng.integers(12, 60), rng.integers(2, 5), rng.integers(1, 4)
        z, y = rng.normal(size=(n, nodes)).round(rng.integers(0, 4)), rng.normal(size=(n, labels)).round(rng.integers(0, 3))
        y[rng.random(y.shape) < 0.4] = np.nan
        groups = rng.integers(0, max(2, n // 2), n)
        for out in (D.mig(z, y, groups=groups, n_subsamples=3), D.sap(z, y, groups=groups, n_subsamples=3), D.modularity(z, y, groups=groups, n_subsamples=3)):
            score, low, high = (float(out[f"score{s}"]) for s in ("", "_low", "_high"))
            assert np.isnan(score) or np.isnan(low) or low <= score <= high
            assert len(out.flag) == labels


def test_on_the_simulated_survey_factors_are_read_from_the_coordinates(survey):
    truth = pd.DataFrame({n: survey[n].values for n in ("radial_velocity", "teff", "metallicity")})
    rng = np.random.default_rng(15)
    code = xr.DataArray((truth - truth.mean()) / truth.std() + 0.05 * rng.normal(size=truth.shape), dims=("spectrum", "latent"))
    code = code.assign_coords({n: ("spectrum", survey[n].values, survey[n].attrs) for n in ("radial_velocity", "teff", "metallicity", "object", "random_1")})
    out = D.mig(code, n_subsamples=10)
    assert set(out.factor.values) == {"radial_velocity", "teff", "metallicity", "random_1"}
    assert (out.mig.sel(factor=["radial_velocity", "teff", "metallicity"]) > 0.6).all() and float(out.mig.sel(factor="random_1")) < 0.15
    assert set(out.n_groups.values) == {120}
