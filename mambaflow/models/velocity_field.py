"""The velocity field: known pixels in, the velocity of colours at any coordinates out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambaflow.checks import require
from mambaflow.config import ModelConfig
from mambaflow.kernels.linear import Linear
from mambaflow.models.attention import KeyValue
from mambaflow.models.curves import curve_key
from mambaflow.models.encoder import Encoder
from mambaflow.models.layers import (
    FourierFeatures,
    LocalLinearFeatures,
    Smooth,
    Smoother,
    TimeEmbedding,
)
from mambaflow.models.random_field import RandomField
from mambaflow.models.readouts import READOUTS
from mambaflow.models.residual_law import (
    ProcessStart,
    ResidualLaw,
    kriging,
    local_variances,
    stationary,
)
from mambaflow.models.starts import INITIAL_ERROR_VARIANCE, GaussianStart, Start

Velocity = Callable[[Float[Tensor, "b n 3"], Float[Tensor, " b"]], Float[Tensor, "b n 3"]]
# Standard normal numbers of a shape that begins with the batch: torch.randn is one.
Normal = Callable[..., Tensor]
# Pixels on the side of a grid, for which a field of noise is drawn, at least.
FINEST = 32
# A draw has a mean square of 1 in units of its own law: above 25 once in 10^15 times, were all its
# queries at one place. White noise has 130 at 204 known pixels and 40 at 100; at 50 it may pass.
UNLIKELY = 25.0


@runtime_checkable
class Conditioning(Protocol):
    """What is known and what is asked: a PixelBatch, or anything with these three fields."""

    @property
    def known_xy(self) -> Float[Tensor, "b k 2"]: ...

    @property
    def known_rgb(self) -> Float[Tensor, "b k 3"]: ...

    @property
    def query_xy(self) -> Float[Tensor, "b n 2"]: ...


@dataclass(frozen=True)
class ConditionedField:
    """The velocity field of some known pixels at some places: what a sampler calls."""

    velocity: Velocity
    start: Start | None
    """What the noise's law is made of; None: it is white."""
    prior: Callable[[Normal, int | None], Float[Tensor, "b m 3"]]

    def __call__(self, x: Float[Tensor, "b n 3"], t: Float[Tensor, " b"]) -> Float[Tensor, "b n 3"]:
        """The velocity at x and t."""
        return self.velocity(x, t)

    def noise(self, normal: Normal, finest: int | None = None) -> Float[Tensor, "b n 3"]:
        """x_0, drawn from the law that the field carries to colours.

        Args:
            normal: gives standard normal numbers of the shape that it is called with, as
                torch.randn does; the same numbers are the same noise.
            finest: pixels on a side of the finest grid that shall show this noise. With the same
                numbers and the same `finest`, places that coincide have the same noise, whatever
                grid they are asked on. By default as fine as so many queries would be as a grid.
        """
        return self.noise_of(self.prior(normal, finest))

    def noise_of(self, prior: Float[Tensor, "b m 3"]) -> Float[Tensor, "b n 3"]:
        """x_0 of what `VelocityField.prior` drew."""
        return prior if self.start is None else self.start.noise(prior)

    def require_noise(self, x: Float[Tensor, "b n 3"]) -> None:
        """Refuse an x_0 that is not of this field's law: samples would be wrong without a word."""
        excess = 1.0 if self.start is None or not x.numel() else float(self.start.excess(x))
        require(
            excess < UNLIKELY,
            f"noise (of mean square {excess:.3g} in units of its law) must be a draw of this "
            "field's own law; use field.noise(torch.randn), where field = model.condition(batch)",
        )


