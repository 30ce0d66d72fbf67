"""Networks: exact published layers, front ends under bad input, contracts of every preset."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from specnb.nets import PRESETS, LineFrontEnd, NetConfig, build_network, load_reference_state, n_parameters, net_config, paper_network, paper_stages

SMALL = {"paper_scaled": 700, "demo": 700, "demo_conv": 700, "tiny": 512}


def reference_names():
    "Key names and shapes of the released checkpoint, written out from the published table."
    channels = [1, 16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 512, 512]
    kernels = [7, 5, 5] + [3]*12
    shapes = {}
    for i in range(1, 16):
        shapes[f"conv{i}.0.weight"], shapes[f"conv{i}.0.bias"] = (channels[i], channels[i - 1], kernels[i - 1]), (channels[i],)
        shapes[f"deconv{i}.0.weight"], shapes[f"deconv{i}.0.bias"] = (channels[i], channels[i - 1], 3 if i == 15 else 4), (channels[i - 1],)
    for name in ("fc11", "fc12"): shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (128, 10240), (128,)
    shapes["fc2.weight"], shapes["fc2.bias"] = (10240, 128), (10240,)
    shapes["predict0.weight"], shapes["predict0.bias"] = (1, 1, 3), (1,)
    return shapes


@pytest.fixture(scope="module")
def released():
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng)*0.05 for name, shape in reference_names().items()}


def test_paper_has_exactly_the_published_parameters():
    model = paper_network()
    assert n_parameters(model) == 7_046_997
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == reference_names()


def test_paper_computes_what_the_published_layers_compute(released):
    "Functional oracle: the published layer list applied with torch.nn.functional."
    model = load_reference_state(paper_network(), {"state_dict": released}).eval()
    rng = torch.Generator().manual_seed(1)
    flux = torch.rand(1, 1, 327_680, generator=rng)
    with torch.no_grad():
        x = flux
        for i in range(1, 16):
            w = released[f"conv{i}.0.weight"]
            x = F.leaky_relu(F.conv1d(x, w, released[f"conv{i}.0.bias"], stride=1 if i == 15 else 2, padding=(w.shape[2] - 1)//2), 0.1)
        flat = x.reshape(1, -1)
        mean, logvar = (F.linear(flat, released[f"{n}.weight"], released[f"{n}.bias"]) for n in ("fc11", "fc12"))
        y = F.linear(mean, released["fc2.weight"], released["fc2.bias"]).reshape(1, 512, -1)
        for i in range(15, 0, -1):
            y = F.leaky_relu(F.conv_transpose1d(y, released[f"deconv{i}.0.weight"], released[f"deconv{i}.0.bias"], stride=1 if i == 15 else 2, padding=1), 0.1)
        y = F.conv1d(y, released["predict0.weight"], released["predict0.bias"], padding=1)[:, 0]
        own_mean, own_logvar = model.encode(flux)
        torch.testing.assert_close(own_mean, mean)
        torch.testing.assert_close(own_logvar, logvar)
        torch.testing.assert_close(model.decode(own_mean), y)
        torch.testing.assert_close(model(flux)[0], y)


def test_reference_weights_are_taken_whole_or_not_at_all(released):
    model = paper_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cases = [({k: v for k, v in released.items() if k != "deconv7.0.bias"}, "missing deconv7.0.bias"),
             (released | {"extra.weight": torch.zeros(2)}, "unexpected extra.weight"),
             (released | {"conv1.0.weight": torch.zeros(16, 1, 5)}, r"conv1.0.weight has shape \(16, 1, 5\), not \(16, 1, 7\)"),
             (released | {"fc2.bias": [0.]*10240}, "fc2.bias is a list")]
    for state, message in cases:
        with pytest.raises(ValueError, match=message): load_reference_state(model, state)
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="do not fit the network of 4096 pixels"): load_reference_state(build_network("paper_scaled"), released)


@pytest.mark.parametrize("n_pixels", [64, 100, 4096, 32_768, 100_003])
def test_paper_pattern_thins_out(n_pixels):
    stages = paper_stages(n_pixels)
    assert stages[-2:] == ((512, 3, 2), (512, 3, 1)) or n_pixels < 200
    assert 10 <= n_pixels/2**(len(stages) - 1) <= 40


@pytest.mark.parametrize("name, n_pixels", SMALL.items())
def test_contract_of_every_preset(name, n_pixels):
    torch.manual_seed(0)
    model = build_network(net_config(name, n_pixels=n_pixels))
    flux, ivar = torch.rand(3, n_pixels) + 0.5, torch.ones(3, n_pixels)
    output = model.train()(flux, ivar)
    latent = model.config.n_latent
    assert [tuple(o.shape) for o in output[:4]] == [(3, n_pixels), (3, latent), (3, latent), (3, latent)]
    assert output[4].shape == output[5].shape == output[6].shape
    output[4].square().mean().backward()
    first = next(p for n, p in model.named_parameters() if "conv1" in n or "encoder" in n)
    assert first.grad is not None and first.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        a, b = model.encode(flux, ivar)[0], model.encode(flux[:, None], ivar[:, None])[0]
        assert torch.equal(a, b) and torch.equal(a, model.encode(flux)[0])
        assert model.decode(a).shape == (3, n_pixels)
    assert NetConfig.from_json(model.config.to_json()) == model.config
    with pytest.raises(ValueError, match="this network takes"): model.encode(torch.rand(2, n_pixels + 1))


def test_presets_are_all_checked():
    assert set(SMALL) | {"paper", "doppler"} == set(PRESETS) # doppler has a file of its own, test_doppler.py


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_network("tiny").state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("change, message", [(dict(n_pixels=10), "n_pixels"), (dict(n_latent=0), "n_latent"), (dict(frontend="log"), "frontend"),
                                             (dict(decoder="mlp"), "decoder"), (dict(kernels=(3,)), "one entry for each layer"), (dict(lowpass=-1.), "lowpass")])
def test_settings_that_cannot_be_built_are_named(change, message):
    with pytest.raises(ValueError, match=message): build_network(replace(NetConfig(), **change))


def spectra(n=12, n_pixels=600, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, n_pixels)
    flux = 1 + 0.4*(torch.rand(n, 1, generator=rng) - 0.5)*(x - 0.5) - 0.4*torch.exp(-((x - 0.5)/0.01)**2)
    return flux + 0.05*torch.randn(n, n_pixels, generator=rng), torch.full((n, n_pixels), 400.)


@pytest.mark.parametrize("spoil", ["gap", "edges", "nan", "negative", "all_masked", "zero_flux", "one_pixel"])
def test_line_front_end_survives(spoil):
    flux, ivar = spectra()
    if spoil == "gap": ivar[:, 200:450] = 0
    if spoil == "edges": ivar[:, :50] = 0; ivar[:, -50:] = 0
    if spoil == "nan": flux[:, ::7] = float("nan"); ivar[:, ::7] = 0
    if spoil == "negative": flux[0] = -flux[0]
    if spoil == "all_masked": ivar[3] = 0
    if spoil == "zero_flux": flux[2] = 0
    if spoil == "one_pixel": ivar[1] = 0; ivar[1, 300] = 1
    front = LineFrontEnd(600, 5.).fit([(flux, ivar)])
    channels, weight = front(flux, ivar)
    assert torch.isfinite(channels).all() and (channels[weight == 0] == 0).all()
    assert torch.isfinite(front.inverse(channels)).all() and torch.isfinite(front.centre).all() and (front.scale > 0).all()


def test_masked_pixels_are_invisible():
    flux, ivar = spectra()
    ivar[:, 250:300] = 0
    model = build_network(net_config("tiny", n_pixels=600)).eval()
    model.fit_frontend([(flux, ivar)])
    with torch.no_grad():
        codes = [model.encode(torch.where(ivar > 0, flux, value), ivar)[0] for value in (0., -5., 1e4, float("nan"), float("inf"))]
    for code in codes[1:]: assert torch.equal(code, codes[0])


def test_front_end_is_fitted_the_same_in_any_batches():
    flux, ivar = spectra(40)
    ivar[::3, 100:150] = 0
    whole = LineFrontEnd(600, 5.).fit([(flux, ivar)])
    parts = LineFrontEnd(600, 5.).fit([(flux[i:i + 7], ivar[i:i + 7]) for i in range(0, 40, 7)])
    torch.testing.assert_close(whole.centre, parts.centre)
    torch.testing.assert_close(whole.scale, parts.scale)


def test_decoding_does_not_invent_what_was_never_measured():
    flux, ivar = spectra()
    ivar[:, :60] = 0
    model = build_network(net_config("tiny", n_pixels=600)).eval()
    model.fit_frontend([(flux, ivar)])
    with torch.no_grad(): made = model.decode(torch.randn(4, 6))
    assert (made[:, :60] == 0).all() and (made[:, 60:] != 0).any()


def test_overfits_one_batch():
    torch.manual_seed(0)
    flux, ivar = spectra(6)
    model = build_network(net_config("tiny", n_pixels=600)).eval()
    model.fit_frontend([(flux, ivar)])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(400):
        output = model(flux, ivar)
        loss = (output[4] - output[5]).square().mean()
        if step == 0: first = loss.item()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss.item() < 0.02*first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_equals_cpu():
    flux, ivar = spectra()
    model = build_network(net_config("tiny", n_pixels=600)).eval()
    model.fit_frontend([(flux, ivar)])
    with torch.no_grad():
        cpu = model.encode(flux, ivar)[0]
        gpu = model.cuda().encode(flux.cuda(), ivar.cuda())[0].cpu()
    torch.testing.assert_close(cpu, gpu, atol=1e-3, rtol=1e-3)
