"""A small convolutional classifier of digits: the feature space of the demo's Frechet distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.training.optim import build_adamw

STEPS = 600
BATCH = 128


class DigitClassifier(nn.Module):
    """Two strided convolutions, a hidden layer of 64 features, ten classes; images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(16),
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            nn.Flatten(),
            *(nn.Linear(512, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    @classmethod
    def trained(
        cls, images: Float[Tensor, "N 3 H W"], labels: Int[Tensor, " N"], *, seed: int
    ) -> DigitClassifier:
        """Trained on real digits, on the images' device."""
        torch.manual_seed(seed)
        classifier = cls().to(images.device)
        optimizer = build_adamw(classifier, 2e-3)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=generator).to(images.device)
            loss = F.cross_entropy(classifier(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return classifier.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 64"]:
        """Hidden features of images clamped to [0, 1]."""
        return torch.cat([self.body(part.clamp(0, 1)) for part in images.split(256)])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images classified right."""
        return float((self(images.clamp(0, 1)).argmax(1) == labels).float().mean())
