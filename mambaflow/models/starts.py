"""What the network starts from: the exact velocity of a simple law, which it corrects."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

# Variance of the fill's error where training starts from: measured on CIFAR-10, rgb in [-1, 1].
INITIAL_ERROR_VARIANCE = 0.03


@runtime_checkable
class Start(Protocol):
    """A law of x_1 given the known pixels, and of the noise x_0 that is carried to it."""

    def noise(self, prior: Tensor) -> Tensor:
        """x_0 from what `VelocityField.prior` drew."""
        ...

    def excess(self, x: Tensor) -> Tensor:
        """The mean square of x_0 in units of the noise's law: 1 for a draw of it."""
        ...

    def enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exact velocity of the law; what the network is shown, of unit variance at every t;
        and the size of the network's output."""
        ...

    def paint(self, axes: Tensor) -> Tensor:
        """Colours of the network's output."""
        ...

    def surprise(self, residual: Tensor) -> Tensor | None:
        """What is trained beside the flow, for each query; None: nothing."""
        ...


@dataclass(frozen=True)
class GaussianStart:
    """Independent Gaussians of one variance around a fill, and white noise."""

    fill: Float[Tensor, "b n 3"]
    variance: Float[Tensor, ""]

    def noise(self, prior: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """White, as it was drawn."""
        return prior

    def excess(self, x: Float[Tensor, "b n 3"]) -> Float[Tensor, ""]:
        """Its mean square."""
        return x.square().mean()

    def enter(
        self, x: Float[Tensor, "b n 3"], t: Float[Tensor, "b 1 1"]
    ) -> tuple[Float[Tensor, "b n 3"], Float[Tensor, "b n 3"], Float[Tensor, "b 1 1"]]:
        """The exact velocity for independent Gaussians around `fill`, and what the network sees.

        With x_1 ~ N(fill, variance): Var[x_t] = variance t^2 + (1 - t)^2, and the velocity is
        (E[x_1 | x_t] - x_t) / (1 - t) with the factor 1 - t cancelled, so that t = 1 is regular.
        The preconditioning of EDM (Karras et al. 2022, section 5), given the known pixels.

        Returns:
            the velocity; x_t standardised to unit variance; the size of the network's output.
        """
        fill, variance = self.fill, self.variance
        # Never 0: 1 at t = 0, the variance at t = 1, and at least variance / (1 + variance)
        # between.
        spread = variance * t.square() + (1 - t).square()
        # At t = 0 this is fill - x: the posterior mean x + v is the fill, whatever the noise.
        velocity = ((1 - t) * fill + (variance * t - (1 - t)) * x) / spread
        # The size times 1 - t is the deviation of x_1 given x_t: an output of 1 moves E[x_1] by as
        # much as is still unknown.
        return velocity, (x - t * fill) * spread.rsqrt(), (variance / spread).sqrt()

    def paint(self, axes: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n 3"]:
        """Channels are their own axes."""
        return axes

    def surprise(self, residual: Float[Tensor, "b n 3"]) -> None:
        """The variance is trained by the flow's own loss."""
