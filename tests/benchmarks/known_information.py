"""Pairs of variables whose mutual information is known, fixed before any estimator was tuned.

TUNING pairs may be looked at when an estimator's settings are chosen; TEST pairs only judge it.
Each entry: name -> (sample(n, rng) -> x, y ; truth [nat]).
"""
import numpy as np
from scipy.special import digamma, gammaln

def _normal(rho, map_x=lambda v: v, map_y=lambda v: v):
    def sample(n, rng):
        x = rng.normal(size=n)
        return map_x(x), map_y(rho * x + np.sqrt(1 - rho**2) * rng.normal(size=n))
    return sample, -0.5 * np.log(1 - rho**2)

def _student_entropy(nu, d):
    "Entropy of the standard d-variate Student distribution [nat]."
    return (0.5 * d * np.log(nu * np.pi) + gammaln(nu / 2) - gammaln((nu + d) / 2)
            + (nu + d) / 2 * (digamma((nu + d) / 2) - digamma(nu / 2)))

def _student(nu, rho):
    def sample(n, rng):
        x = rng.normal(size=n)
        y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=n)
        scale = np.sqrt(nu / rng.chisquare(nu, n))
        return x * scale, y * scale
    return sample, 2 * _student_entropy(nu, 1) - _student_entropy(nu, 2) - 0.5 * np.log(1 - rho**2)

def _uniform_noise(width):
    "x uniform in 0..1, y = x + uniform in -width..width."
    def sample(n, rng):
        x = rng.random(n)
        return x, x + rng.uniform(-width, width, n)
    return sample, 1 / (4 * width) if width > 0.5 else width - np.log(2 * width)

def _normal_noise(f, scale, low, high, draw=None, quantile=None):
    "y = f(x) + scale(x) * normal; the truth is h(y) - <h(y | x)> by quadrature over 4,000 quantiles of x."
    from scipy.stats import norm
    u = (np.arange(4000) + 0.5) / 4000
    x = quantile(u) if quantile else norm.ppf(u)
    s = np.broadcast_to(scale(x), x.shape)
    y = np.linspace(low, high, 8001)
    p = np.array([np.mean(np.exp(-0.5 * ((v - f(x)) / s) ** 2) / s) / np.sqrt(2 * np.pi) for v in y])
    mass = p.sum() * (y[1] - y[0])
    assert abs(mass - 1) < 2e-4, mass
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum() * (y[1] - y[0])
    truth = entropy - np.mean(np.log(s)) - 0.5 * np.log(2 * np.pi * np.e)
    def sample(n, rng):
        x = draw(n, rng) if draw else rng.normal(size=n)
        return x, f(x) + scale(x) * rng.normal(size=n)
    return sample, float(truth)

def tuning():
    return {
        "normal 0.5": _normal(0.5),
        "normal 0.95": _normal(0.95),
        "normal 0.8, exp(3x), y^3": _normal(0.8, lambda v: np.exp(3 * v), lambda v: v**3),
        "Student 3, rho 0.6": _student(3, 0.6),
        "uniform noise 0.5": _uniform_noise(0.5),
        "x^2 + 0.3 normal": _normal_noise(lambda x: x**2, lambda x: 0.3 + 0 * x, -3, 22),
        "two clumps": _normal_noise(lambda x: 3 * np.sign(x), lambda x: 1 + 0 * x, -10, 10),
        "wide away from zero": _normal_noise(lambda x: 0 * x, lambda x: 0.2 + np.abs(x), -24, 24),
    }

def test():
    return {
        "independent": _normal(0.0),
        "normal 0.8": _normal(0.8),
        "normal 0.99": _normal(0.99),
        "Cauchy, rho 0": _student(1, 0.0),
        "Student 2, rho 0.8": _student(2, 0.8),
        "uniform noise 0.1": _uniform_noise(0.1),
        "uniform noise 0.75": _uniform_noise(0.75),
        "sine + 0.3 normal": _normal_noise(lambda x: np.sin(2 * np.pi * x), lambda x: 0.3 + 0 * x, -3, 3, lambda n, rng: rng.random(n), lambda u: u),
        "x^2 + 0.1 normal": _normal_noise(lambda x: x**2, lambda x: 0.1 + 0 * x, -1, 22),
        "saturating velocity": _normal_noise(lambda x: x * np.exp(-x**2 / 2), lambda x: 0.1 + 0 * x, -1.5, 1.5),
    }