class VelocityField(nn.Module):
    """v(x, t | known pixels) at any coordinates, composed from a ModelConfig.

    `condition` computes once all that needs neither x nor t; the field it returns is what a
    sampler calls. Unless `start="plain"` the posterior mean x_0 + v(x_0, 0) of a pixel depends
    on nothing but the known pixels: neither on the noise nor on what else is asked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.features = FourierFeatures(config.frequencies, config.max_frequency)
        self.embed_known = Linear(self.features.width + 3, width)
        self.embed_query = Linear(self.features.width, width)
        self.embed_colour = Linear(3, width, bias=False)  # colours of 0 add nothing
        self.time = TimeEmbedding(width, config.time_scale)
        if config.local_linear:
            self.local_linear = LocalLinearFeatures(width, config.num_heads)
        self.encoder = Encoder(config)
        self.readout = READOUTS[config.readout](config)
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, 3)
        if config.start != "plain":
            self.smoother = Smoother(width, config.num_heads)
            # The first answer is exact for the start's law around the planes. Behind a head at
            # zero the encoder and the readout get no gradients before the second step.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if config.start == "gaussian":
            # Learned as a logarithm, so that the variance stays above 0.
            self.log_variance = nn.Parameter(torch.tensor(math.log(INITIAL_ERROR_VARIANCE)))
        if config.start == "process":
            self.residual_law = ResidualLaw(config.num_heads)

    def forward(
        self, conditioning: Conditioning, x: Float[Tensor, "b n 3"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b n 3"]:
        """The velocity at once, as training asks for it."""
        return self.condition(conditioning)(x, t)

    @torch.no_grad()
    def prior(
        self, conditioning: Conditioning, normal: Normal, finest: int | None = None
    ) -> Float[Tensor, "b m 3"]:
        """Noise before it knows the known pixels: all that needs random numbers and no weights.

        White noise at the queries, or for `start="process"` a stationary field at the queries and,
        after them, at the known pixels. Arguments as of `ConditionedField.noise`.
        """
        query_xy = conditioning.query_xy
        b, n, _ = query_xy.shape
        if self.config.start != "process":
            return normal(b, n, 3).to(query_xy)
        modes = RandomField.modes(finest or max(FINEST, math.ceil(math.sqrt(n))))
        known_xy, _ = self._in_order(conditioning.known_xy, conditioning.known_rgb)
        white = normal(b, modes, modes, 3).to(query_xy)
        return stationary(white, self.residual_law.correlation, query_xy, known_xy)

    def condition(self, conditioning: Conditioning) -> ConditionedField:
        """The velocity field of these known pixels at these coordinates."""
        velocity, start = self._condition(conditioning)

        def prior(normal: Normal, finest: int | None) -> Tensor:
            return self.prior(conditioning, normal, finest)

        return ConditionedField(velocity, start, prior)

    def _condition(self, conditioning: Conditioning) -> tuple[Velocity, Start | None]:
        known_xy, known_rgb = self._in_order(conditioning.known_xy, conditioning.known_rgb)
        # None of this needs x or t: Heun's 16 steps ask 32 times, and pay for it once.
        known = self.embed_known(torch.cat((self.features(known_xy), known_rgb), -1))
        if self.config.local_linear:
            known = known + self.local_linear(known_xy, known_xy, known_rgb).token
        query_xy = conditioning.query_xy
        query = self.embed_query(self.features(query_xy))
        # With the queries outside the scan, it too is run once.
        if self.config.scan == "known":
            return self._reading(known_xy, known_rgb, self.encoder(known), query_xy, query)
        return self._scanning(known_xy, known_rgb, known, query_xy, query), None

    def _in_order(
        self, xy: Float[Tensor, "b k 2"], rgb: Float[Tensor, "b k 3"]
    ) -> tuple[Float[Tensor, "b k 2"], Float[Tensor, "b k 3"]]:
        order = curve_key(xy, self.config.curve).argsort(dim=-1, stable=True)
        return take(xy, order), take(rgb, order)

    def _reading(
        self,
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
        memory: Float[Tensor, "b k d"],
        query_xy: Float[Tensor, "b n 2"],
        query: Float[Tensor, "b n d"],
    ) -> tuple[Velocity, Start | None]:
        """Queries read the scan of the known pixels, and do not pass through it."""
        kvs = self.readout.kvs(memory, known_xy, known_rgb)  # one for each block
        if self.config.start == "plain":
            return lambda x, t: self._read(query, query_xy, kvs, x, t, _open(t)), None
        # The smoother's features, not the bare queries, are what the readout goes on with.
        smooth = self.smoother(query, query_xy, known_xy, known_rgb)
        start = self._start(smooth, known_xy, known_rgb, query_xy)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with _in_full(x):
                exact, shown, size = start.enter(x, t[:, None, None])
            # Below t = 0.1 a noisy colour tells next to nothing: it fades out.
            noise_gate = torch.tanh(10 * t)[:, None, None]
            # A posterior mean hears no neighbours: their attention is spared, quadratic as it is.
            # Not in training, where DDP would wait for the gradients of layers that were left out.
            heard = torch.is_grad_enabled() or bool(noise_gate.any())
            # At t = 0 nothing is shown: a posterior mean depends on the known pixels alone.
            shown, gate = noise_gate * shown, noise_gate if heard else None
            read = self._read(smooth.features, query_xy, kvs, shown, t, gate)
            with _in_full(x):
                return exact + start.paint(size * read)

        return velocity, start

    def _start(
        self,
        smooth: Smooth,
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
        query_xy: Float[Tensor, "b n 2"],
    ) -> Start:
        """The exact answer that the network corrects."""
        if self.config.start == "gaussian":
            return GaussianStart(smooth.fill, self.log_variance.exp())
        law = self.residual_law
        weights, left = kriging(law.correlation, known_xy, query_xy)
        # What the fill misses of the known colours themselves, it misses around them too.
        missed = self.missed(known_xy, known_rgb, known_xy, known_rgb)
        with _in_full(missed):
            fill = smooth.fill + weights @ missed
        seen = local_variances(smooth.unexplained, known_xy, known_rgb, query_xy)
        return ProcessStart(fill, weights, left, law.log_amplitude(seen), law.colours)

    def smooth(
        self,
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
        xy: Float[Tensor, "b n 2"],
    ) -> Smooth:
        """The smooth fill alone, at some places."""
        return self.smoother(self.embed_query(self.features(xy)), xy, known_xy, known_rgb)

    def missed(
        self,
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
        xy: Float[Tensor, "b n 2"],
        rgb: Float[Tensor, "b n 3"],
    ) -> Float[Tensor, "b n 3"]:
        """What the smooth fill misses of colours at some places."""
        return rgb - self.smooth(known_xy, known_rgb, xy).fill

    def _scanning(
        self,
        known_xy: Float[Tensor, "b k 2"],
        known_rgb: Float[Tensor, "b k 3"],
        known: Float[Tensor, "b k d"],
        query_xy: Float[Tensor, "b n 2"],
        query: Float[Tensor, "b n d"],
    ) -> Velocity:
        """Queries pass through the scan, after the known pixels or among them."""
        order, back = self._scan_order(known_xy, query_xy)
        k = known.shape[1]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # Queries carry their colours and their time through the scan, which hence runs at
            # every call.
            asked = query + self.embed_colour(x) + self.time(t)[:, None]
            tokens = self.encoder(take(torch.cat((known, asked), 1), order))
            memory, asked = take(tokens, back).split((k, x.shape[1]), 1)  # back in their own order
            kvs = self.readout.kvs(memory, known_xy, known_rgb)
            return self._out(asked, query_xy, kvs, x, t, _open(t))

        return velocity

    def _scan_order(
        self, known_xy: Float[Tensor, "b k 2"], query_xy: Float[Tensor, "b n 2"]
    ) -> tuple[Int[Tensor, "b m"], Int[Tensor, "b m"]]:
        """The order of known pixels and queries in the scan, and the way back."""
        keys = [curve_key(xy, self.config.curve) for xy in (known_xy, query_xy)]
        if self.config.scan == "append":
            keys[1] = keys[1] + keys[0].max() + 1  # after the last known pixel of any image
        # Stable: points in one cell of the curve keep their order, whatever sorts them.
        order = torch.cat(keys, 1).argsort(dim=-1, stable=True)
        return order, order.argsort(-1)  # a permutation's argsort is its inverse

    def _read(
        self,
        query: Tensor,
        xy: Tensor,
        kvs: list[KeyValue],
        x: Tensor,
        t: Tensor,
        noise_gate: Float[Tensor, "b 1 1"] | None,
    ) -> Float[Tensor, "b n 3"]:
        tokens = query + self.embed_colour(x)
        if self.config.modulation == "add":
            tokens = tokens + self.time(t)[:, None]
        return self._out(tokens, xy, kvs, x, t, noise_gate)

    def _out(
        self,
        tokens: Tensor,
        xy: Tensor,
        kvs: list[KeyValue],
        x: Tensor,
        t: Tensor,
        noise_gate: Float[Tensor, "b 1 1"] | None,
    ) -> Float[Tensor, "b n 3"]:
        time = self.time(t) if self.config.modulation == "adaln" else tokens.new_zeros(())
        tokens = self.readout(tokens, xy, x, kvs, time, noise_gate)
        return self.head(self.norm(tokens)).float()  # under autocast the path goes on in float32


def _in_full(x: Tensor) -> torch.autocast:
    """Where autocast would round what is exact."""
    return torch.autocast(x.device.type, enabled=False)


def _open(t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1"]:
    """The gate of a network that hears its noisy colours at every time."""
    return torch.ones_like(t)[:, None, None]


def take(tokens: Float[Tensor, "b n d"], order: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The tokens of each row in the order given."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())
