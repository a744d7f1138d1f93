"""What reads the known pixels: Mamba layers over tokens in order."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambaflow.config import ModelConfig
from mambaflow.kernels.linear import Linear
from mambaflow.models.mamba import Mamba


class ScanStack(nn.Module):
    """Mamba layers one after the other, pre-norm and residual."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        width = config.d_model
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_layers))
        self.layers = nn.ModuleList(
            Mamba(width, config.d_state, config.d_conv, config.expand) for _ in range(num_layers)
        )

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens = tokens + layer(norm(tokens))
        return tokens


class Encoder(nn.Module):
    """The scan over tokens in order: forward alone, or forward and backward, concatenated and
    projected."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, layers = config.d_model, config.num_layers
        self.bidirectional = config.bidirectional
        # Half of the layers each way: as many in all as one way has.
        self.forward_stack = ScanStack(config, layers // 2 if self.bidirectional else layers)
        if self.bidirectional:
            self.backward_stack = ScanStack(config, layers // 2)
            self.join = Linear(2 * width, width)
        # The layers norm what they read, and leave the sum of what they say as it is.
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        ahead = self.forward_stack(tokens)
        if self.bidirectional:
            # Turned back, so that a place in both is the same token: one knows all before it on the
            # curve, the other all after it.
            back = self.backward_stack(tokens.flip(1)).flip(1)
            ahead = tokens + self.join(torch.cat((ahead, back), -1))  # residual around `join` too
        return self.norm(ahead)
