"""Attention, with Gaussian windows in the plane if asked; the kernel is chosen here."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.checks import require
from mambaflow.kernels import attention_cpu
from mambaflow.kernels.linear import Linear
from mambaflow.kernels.transforms import is_transformed


class KeyValue(NamedTuple):
    """What attention reads, computed once and asked by any number of queries."""

    key: Float[Tensor, "b h k e"]
    value: Float[Tensor, "b h k e"]


PLAIN = 2**25  # scores, 128 MiB, up to which plain products beat torch's fused attention on CPU


def attend(
    query: Float[Tensor, "b h n e"], key: Float[Tensor, "b h k e"], value: Float[Tensor, "b h k f"]
) -> Float[Tensor, "b h n f"]:
    """softmax(query key') value, by a kernel that saves no scores: ours, or else torch's.

    Where ours is not built, and gradients of few tokens are wanted on CPU, all b h n k scores are
    saved: plain products take 0.8 times as long as torch's kernel. So they are in transforms of
    torch.func and forward_ad, for which neither kernel has rules.

    Raises:
        ValueError: shapes that do not fit one another, no keys, whole numbers, several devices, or
            several precisions outside autocast.
    """
    alike = key.dtype == value.dtype == query.dtype and key.is_cpu and value.is_cpu
    if alike and attention_cpu.is_supported(query):
        return attention_cpu.attend(query, key, value)
    attention_cpu.refuse_shapes(query, key, value)
    _refuse_kinds(query, key, value)
    if is_transformed():
        return plain(query, key, value)
    few = query.shape[:3].numel() * key.shape[2] <= PLAIN
    if few and query.dtype == torch.float32 and not query.is_cuda and torch.is_grad_enabled():
        return plain(query, key, value)
    return fused(query, key, value)


def _refuse_kinds(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what torch would refuse without a name, or compute."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        fits = x.is_floating_point() and x.device == query.device
        cast = x.dtype == query.dtype or torch.is_autocast_enabled(query.device.type)
        if not (fits and cast):
            raise ValueError(
                f"{name} (={x.dtype} on {x.device}) must be of real numbers, as query is "
                f"(={query.dtype} on {query.device}); convert it"
            )


def plain(
    query: Float[Tensor, "b h n e"], key: Float[Tensor, "b h k e"], value: Float[Tensor, "b h k f"]
) -> Float[Tensor, "b h n f"]:
    """`attend` by two products, all scores saved."""
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


def fused(
    query: Float[Tensor, "b h n e"], key: Float[Tensor, "b h k e"], value: Float[Tensor, "b h k f"]
) -> Float[Tensor, "b h n f"]:
    """`attend` by torch's kernel."""
    features = value.shape[-1]
    width = max(query.shape[-1], features)
    query, key, value = (_pad(x, width + -width % 8) for x in (query, key, value))
    # Zeros of query and key change no score; those of the value are cut off. The scale is 1, since
    # by default it would be of the padded width, and is in the query already.
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :features]


def _pad(x: Float[Tensor, "*rows e"], width: int) -> Float[Tensor, "*rows f"]:
    """Rows with zeros to one width, a multiple of 8: torch's kernel on GPUs asks for it, and that
    on CPU is faster (15 to 16: by 1.6)."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention, with Gaussian windows in the plane if asked.

    softmax over y of -|x - y|^2 / 2 s^2 is that of (x.y - |y|^2 / 2) / s^2, as |x|^2 cancels:
    three more dimensions of query (x, 1) and key (y, -|y|^2 / 2) give each head a window of
    learned width s, without a mask and on any grid. Three more of the value carry colours,
    so that every head also smooths the image with its own kernel.
    """

    def __init__(self, width: int, heads: int, windows: bool) -> None:
        super().__init__()
        fits = heads >= 1 and width >= 1 and width % heads == 0
        require(fits, f"width (={width}) must be a multiple of heads (={heads}), and both positive")
        self.heads, self.windows = heads, windows
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)
        if windows:
            self.log_width = nn.Parameter(torch.linspace(math.log(0.02), math.log(0.3), heads))
            self.colours = Linear(3 * heads, width, bias=False)

    def kv(
        self,
        tokens: Float[Tensor, "b k d"],
        xy: Float[Tensor, "b k 2"],
        rgb: Float[Tensor, "b k 3"],
    ) -> KeyValue:
        """The keys and values of `tokens`, which stand at `xy` and have colours `rgb`."""
        key, value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        key, value = key.transpose(1, 2), value.transpose(1, 2)  # views: heads before tokens
        if not self.windows:
            return KeyValue(key, value)
        centred = xy - 0.5  # smaller squares, and so less rounding in scores over s^2
        place = torch.cat((centred, -0.5 * centred.square().sum(-1, keepdim=True)), -1)
        return KeyValue(self._widen(key, place), self._widen(value, rgb))

    def forward(
        self, tokens: Float[Tensor, "b n d"], xy: Float[Tensor, "b n 2"], kv: KeyValue
    ) -> Float[Tensor, "b n d"]:
        """What the tokens read."""
        out, colours = self.read(tokens, xy, kv)
        return self.out(out) if colours is None else self.out(out) + self.colours(colours)

    def read(
        self, tokens: Float[Tensor, "b n d"], xy: Float[Tensor, "b n 2"], kv: KeyValue
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n c"] | None]:
        """The heads' outputs before their projection, and the colours that each head read."""
        query = self.query(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        size = query.shape[-1]
        query = query * size**-0.5
        if self.windows:
            query = self._aim(query, xy - 0.5)
            # Coordinates over s^2 reach the hundreds: bf16 would move the windows.
            with torch.autocast(query.device.type, enabled=False):
                heads = attend(query, *kv)
            colours = heads[..., size : size + 3].transpose(1, 2).flatten(2)
            return heads[..., :size].transpose(1, 2).flatten(2), colours
        heads = attend(query, *kv)
        return heads.transpose(1, 2).flatten(2), None

    def _aim(
        self, query: Float[Tensor, "b h n e"], centred: Float[Tensor, "b n 2"]
    ) -> Float[Tensor, "b h n f"]:
        place = F.pad(centred, (0, 1), value=1.0)  # (x, 1): the 1 meets -|y|^2 / 2 of the key
        precision = torch.exp(-2 * self.log_width)[:, None, None]  # 1 / s^2 of every head
        aim = precision * place[:, None]
        return torch.cat((query.float(), aim), -1)

    def _widen(
        self, heads: Float[Tensor, "b h k e"], extra: Float[Tensor, "b k 3"]
    ) -> Float[Tensor, "b h k f"]:
        shared = extra[:, None].expand(-1, self.heads, -1, -1)  # no copy before cat's
        return torch.cat((heads.float(), shared), -1)
