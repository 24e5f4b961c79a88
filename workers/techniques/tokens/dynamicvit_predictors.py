"""DynamicViT's predictors, which say of each token whether it goes on: counts, draws, losses and the module.

Source: Rao et al., DynamicViT, arXiv 2106.02034, sections 3.2 to 3.4; what differs is said in
:mod:`workers.techniques.tokens.dynamicvit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- mathematics ------------------------------------------------------------------------------------------------------


def kept_counts(patches: int, keep: float, stages: int) -> list[int]:
    """Returns the patch tokens after each predictor: int(rho^i P), at least one; 196 at 0.7 give 137, 96, 67."""
    return [max(1, int(keep ** (i + 1) * patches + 1e-9)) for i in range(stages)]


def decide(chances: Tensor, kept: Tensor) -> Tensor:
    """Draws which tokens stay, with the gradient of the softened draw; the most likely one stays in any case.

    Args:
        chances: (B, P, 2) logarithms of the probabilities to stay and to go; kept: (B, P, 1) of 0 and 1, those left.

    Returns:
        (B, P, 1) of 0 and 1.
    """
    drawn = F.gumbel_softmax(chances, hard=True)[..., :1]
    best = chances[..., :1].detach().masked_fill(kept == 0, -torch.inf).argmax(dim=1, keepdim=True)
    sure = torch.zeros_like(drawn).scatter(1, best, 1.0)
    return kept * (drawn + sure * (1 - drawn.detach()))


def ratio_loss(decided: Sequence[Tensor], keep: float) -> Tensor:
    """Returns the mean over images and predictors of (share kept - rho^i)^2, without its weight.

    Args:
        decided: one (B, P, 1) of 0 and 1 a predictor.
    """
    errors = [(kept.mean(dim=(1, 2)) - keep ** (i + 1)).square().mean() for i, kept in enumerate(decided)]
    return torch.stack(errors).mean()


def token_loss(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Returns the squared distance of the kept tokens from the teacher's, mean over tokens and channels.

    Args:
        student, teacher: (B, P, C); kept: (B, P, 1) of 0 and 1.
    """
    distance = (student.float() - teacher.float()).square().mean(dim=-1, keepdim=True)
    return (distance * kept).sum() / kept.sum()


# --- module -----------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Says of each patch token whether it stays, from itself and the mean of all that are left.

    Args:
        width: C; half of the channels speak of the token, half of the image.
    """

    def __init__(self, width: int, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.local = width // 2
        with torch.device(device or "cpu"):
            self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            self.decide = nn.Sequential(
                nn.Linear(width, width // 2),
                nn.GELU(),
                nn.Linear(width // 2, width // 4),
                nn.GELU(),
                nn.Linear(width // 4, 2),
            )

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        """Returns (B, P, 2) float32 logarithms of the probabilities to stay and to go.

        Args:
            x: (B, P, C) patch tokens; kept: (B, P, 1) of 0 and 1, those that are left.
        """
        features = self.project(x)
        own, others = features[..., : self.local], features[..., self.local :]
        mean = (others * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
        features = torch.cat([own, mean.to(own.dtype).expand(-1, x.shape[1], -1)], dim=-1)
        return F.log_softmax(self.decide(features).float(), dim=-1)

    def start_(self, generator: torch.Generator) -> None:
        """Fills an empty predictor: weights of spread 0.02 drawn on the CPU, norms of one, no biases."""
        for name, parameter in self.named_parameters():
            drawn = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
            if parameter.ndim == 2:
                nn.init.trunc_normal_(drawn, std=0.02, generator=generator)
            parameter.data.copy_(drawn)

    def fill_(self, like: Tensor, generator: torch.Generator) -> None:
        """Gives an empty predictor its first weights, where and in the type that ``like``, one of the model's, is."""
        self.to_empty(device="cpu")
        self.start_(generator)
        self.to(device=like.device, dtype=like.dtype)
