"""The velocity field: known pixels in, the velocity of colours at any coordinates out."""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambaflow.config import ModelConfig
from mambaflow.kernels.linear import Linear
from mambaflow.models.attention import KeyValue
from mambaflow.models.curves import curve_key
from mambaflow.models.encoder import Encoder
from mambaflow.models.layers import (
    FourierFeatures,
    LocalLinearFeatures,
    Smoother,
    TimeEmbedding,
)
from mambaflow.models.readouts import READOUTS

Velocity = Callable[[Float[Tensor, "b n 3"], Float[Tensor, " b"]], Float[Tensor, "b n 3"]]

# Variance of the fill's error where training starts from: measured on CIFAR-10, rgb in [-1, 1].
INITIAL_ERROR_VARIANCE = 0.03


@runtime_checkable
class Conditioning(Protocol):
    """What is known and what is asked: a PixelBatch, or anything with these three fields."""

    @property
    def known_xy(self) -> Float[Tensor, "b k 2"]: ...

    @property
    def known_rgb(self) -> Float[Tensor, "b k 3"]: ...

    @property
    def query_xy(self) -> Float[Tensor, "b n 2"]: ...


def gaussian_start(
    x: Float[Tensor, "b n 3"],
    t: Float[Tensor, "b 1 1"],
    fill: Float[Tensor, "b n 3"],
    variance: Float[Tensor, ""],
) -> tuple[Float[Tensor, "b n 3"], Float[Tensor, "b n 3"], Float[Tensor, "b 1 1"]]:
    """The exact velocity for independent Gaussians around `fill`, and what the network sees.

    With x_1 ~ N(fill, variance): Var[x_t] = variance t^2 + (1 - t)^2, and the velocity is
    (E[x_1 | x_t] - x_t) / (1 - t) with the factor 1 - t cancelled, so that t = 1 is regular.
    The preconditioning of EDM (Karras et al. 2022, section 5), given the known pixels.

    Returns:
        the velocity; x_t standardised to unit variance; the factor of the network's output.
    """
    # Never 0: 1 at t = 0, the variance at t = 1, and at least variance / (1 + variance) between.
    spread = variance * t.square() + (1 - t).square()
    # At t = 0 this is fill - x: the posterior mean x + v is the fill, whatever the noise.
    velocity = ((1 - t) * fill + (variance * t - (1 - t)) * x) / spread
    # The factor times 1 - t is the deviation of x_1 given x_t: an output of unit size moves E[x_1]
    # by as much as is still unknown.
    return velocity, (x - t * fill) * spread.rsqrt(), (variance / spread).sqrt()


class VelocityField(nn.Module):
    """v(x, t | known pixels) at any coordinates, composed from a ModelConfig.

    `condition` computes once all that needs neither x nor t; the velocity it returns is what a
    sampler calls. With `start="gaussian"` the posterior mean x_0 + v(x_0, 0) of a pixel depends
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
        if config.start == "gaussian":
            self.smoother = Smoother(width, config.num_heads)
            # Learned as a logarithm, so that the variance stays above 0.
            self.log_variance = nn.Parameter(torch.tensor(math.log(INITIAL_ERROR_VARIANCE)))
            # The first answer is exact for independent Gaussians around the planes. Behind a head
            # at zero the encoder and the readout get no gradients before the second step.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(
        self, conditioning: Conditioning, x: Float[Tensor, "b n 3"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b n 3"]:
        """The velocity at once, as training asks for it."""
        return self.condition(conditioning)(x, t)

    def condition(self, conditioning: Conditioning) -> Velocity:
        """The velocity field of these known pixels at these coordinates."""
        known_xy, known_rgb = self._in_order(conditioning.known_xy, conditioning.known_rgb)
        # None of this needs x or t: Heun's 16 steps ask 32 times, and pay for it once.
        known = self.embed_known(torch.cat((self.features(known_xy), known_rgb), -1))
        if self.config.local_linear:
            known = known + self.local_linear(known_xy, known_xy, known_rgb)[1]  # (b, k, d)
        query_xy = conditioning.query_xy
        query = self.embed_query(self.features(query_xy))
        # With the queries outside the scan, it too is run once.
        if self.config.scan == "known":
            return self._reading(known_xy, known_rgb, self.encoder(known), query_xy, query)
        return self._scanning(known_xy, known_rgb, known, query_xy, query)

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
    ) -> Velocity:
        """Queries read the scan of the known pixels, and do not pass through it."""
        kvs = self.readout.kvs(memory, known_xy, known_rgb)  # one for each block
        if self.config.start == "plain":
            return lambda x, t: self._read(query, query_xy, kvs, x, t, _open(t))
        # The smoother's features, not the bare queries, are what the readout goes on with.
        fill, features = self.smoother(query, query_xy, known_xy, known_rgb)
        variance = self.log_variance.exp()

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            start, shown, factor = gaussian_start(x, t[:, None, None], fill, variance)
            # Below t = 0.1 a noisy colour tells less than 0.1 % of its variance: it fades out.
            noise_gate = torch.tanh(10 * t)[:, None, None]
            # A posterior mean hears no neighbours: their attention is spared, quadratic as it is.
            # Not in training, where DDP would wait for the gradients of layers that were left out.
            heard = torch.is_grad_enabled() or bool(noise_gate.any())
            # At t = 0 nothing is shown: a posterior mean depends on the known pixels alone.
            shown = noise_gate * shown
            read = self._read(features, query_xy, kvs, shown, t, noise_gate if heard else None)
            return start + factor * read

        return velocity

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


def _open(t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1"]:
    """The gate of a network that hears its noisy colours at every time."""
    return torch.ones_like(t)[:, None, None]


def take(tokens: Float[Tensor, "b n d"], order: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The tokens of each row in the order given."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())
