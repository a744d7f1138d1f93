"""What a training step makes small: the loss of a batch, as a module that DDP and torch.compile
can take."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.config import TrainConfig
from mambaflow.data.batches import PixelBatch
from mambaflow.flow import path
from mambaflow.models.velocity_field import ConditionedField, VelocityField

# Of the likelihood of the residual's law beside the flow's loss. It trains numbers that the flow's
# loss does not touch, and AdamW divides by their gradient's size: the weight only keeps them from
# filling the norm at which all gradients are clipped.
LIKELIHOOD = 0.01


class Draws(NamedTuple):
    """The random numbers of a step: functions of the batch, not of the weights."""

    prior: Float[Tensor, "b m 3"]
    """Of the noise: see `VelocityField.prior`."""
    t: Float[Tensor, " b"]


class Objective(nn.Module):
    """The loss of a model on a batch."""

    def __init__(self, model: VelocityField, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def draws(self, batch: PixelBatch) -> Draws:
        """What is drawn for a batch; outside of `forward`, which is one graph to torch.compile."""
        config = self.config
        prior = self.model.prior(batch, partial(batch.noise, config.seed))
        t = path.sample_times(batch.times(config.seed), config.share_at_zero, config.time_law)
        return Draws(prior, t)

    def forward(self, batch: PixelBatch, prior: Tensor, t: Tensor) -> Float[Tensor, ""]:
        """The flow-matching loss, and what the start's law is trained by."""
        half = self.config.precision == "bf16"
        # The network alone runs in half precision: the path and the loss are float32.
        with torch.autocast(t.device.type, torch.bfloat16, enabled=half):
            field = self.model.condition(batch)
        x_1, x_0 = batch.query_rgb, field.noise_of(prior)
        x_t = path.interpolate(x_0, x_1, t)
        with torch.autocast(t.device.type, torch.bfloat16, enabled=half):
            velocity = field(x_t, t)
        value = path.loss(velocity, x_0, x_1, t, self.config.weighting)
        return value + LIKELIHOOD * self._surprise(field, x_0 + velocity, x_1, t)

    def _surprise(
        self, field: ConditionedField, mean: Tensor, x_1: Tensor, t: Float[Tensor, " b"]
    ) -> Tensor:
        """Of the residual around the posterior mean, which is x_0 + v where t = 0."""
        surprise = None if field.start is None else field.start.surprise(x_1 - mean)
        if surprise is None:
            return t.new_zeros(())
        # Weights, not a choice of rows: without a row at t = 0 the gradients are zeros, which DDP
        # waits for, and not missing.
        at_zero = (t == 0).to(surprise)[:, None, None]
        # By the rows expected at t = 0, not by those counted: workers with other counts would
        # average to another gradient than one worker's.
        return (at_zero * surprise).mean() / (self.config.share_at_zero or 1.0)


def loss(objective: Objective, batch: PixelBatch) -> Float[Tensor, ""]:
    """The loss of a batch; its noise and times are functions of the batch."""
    return objective(batch, *objective.draws(batch))
