"""The velocity field: its size, its symmetries, and what its answers may depend on."""

import math
from dataclasses import replace

import pytest
import torch
from small import Asked, stirred
from torch import Tensor

from mambaflow.config import ARCHITECTURES
from mambaflow.kernels import attention_cpu
from mambaflow.models import attention
from mambaflow.models.starts import GaussianStart
from mambaflow.models.velocity_field import VelocityField, parameters

SMALL = replace(ARCHITECTURES["v2"], d_model=32, num_layers=4, num_heads=4, frequencies=8)
PLAIN = replace(ARCHITECTURES["v1"], d_model=32, num_layers=2, num_heads=4, frequencies=8)


def asked(b: int = 2, k: int = 20, n: int = 13) -> Asked:
    torch.manual_seed(1)
    return Asked(torch.rand(b, k, 2), torch.rand(b, k, 3) * 2 - 1, torch.rand(b, n, 2))


@pytest.mark.parametrize(("arch", "least", "most"), [("v1", 13e6, 16e6), ("v2", 5.5e6, 7.5e6)])
def test_parameter_counts_are_the_architectures(arch, least, most):
    assert least <= parameters(VelocityField(ARCHITECTURES[arch])) <= most


COUNTS = {
    "v1": 13_991_939, "v2": 6_616_170, "v2, gaussian": 6_616_143, "v2, queries apart": 6_076_506,
}  # fmt: skip


def test_parameter_counts_do_not_move_unnoticed():
    v2 = ARCHITECTURES["v2"]
    configs = {
        **ARCHITECTURES,
        "v2, gaussian": replace(v2, start="gaussian"),
        "v2, queries apart": replace(v2, query_attention=False),
    }
    counts = {name: parameters(VelocityField(c)) for name, c in configs.items()}
    assert counts == COUNTS


SCANS = [("known", "gaussian"), ("known", "process"), ("append", "plain"), ("joint", "plain")]


@pytest.mark.parametrize(("scan", "start"), SCANS)
@pytest.mark.parametrize("readout", ["cross_attention", "perceiver"])
@pytest.mark.parametrize("modulation", ["add", "adaln"])
def test_every_combination_runs_and_is_blind_to_the_order_of_pixels(
    scan, start, readout, modulation
):
    fields = {"scan": scan, "start": start, "readout": readout, "modulation": modulation}
    if (scan, readout, modulation) == ("known", "cross_attention", "adaln"):
        with pytest.raises(ValueError, match="would never hear the time; use modulation='add'"):
            replace(SMALL, **fields)
        return
    config = replace(SMALL, **fields)
    model, given, x = stirred(config), asked(), torch.randn(2, 13, 3)
    t = torch.tensor([0.3, 0.8])
    v = model.condition(given)(x, t)
    assert not torch.equal(v, model.condition(given)(x, 1 - t)), "the time is heard"
    k, n = torch.randperm(20), torch.randperm(13)
    turned = Asked(given.known_xy[:, k], given.known_rgb[:, k], given.query_xy[:, n])
    torch.testing.assert_close(model.condition(turned)(x[:, n], t), v[:, n], rtol=1e-4, atol=1e-4)


def test_the_posterior_mean_depends_on_the_known_pixels_alone():
    model, given = stirred(SMALL), asked()
    zero = torch.zeros(2)
    x, other = torch.randn(2, 13, 3), torch.randn(2, 13, 3)
    mean = x + model.condition(given)(x, zero)
    torch.testing.assert_close(
        other + model.condition(given)(other, zero), mean, rtol=1e-5, atol=1e-5
    )
    fewer = replace_queries(given, given.query_xy[:, :4])
    torch.testing.assert_close(
        x[:, :4] + model.condition(fewer)(x[:, :4], zero), mean[:, :4], rtol=1e-5, atol=1e-5
    )


def test_a_posterior_mean_is_spared_the_attention_among_queries_and_is_the_same():
    model, given, heard = stirred(SMALL), asked(), []
    model.readout.blocks[0].self_attn.register_forward_hook(lambda *_: heard.append(True))
    x = torch.randn(2, 13, 3)
    whole = model.condition(given)(x, torch.zeros(2))
    assert heard.pop() and not heard
    with torch.no_grad():
        spared = model.condition(given)(x, torch.zeros(2))
        assert not heard
        mixed = model.condition(given)(x, torch.tensor([0.0, 0.5]))
    assert heard and torch.equal(spared[0], mixed[0])
    torch.testing.assert_close(spared, whole, rtol=1e-3, atol=1e-3)  # other attention: see attend


