"""How queries read the known pixels: one cross-attention (V1), or a perceiver (V2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.config import ModelConfig
from mambaflow.models.attention import Attention, KeyValue
from mambaflow.models.layers import Modulation, mlp


class PerceiverBlock(nn.Module):
    """One iteration: queries read the known pixels, then each other, then think."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: int,
        windows: bool,
        residual: bool,
        query_attention: bool,
    ) -> None:
        super().__init__()
        self.residual, self.query_attention = residual, query_attention
        self.cross_attn = Attention(width, heads, windows)
        if query_attention:
            self.self_attn = Attention(width, heads, windows)
        self.mlp = mlp(width, mlp_ratio)
        # Three in either case, one for each row of the modulation.
        self.norms = nn.ModuleList(
            nn.LayerNorm(width) if i != 1 or query_attention else nn.Identity() for i in range(3)
        )

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        xy: Float[Tensor, "b n 2"],
        rgb: Float[Tensor, "b n 3"],
        kv: KeyValue,
        modulation: Float[Tensor, "3 3 b 1 d"] | None,
        noise_gate: Float[Tensor, "b 1 1"] | None,
    ) -> Float[Tensor, "b n d"]:
        """`rgb`: the noisy colours shown; `noise_gate`: 0 where they say nothing, at t = 0, so that
        what is asked beside a pixel cannot change its posterior mean; None: nowhere, and the
        attention among queries is spared."""
        asked, gate = self._enter(tokens, 0, modulation)
        read = gate * self.cross_attn(asked, xy, kv)
        # Without the residual all that a query has, its noisy colour too, must pass the attention.
        tokens = tokens + read if self.residual else read
        if self.query_attention and noise_gate is not None:
            asked, gate = self._enter(tokens, 1, modulation)
            # Its keys are the queries themselves, which change with x and t: none come ready.
            mixed = self.self_attn(asked, xy, self.self_attn.kv(asked, xy, rgb))
            # `gate` is learned; `noise_gate` is not, and is 0 at t = 0 whatever was learned.
            tokens = tokens + noise_gate * gate * mixed
        asked, gate = self._enter(tokens, 2, modulation)
        return tokens + gate * self.mlp(asked)

    def _enter(
        self, tokens: Float[Tensor, "b n d"], i: int, modulation: Tensor | None
    ) -> tuple[Float[Tensor, "b n d"], Tensor | float]:
        normed = self.norms[i](tokens)
        if modulation is None:
            return normed, 1.0
        scale, shift, gate = modulation[i]  # each (b, 1, d)
        return torch.addcmul(shift, normed, 1 + scale), gate  # a scale of 0 changes nothing


class CrossReadout(nn.Module):
    """The baseline's: one cross-attention, queries from the scan reading known pixels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.residual = config.residual
        self.cross_attn = Attention(config.d_model, config.num_heads, config.windows)
        self.norm = nn.LayerNorm(config.d_model)
        self.mlp = mlp(config.d_model, config.mlp_ratio)

    def kvs(self, memory: Tensor, xy: Tensor, rgb: Tensor) -> list[KeyValue]:
        return [self.cross_attn.kv(memory, xy, rgb)]

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        xy: Float[Tensor, "b n 2"],
        rgb: Float[Tensor, "b n 3"],
        kvs: list[KeyValue],
        time: Tensor,
        noise_gate: Float[Tensor, "b 1 1"] | None,
    ) -> Float[Tensor, "b n d"]:
        # `time` and `noise_gate` go unused: modulation "add" has put the time into the tokens, and
        # queries do not hear one another here.
        read = self.cross_attn(tokens, xy, kvs[0])
        tokens = tokens + read if self.residual else read
        return tokens + self.mlp(self.norm(tokens))


class Perceiver(nn.Module):
    """V2's: iterations of cross-attention, query self-attention and MLP, modulated by time."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, iterations = config.d_model, config.perceiver_iterations
        self.blocks = nn.ModuleList(
            PerceiverBlock(
                width,
                config.num_heads,
                config.mlp_ratio,
                config.windows,
                config.residual or i > 0,  # later blocks pass on what was read before
                config.query_attention,
            )
            for i in range(iterations)
        )
        self.modulation = Modulation(width, 3, iterations) if config.modulation == "adaln" else None

    def kvs(self, memory: Tensor, xy: Tensor, rgb: Tensor) -> list[KeyValue]:
        # Every block reads the same memory, by weights of its own.
        crosses: list[Attention] = [block.cross_attn for block in self.blocks]  # type: ignore[misc]
        return [cross.kv(memory, xy, rgb) for cross in crosses]

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        xy: Float[Tensor, "b n 2"],
        rgb: Float[Tensor, "b n 3"],
        kvs: list[KeyValue],
        time: Tensor,
        noise_gate: Float[Tensor, "b 1 1"] | None,
    ) -> Float[Tensor, "b n d"]:
        adaln = self.modulation
        # For all blocks at once: they share the map.
        modulations = [None] * len(self.blocks) if adaln is None else adaln(time)
        for block, read, modulation in zip(self.blocks, kvs, modulations, strict=True):
            tokens = block(tokens, xy, rgb, read, modulation, noise_gate)
        return tokens


READOUTS: dict[str, type[CrossReadout] | type[Perceiver]] = {
    "cross_attention": CrossReadout,
    "perceiver": Perceiver,
}
