"""The discriminator's loss by hand, the adaptive weight by its formula, patches at every image size."""

from __future__ import annotations

import pytest
import torch

from mage_fast.errors import InputError
from mage_fast.training.adversarial import PatchDiscriminator, adaptive_weight, hinge_loss


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # real: 0, 0.5, 2; fake: 0, 1, 2
    assert hinge_loss(real, fake).item() == pytest.approx((2.5 / 3 + 3 / 3) / 2)
    assert hinge_loss(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    out = x @ weight.T
    # by hand: d mean(out^2) / dW = 2 out^T x / numel;  d (-sum(3 out)) / dW = -3 sum over rows of x
    first = (2 * out.detach().T @ x / out.numel()).norm()
    second = (3 * x.sum(0).expand(4, 3)).norm()
    got = adaptive_weight(out.square().mean(), -(3 * out).sum(), weight)
    torch.testing.assert_close(got, first / (second + 1e-6), rtol=1e-10, atol=0)
    assert not got.requires_grad
    (out.sum() * got).backward()  # the graph is still there
    assert weight.grad is not None


def test_adaptive_weight_is_bounded() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert adaptive_weight((1e9 * weight).sum(), (0 * weight).sum(), weight) == 1e4


@pytest.mark.parametrize("size", [8, 10, 12, 16, 20, 24, 28, 32, 48, 64])
def test_scores_patches_of_every_size(size: int) -> None:
    torch.manual_seed(0)
    scores = PatchDiscriminator(size, base_width=4)(torch.rand(2, 3, size, size))
    assert scores.shape[:2] == (2, 1)
    assert scores.shape[2] == scores.shape[3] >= 2
    assert scores.isfinite().all()


def test_published_patch_grid() -> None:
    """256-pixel images: 30 x 30 patches of 70 pixels."""
    discriminator = PatchDiscriminator(256, base_width=2)
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    scores = discriminator.layers[0](images)  # GroupNorm would spread the gradient: convolutions alone
    for layer in discriminator.layers[1:]:
        if isinstance(layer, torch.nn.Conv2d):
            scores = layer(scores)
    assert scores.shape == (1, 1, 30, 30)
    (gradient,) = torch.autograd.grad(scores[0, 0, 15, 15], images)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_a_score_depends_on_its_image_alone() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(16, base_width=4).double()
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)


def test_learns_to_tell_two_textures_apart() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, base_width=8)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3)
    smooth = torch.rand(16, 3, 1, 1).expand(-1, -1, 8, 8)
    noise = torch.rand(16, 3, 8, 8)
    losses = []
    for _ in range(30):
        loss = hinge_loss(discriminator(smooth), discriminator(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 0.8 < losses[0]


def test_refuses_images_without_a_patch() -> None:
    with pytest.raises(InputError, match="image_size is 4, wanted 8 or more"):
        PatchDiscriminator(4)
