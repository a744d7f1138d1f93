"""The training loop against what it promises: schedule, average, determinism, learning."""

import math
from dataclasses import replace

import pytest
import torch

from mambaflow.config import ModelConfig, TrainConfig
from mambaflow.data.batches import PixelBatch
from mambaflow.training.loop import Schedule, TrainState, fit
from mambaflow.training.objective import Objective, loss

TINY = ModelConfig(d_model=32, num_layers=2, num_heads=4, frequencies=8, mlp_ratio=2)
TRAIN = TrainConfig(batch_size=4, lr=2e-3, warmup_steps=2, ema_decay=0.9, share_at_zero=0.25)


class Stream:
    """Smooth colours at random places, a function of the step."""

    def __getitem__(self, step: int) -> PixelBatch:
        draw = torch.Generator().manual_seed(step)
        xy = torch.rand(4, 30, 2, generator=draw)
        phase = torch.rand(4, 1, 3, generator=draw)
        rgb = torch.sin(4 * xy.sum(-1, keepdim=True) + 6 * phase)
        number = torch.arange(4) + 4 * step
        return PixelBatch(xy[:, :20], rgb[:, :20], xy[:, 20:], rgb[:, 20:], number)


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def trained(steps: int, config: TrainConfig = TRAIN, model: ModelConfig = TINY) -> TrainState:
    state = TrainState(model, config, torch.device("cpu"))
    for _ in fit(state, Stream(), config, steps):
        pass
    return state


def test_the_schedule_warms_up_peaks_and_ends_at_zero():
    schedule = Schedule(lr=2.0, warmup=10, steps=110)
    assert schedule(0) == pytest.approx(0.2) and schedule(9) == pytest.approx(2.0)
    assert schedule(60) == pytest.approx(1.0) and schedule(110) == pytest.approx(0.0)
    rates = [schedule(s) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b = (TrainState(TINY, TRAIN, torch.device("cpu")) for _ in range(2))
    other = TrainState(TINY, replace(TRAIN, seed=1), torch.device("cpu"))
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(other))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_trainings_are_bitwise_equal():
    assert torch.equal(weights(trained(4)), weights(trained(4)))


@pytest.mark.parametrize("arch", ["v1", "v2"])
def test_training_lowers_the_loss(arch):
    model = TINY if arch == "v2" else replace(
        TINY, scan="append", start="plain", modulation="add", bidirectional=False,
        readout="cross_attention", windows=False, curve="raster",
    )  # fmt: skip
    state = TrainState(model, TRAIN, torch.device("cpu"))
    config = replace(TRAIN, lr=5e-3)
    objective = Objective(state.ema, config)
    eval_set = [Stream()[step] for step in range(1000, 1010)]

    def score() -> float:
        with torch.no_grad():
            return sum(loss(objective, batch).item() for batch in eval_set)

    before = score()
    for _ in fit(state, Stream(), config, 80):
        pass
    assert score() < 0.8 * before


def test_the_average_is_the_ramped_exponential_one():
    state = TrainState(TINY, TRAIN, torch.device("cpu"))
    want = weights(state).double()
    for progress in fit(state, Stream(), TRAIN, 5):
        decay = min(0.9, (1 + progress.step) / (10 + progress.step))
        want = decay * want + (1 - decay) * weights(state).double()
    got = torch.cat([p.flatten() for p in state.ema.parameters()])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_every_parameter_of_both_architectures_gets_a_gradient():
    for model in (TINY, replace(TINY, scan="append", start="plain", modulation="add",
                                readout="cross_attention", windows=False)):  # fmt: skip
        state = TrainState(model, TRAIN, torch.device("cpu"))
        for _ in fit(state, Stream(), TRAIN, 3):  # a zero head lets nothing through at first
            pass
        loss(Objective(state.model, TRAIN), Stream()[9]).backward()
        dead = [n for n, p in state.model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead


def test_gradients_are_clipped_to_the_norm():
    config = replace(TRAIN, grad_clip=1e-9, weight_decay=0.0)
    state = TrainState(TINY, config, torch.device("cpu"))
    norms = [p.grad_norm.item() for p in fit(state, Stream(), config, 2)]
    assert all(n > 1e-6 and math.isfinite(n) for n in norms)
    moment = max(v["exp_avg"].abs().max().item() for v in state.optimizer.state.values())
    assert moment <= 1e-9


def test_bf16_autocast_stays_near_fp32():
    state = trained(3)
    batch = Stream()[7]
    half = replace(TRAIN, precision="bf16")
    exact, rounded = (loss(Objective(state.model, c), batch).item() for c in (TRAIN, half))
    assert rounded == pytest.approx(exact, rel=0.03) and rounded != exact
