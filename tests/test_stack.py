"""Stacks of convolutions are the function that PyTorch computes: any shape, both precisions, and the published network at full length."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from specnb.nets import build_network, net_config
from specnb.stack import stack, three_taps

layers = st.lists(st.tuples(st.sampled_from([1, 2, 5, 16, 17, 33]), st.sampled_from([1, 3, 4, 5, 7, 9]), st.sampled_from([1, 2, 3, 4]), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(layers, st.sampled_from([1, 3, 16]), st.integers(40, 90), st.integers(1, 3), st.sampled_from([None, 1, 2]), st.integers(0, 10_000))
def test_any_stack_is_what_pytorch_computes(shapes, inward, n_pixels, n_rows, rows, seed):
    torch.manual_seed(seed)
    parts, channels, length = [], inward, n_pixels
    for outward, kernel, stride, upwards in shapes:
        padding = (kernel - 1)//2
        after = (length - 1)*stride - 2*padding + kernel if upwards else (length + 2*padding - kernel)//stride + 1
        if not 4 <= after <= 2000: continue
        parts.append((nn.ConvTranspose1d if upwards else nn.Conv1d)(channels, outward, kernel, stride, padding).double())
        channels, length = outward, after
    if not parts: return
    x = torch.randn(n_rows, inward, n_pixels, dtype=torch.float64, requires_grad=True)
    plain = nn.Sequential(*(module for part in parts for module in (part, nn.LeakyReLU(0.1))))
    expected, made = plain(x), stack(x, parts, dtype=torch.float64, rows=rows)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-11)
    wanted = [x, *plain.parameters()]
    for one, other in zip(torch.autograd.grad(made.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rows", [None, 1])
def test_published_network_at_full_length_has_the_same_gradient(rows):
    torch.manual_seed(1)
    model, flux, found = build_network("paper").eval(), 1 + 0.1*torch.randn(2, 327_680), {}
    for way in ("plain", "stack"):
        out = model.set_compute(convolutions=way, checkpoint_rows=rows if way == "stack" else None)(flux)
        loss = (out[4] - out[5]).square().mean() + 1e-4*(out[1].square() + out[2].square()).mean()
        found[way] = torch.autograd.grad(loss, list(model.parameters())), out
    one, other = (torch.cat([g.flatten() for g in found[way][0]]).double() for way in ("stack", "plain"))
    assert (one - other).norm() < 1e-4*other.norm()
    for a, b in zip(found["stack"][1][:3], found["plain"][1][:3]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model.set_compute().compute_settings("cpu")["convolutions"] == "stack"


def test_half_precision_is_near_and_repeatable():
    torch.manual_seed(2)
    model, flux = build_network(net_config("paper_scaled", 16_384)).eval(), 1 + 0.1*torch.randn(4, 16_384)
    with torch.no_grad():
        full = model.set_compute(convolutions="stack").encode(flux)[0]
        half = [model.set_compute("bfloat16", "stack").encode(flux)[0] for _ in range(2)]
    assert torch.equal(*half) and 0 < (half[0] - full).norm() < 0.05*full.norm()


def test_activations_are_given_back_and_memory_does_not_grow_with_the_batch():
    "A stack that keeps two rows at a time holds less for the backward pass than one that keeps all."
    parts = [nn.Conv1d(1, 16, 7, 2, 3), nn.ConvTranspose1d(16, 1, 4, 2, 1)]
    x = torch.randn(8, 1, 4096)
    kept = {}
    for rows in (None, 2):
        made = stack(x, parts, rows=rows)
        held = made.grad_fn.kept
        kept[rows] = sum(t.numel() for t in held) if held else made.grad_fn.image.numel()
        made.sum().backward()
        assert made.grad_fn.kept is None
    assert kept[2]*5 < kept[None]


def test_three_taps_in_single_precision_are_nearer_to_the_truth():
    torch.manual_seed(3)
    layer, x = nn.Conv1d(1, 1, 3, padding=1), torch.randn(4, 1, 200_000)
    truth = torch.autograd.grad(layer.double()(x.double()).square().mean(), list(layer.parameters()))
    layer.float()
    for one, other in zip(torch.autograd.grad(three_taps(x, layer).square().mean(), list(layer.parameters())), truth):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 2, 16)
    for layer in (nn.Conv1d(2, 2, 3, groups=2), nn.Conv1d(2, 2, 3, bias=False), nn.ConvTranspose1d(2, 2, 3, 2, output_padding=1)):
        with pytest.raises(ValueError, match="cannot be part of a stack"): stack(x, [layer])
    with pytest.raises(ValueError, match="convolutions='fast' is not known"): build_network("tiny").set_compute(convolutions="fast")
    with pytest.raises(ValueError, match="checkpoint_rows=0"): build_network("tiny").set_compute(checkpoint_rows=0)
    assert np.isfinite(build_network(net_config("paper_scaled", 700)).set_compute(convolutions="stack")(torch.ones(2, 700))[0].detach().numpy()).all()
