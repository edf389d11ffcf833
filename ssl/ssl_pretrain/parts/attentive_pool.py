"""Attentive pooling: a learned query attends to all tokens of an image and gives one vector.

With one query for all images no token has to be projected. The score of token x in a head is q' K x, a product with
one vector K' q. The weighted mean of the values V x is V times the weighted mean of the tokens. So a pooling needs two
products of (N, D) x (D, h), where keys and values would need two of (N, D) x (D, D).

Shapes: B images, N tokens, D channels, h heads, d = D / h channels of a head.
"""

import math
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.batch_norm import BatchNorm1d

Variant = Literal["aim", "vjepa", "capi"]
NORM_EPS = 1e-6
INIT_STD = 0.02  # truncated normal, of every matrix and of the query; biases start at 0


@final
class TokenNorm(nn.Module):
    """A variant's normalisation of tokens before the attention, without learned parameters, so that several poolings
    can share it: "aim" batch norm over images and tokens, "vjepa" layer norm, "capi" none."""

    def __init__(self, dim: int, variant: Variant) -> None:
        super().__init__()
        self.norm: nn.Module = {
            "aim": lambda: BatchNorm1d(dim, eps=NORM_EPS, affine=False),
            "vjepa": lambda: nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False),
            "capi": nn.Identity,
        }[variant]()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to the same shape."""
        return self.norm(tokens.flatten(0, 1)).view(tokens.shape)


@final
class AttentivePool(nn.Module):
    """Pools tokens (B, N, D), normalised by `TokenNorm`, to one vector (B, D).

    "aim": keys and values without biases, the query not projected (El-Nouby et al., ICML 2024, as released). "capi":
    values with a bias (Darcet et al., TMLR 2025, as released). "vjepa": a cross-attention block: gain and shift of the
    layer norm on the tokens, projections of query and values with biases, the query added to the attention output, then
    an MLP with layer norm and residual connection (Bardes et al., TMLR 2024, as released). Keys have no biases in any
    variant, because these would add the same value to all scores of a head. `generator`: of the initial weights, CPU.
    """

    def __init__(self, dim: int, heads: int, variant: Variant, generator: torch.Generator) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")

        def matrix(outside: int, inside: int) -> nn.Parameter:
            start = torch.empty(outside, inside)
            return nn.Parameter(nn.init.trunc_normal_(start, std=INIT_STD, a=-1, b=1, generator=generator))

        self.heads, self.block = heads, variant == "vjepa"
        self.query = nn.Parameter(matrix(1, dim).detach()[0])
        self.key, self.value = matrix(dim, dim), matrix(dim, dim)
        if variant != "aim":
            self.value_bias = nn.Parameter(torch.zeros(dim))
        if self.block:
            self.gain, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            self.query_map, self.query_bias = matrix(dim, dim), nn.Parameter(torch.zeros(dim))
            self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
            self.fc1, self.fc1_bias = matrix(4 * dim, dim), nn.Parameter(torch.zeros(4 * dim))
            self.fc2, self.fc2_bias = matrix(dim, 4 * dim), nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        heads = (self.heads, -1)
        query = F.linear(self.query, self.query_map, self.query_bias) if self.block else self.query
        directions = torch.einsum("hd,hdc->hc", query.view(heads), self.key.unflatten(0, heads))
        directions = directions / math.sqrt(query.numel() / self.heads)
        if self.block:
            directions = directions * self.gain
        attention = (tokens @ directions.T).softmax(1)  # (B, N, h)
        seen = attention.transpose(1, 2) @ tokens  # (B, h, D)
        if self.block:
            seen = seen * self.gain + self.shift
        values = torch.einsum("bhc,hdc->bhd", seen, self.value.unflatten(0, heads)).flatten(1)
        if hasattr(self, "value_bias"):
            values = values + self.value_bias
        if not self.block:
            return values
        x = self.query + values
        hidden = F.gelu(F.linear(self.norm(x), self.fc1, self.fc1_bias))
        return x + F.linear(hidden, self.fc2, self.fc2_bias)
