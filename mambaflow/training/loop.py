"""The training loop as a generator: it yields after every step, and the caller decides what to
log, save or stop. It knows nothing of Ray, of files, or of who else is training."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.config import ModelConfig, TrainConfig
from mambaflow.data.batches import PixelBatch, Stream
from mambaflow.models.velocity_field import VelocityField
from mambaflow.training.objective import Objective

# The decay after n steps is at most (1 + n) / (10 + n): 0.18 at first, 0.999 from step 8990 on.
EMA_RAMP = 10.0


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step: linear warm-up, then a cosine to zero at the last step."""

    lr: float
    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        # A run of one step is all warm-up, and leaves nothing to divide by. Past the end the rate
        # stays at zero, where the cosine would rise again.
        share = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    @classmethod
    def of(cls, config: TrainConfig, steps: int) -> "Schedule":
        """The schedule of a run of `steps` steps."""
        return cls(config.lr, min(config.warmup_steps, steps // 50 + 1), steps)


class TrainState:
    """All that a run's next step depends on: weights, their average, optimiser, step."""

    def __init__(self, model: ModelConfig, train: TrainConfig, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):  # weights are a function of the seed alone
            torch.manual_seed(train.seed)
            self.model = VelocityField(model)
        # Drawn on CPU and then moved: the same weights on every device.
        self.model.to(device)
        # A whole module, not a list of tensors: it is saved and evaluated as the model is.
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        # The rate given here is never used: `fit` sets that of each step.
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.model, train.weight_decay), lr=train.lr, fused=True
        )
        self.step = 0
        # These lists share the parameters' memory, which steps and load_state_dict change in place:
        # they stay right after a restore.
        self._weights: list[Tensor] = [p.detach() for p in self.model.parameters()]
        self._ema: list[Tensor] = list(self.ema.parameters())

    def update_ema(self, decay: float) -> None:
        """Move the average of the weights; the decay is ramped up so that early ones are forgotten
        (Karras et al. 2024, without the power-law profile)."""
        ramped = min(decay, (1 + self.step) / (EMA_RAMP + self.step))
        # ema += (1 - ramped) (weights - ema), all tensors in one call. Buffers need no average:
        # they are functions of the configuration alone.
        torch._foreach_lerp_(self._ema, self._weights, 1 - ramped)


def _decay_groups(model: nn.Module, decay: float) -> list[dict]:
    """Matrices decay; biases, norms and what the scan marks (A_log, D) do not."""
    named = list(model.parameters())
    plain = [p for p in named if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    # By identity: `in` on a list of tensors would compare their numbers.
    kept = {id(p) for p in plain}
    # The order in a group is the model's own: checkpoints know moments by their place in it.
    return [
        {"params": [p for p in named if id(p) not in kept], "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class StepResult:
    """After a step. Tensors stay on the device: reading one is what waits for it."""

    step: int
    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    lr: float
    waited: float
    """Seconds that this process stood still for its batch; a GPU may have had work left."""


Forward = Callable[[PixelBatch, Tensor, Tensor], Tensor]


def compiled(forward: Forward, how: str) -> Forward:
    """The objective through torch.compile: as it is ("off"), "on", or "on" with CUDA "graphs"."""
    if how == "off":
        return forward
    if how == "on":
        return torch.compile(forward)
    # torch's name for CUDA graphs.
    recorded = torch.compile(forward, mode="reduce-overhead")

    def replayed(batch: PixelBatch, x: Tensor, t: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may be reused
        return recorded(batch, x, t)

    return replayed


def fit(
    state: TrainState,
    batches: Stream,
    config: TrainConfig,
    steps: int,
    forward: Forward | None = None,
) -> Iterator[StepResult]:
    """Train from `state.step` to `steps`, yielding after each step.

    Args:
        forward: the objective as the gradient should see it (wrapped for DDP, or compiled);
            by default that of `state.model`.
    """
    schedule = Schedule.of(config, steps)
    device = next(state.model.parameters()).device
    objective = Objective(state.model, config)
    forward = objective if forward is None else forward
    while state.step < steps:
        start = time.perf_counter()
        batch = batches[state.step].to(device)
        # A batch goes on to the GPU without waiting: what is counted is the wait for its making.
        waited = time.perf_counter() - start
        # A function of the step: a scheduler would have a state that a checkpoint must hold.
        lr = schedule(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        value = forward(batch, *objective.draws(batch))
        # With DDP a collective: every worker leaves it with the mean gradient, and the same norm.
        value.backward()
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
        state.optimizer.step()
        # At once, so that no gradients take memory while the caller validates or saves.
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.update_ema(config.ema_decay)  # after the count: the ramp is of steps done
        # Detached, so that whoever keeps a result does not keep the graph.
        yield StepResult(state.step, value.detach(), norm.detach(), lr, waited)
