"""What a step makes small: the flow's loss for the network, a likelihood for the residual's law."""

from dataclasses import replace

import pytest
import torch
from test_loop import TINY, TRAIN, Stream
from torch import Tensor

from mambaflow.flow import path
from mambaflow.models.velocity_field import VelocityField
from mambaflow.training import objective as objective_module
from mambaflow.training.objective import LIKELIHOOD, Objective, loss

CONFIG = replace(TRAIN, weighting="data")
STARTS = ["process", "gaussian", "plain"]


def stirred(start: str = "process") -> VelocityField:
    """None of whose weights is zero: a head at zero would let no gradient through."""
    torch.manual_seed(0)
    model = VelocityField(replace(TINY, start=start))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def slopes(model: VelocityField, t: Tensor) -> dict[str, Tensor]:
    """Of the loss by each parameter, at these times."""
    objective, batch = Objective(model, CONFIG), Stream()[3]
    model.zero_grad(set_to_none=True)
    objective(batch, objective.draws(batch).prior, t).backward()
    assert all(p.grad is not None for p in model.parameters()), "DDP waits for every one"
    return {name: p.grad for name, p in model.named_parameters()}


NONE, SOME = torch.tensor([0.2, 0.5, 0.7, 0.9]), torch.tensor([0.0, 0.5, 0.0, 0.9])


@pytest.mark.parametrize("t", [NONE, SOME, torch.zeros(4)], ids=["none", "some", "all"])
@pytest.mark.parametrize("start", STARTS)
def test_every_parameter_has_a_gradient_whether_a_row_is_at_zero_or_not(start, t):
    found = slopes(stirred(start), t)
    alive = {name for name, slope in found.items() if slope.any()}
    law = {name for name in found if name.startswith("residual_law.")}
    at_zero = bool((t == 0).any())
    assert len(law) == (3 if start == "process" else 0)
    assert law <= alive if at_zero else not law & alive
    if not (t == 0).all():  # else nobody hears the noise
        assert set(found) - law <= alive


def test_the_likelihood_moves_the_law_alone_and_the_flow_all_else(monkeypatch):
    model = stirred()
    both = slopes(model, SOME)
    monkeypatch.setattr(objective_module, "LIKELIHOOD", 0.0)
    flow = slopes(model, SOME)
    for name, slope in both.items():
        if name.startswith("residual_law."):
            assert slope.any() and not flow[name].any(), name
        else:
            torch.testing.assert_close(slope, flow[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("start", STARTS)
def test_the_value_is_the_flows_and_the_surprise_of_rows_at_zero(start):
    objective, batch = Objective(stirred(start), CONFIG), Stream()[3]
    prior, _ = objective.draws(batch)
    with torch.no_grad():
        found = objective(batch, prior, SOME)
        field = objective.model.condition(batch)
        x_1, x_0 = batch.query_rgb, field.noise_of(prior)
        velocity = field(path.interpolate(x_0, x_1, SOME), SOME)
        expected = path.loss(velocity, x_0, x_1, SOME, "data")
        if start == "process":
            # At t = 0 x_0 + v is the posterior mean.
            law, residual = field.start, x_1 - (x_0 + velocity)
            variance = (law.left * (2 * law.log_amplitude).exp())[..., None]
            normal = torch.distributions.MultivariateNormal(
                torch.zeros(3), variance * (law.colours @ law.colours.T)
            )
            density = normal.log_prob(residual) + 1.5 * torch.tensor(2 * torch.pi).log()
            # As many rows as are expected there: one of the four, and not these two.
            expected = expected - LIKELIHOOD * density[[0, 2]].mean(1).sum() / (0.25 * 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_draws_are_functions_of_the_batch_and_the_seed_and_not_of_the_weights(start):
    batch = Stream()[3]
    one, other = (
        Objective(model, CONFIG).draws(batch)
        for model in (stirred(start), VelocityField(replace(TINY, start=start)))
    )
    assert torch.equal(one.prior, other.prior) and torch.equal(one.t, other.t)
    again = Objective(stirred(start), replace(CONFIG, seed=7)).draws(batch)
    assert not torch.equal(one.prior, again.prior) and not torch.equal(one.t, again.t)
    k, n = batch.known_xy.shape[1], batch.query_xy.shape[1]
    assert one.prior.shape == (4, n + k * (start == "process"), 3)


def test_a_worker_draws_its_own_rows_of_the_whole_batch():
    """And so the gradients of workers average to those of one."""
    batch, objective = Stream()[3], Objective(stirred(), CONFIG)
    whole = objective.draws(batch)
    names = ("known_xy", "known_rgb", "query_xy", "query_rgb", "number")
    part = replace(batch, **{name: getattr(batch, name)[2:] for name in names})
    mine = objective.draws(part)
    torch.testing.assert_close(mine.prior, whole.prior[2:], rtol=0, atol=1e-5)
    assert torch.equal(mine.t, whole.t[2:])


@pytest.mark.parametrize("start", STARTS)
def test_the_gradients_of_parts_of_a_batch_average_to_those_of_the_whole(start):
    """Whatever the share of each part that is at t = 0: here all of one, and none of the other."""
    batch, objective = Stream()[3], Objective(stirred(start), CONFIG)
    prior, t = objective.draws(batch).prior, torch.tensor([0.0, 0.0, 0.4, 0.9])
    names = ("known_xy", "known_rgb", "query_xy", "query_rgb", "number")

    def slopes_of(rows: slice) -> list[Tensor]:
        part = replace(batch, **{name: getattr(batch, name)[rows] for name in names})
        value = objective(part, prior[rows], t[rows])
        return list(torch.autograd.grad(value, list(objective.parameters())))

    one, other = slopes_of(slice(0, 2)), slopes_of(slice(2, 4))
    for whole, *parts in zip(slopes_of(slice(0, 4)), one, other, strict=True):
        # Of windows' widths little is left by what cancels.
        assert (sum(parts) / 2 - whole).norm() < 0.02 * whole.norm()


def test_the_loss_of_a_batch_is_the_objective_of_its_draws():
    objective, batch = Objective(stirred(), CONFIG), Stream()[3]
    assert torch.equal(loss(objective, batch), objective(batch, *objective.draws(batch)))