def replace_queries(given: Asked, query_xy: Tensor) -> Asked:
    return Asked(given.known_xy, given.known_rgb, query_xy)


@pytest.mark.parametrize("start", ["gaussian", "process"])
@pytest.mark.parametrize("heard", [True, False])
def test_a_sample_sees_its_neighbours_noise_unless_queries_are_kept_apart(heard, start):
    model, given = stirred(replace(SMALL, start=start, query_attention=heard)), asked()
    field, t = model.condition(given), torch.full((2,), 0.7)
    x = field.noise(torch.randn)
    moved = x.clone()
    moved[:, 0] += x[:, 1]
    # In units of what the network's output is multiplied by.
    size = field.start.enter(x, t[:, None, None])[-1]
    change = ((field(moved, t) - field(x, t)).abs() / size).amax(-1)
    assert (change[:, 0] > 1e-2).all()
    assert (change[:, 1:] > 1e-5).all() if heard else (change[:, 1:] < 1e-6).all()


def test_v1_is_causal_queries_do_not_change_the_memory_of_known_pixels():
    model, given = stirred(PLAIN), asked()
    x, t = torch.randn(2, 13, 3), torch.full((2,), 0.5)
    first = given.query_xy.clone()  # a query changes only those after it along the raster
    order = (first[..., 1] * 1024).floor() * 4096 + first[..., 0] * 1024
    last = order.argmax(-1)
    moved = x.clone()
    moved[torch.arange(2), last] += 1
    change = (model.condition(given)(moved, t) - model.condition(given)(x, t)).abs().amax(-1)
    change[torch.arange(2), last] = 0
    assert change.max() < 1e-5


def test_one_velocity_serves_any_number_of_calls():
    model, given = stirred(SMALL), asked()
    velocity = model.condition(given)
    for t in (0.0, 0.4, 1.0):
        x, when = torch.randn(2, 13, 3), torch.full((2,), t)
        torch.testing.assert_close(velocity(x, when), model(given, x, when))
        assert velocity(x, when).isfinite().all()


def test_the_start_is_the_exact_velocity_of_independent_gaussians():
    torch.manual_seed(3)
    x, fill, variance = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 3).double(), 0.2
    t = torch.tensor([0.0, 0.2, 0.7, 0.999]).double()[:, None, None]
    velocity, shown, factor = GaussianStart(fill, torch.tensor(variance).double()).enter(x, t)
    spread = variance * t**2 + (1 - t) ** 2
    expected = fill + variance * t / spread * (x - t * fill)  # E[x_1 | x_t]
    torch.testing.assert_close(velocity, (expected - x) / (1 - t))
    torch.testing.assert_close(shown, (x - t * fill) / spread.sqrt())
    torch.testing.assert_close(factor * (1 - t), (variance * (1 - t) ** 2 / spread).sqrt())


def test_an_untrained_v2_starts_as_a_smooth_fill():
    torch.manual_seed(4)
    model = VelocityField(SMALL).eval()
    grid = torch.rand(1, 400, 2)
    colour = lambda xy: torch.sin(3 * xy @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0]]))  # noqa: E731
    given = Asked(grid, colour(grid), torch.rand(1, 100, 2))
    x = torch.randn(1, 100, 3)
    mean = x + model.condition(given)(x, torch.zeros(1))
    error = (mean - colour(given.query_xy)).square().mean()
    assert error < 0.15 * colour(given.query_xy).var()


@pytest.mark.parametrize("kernel", [True, False])
def test_no_activation_grows_with_the_square_of_the_queries(kernel, monkeypatch):
    if not kernel:  # and more tokens than those whose scores are kept: see attend
        monkeypatch.setattr(attention_cpu, "is_supported", lambda query: False)
        monkeypatch.setattr(attention, "PLAIN", 2 * 200 * 200)
    model = stirred(SMALL)
    largest = {}
    for n in (300, 1200):
        given = asked(1, 20, n)
        sizes = []

        def note(z, sizes=sizes):
            sizes.append(z.numel())
            return z

        with torch.autograd.graph.saved_tensors_hooks(note, lambda z: z):
            model(given, torch.randn(1, n, 3), torch.tensor([0.5]))
        largest[n] = max(sizes)
    assert largest[1200] <= 4.1 * largest[300] and math.isfinite(largest[1200])
