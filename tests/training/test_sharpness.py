"""Losses of sharpness: each term by its formula, weighed gradients, and trainings that resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.config import SharpnessConfig, load_config
from clipmill.errors import UserError
from clipmill.models.discriminator import PatchDiscriminator
from clipmill.training.sharpness import Sharpness, networks_sha256
from tests.training.networks import RandomDistance, RandomFeatures, save

CPU = torch.device("cpu")


def pair(num_frames: int = 4) -> tuple[Tensor, Tensor]:
    """A reconstruction that asks for gradients, and its original."""
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(2, 3, num_frames, 16, 16, generator=generator) - 0.5
    return (video + torch.randn(video.shape, generator=generator) / 9).requires_grad_(), video


def base_of(reconstruction: Tensor, video: Tensor) -> Tensor:
    return F.mse_loss(reconstruction, video) / 0.06


def rows_of(video: Tensor) -> Tensor:
    return 2 * video.transpose(1, 2).flatten(0, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    return {
        "perceptual_weights": save(RandomDistance(), folder / "perceptual.pt"),
        "gram_weights": save(RandomFeatures(), folder / "gram.pt"),
    }


def test_without_terms_the_loss_stays_as_it_is() -> None:
    reconstruction, video = pair()
    loss, metrics = Sharpness(SharpnessConfig(), CPU)(base_of(reconstruction, video), reconstruction, video, 0)
    assert (loss.item(), metrics) == (base_of(reconstruction, video).item(), {})


def test_terms_and_gradients_are_those_of_their_formulas(files: dict[str, str]) -> None:
    """All frames are looked at, so that nothing is left to chance."""
    config = SharpnessConfig(**files, perceptual_cost=0.2, gram_cost=0.7, frames=4)
    reconstruction, video = pair()
    loss, metrics = Sharpness(config, CPU)(base_of(reconstruction, video), reconstruction, video, 0)
    (gradient,) = torch.autograd.grad(loss, reconstruction)

    frames, originals = rows_of(reconstruction), rows_of(video)
    perceptual = RandomDistance()(frames, originals).mean()
    grams = [
        [each.flatten(2) @ each.flatten(2).mT / each.shape[2:].numel() for each in RandomFeatures()(x)]
        for x in (frames, originals)
    ]
    gram = torch.stack([(a - b).square().mean() for a, b in zip(*grams, strict=True)]).mean()
    expected = base_of(reconstruction, video) + 0.2 * perceptual + 0.7 * gram
    (expected_gradient,) = torch.autograd.grad(expected, reconstruction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, {"perceptual": perceptual.detach(), "gram": gram.detach()})
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_discriminators_gradient_has_its_share_and_starts_late() -> None:
    config = SharpnessConfig(adversarial_cost=0.5, adversarial_start=4, discriminator_dim=8)
    torch.manual_seed(0)
    sharpness = Sharpness(config, CPU)
    reconstruction, video = pair()
    (alone,) = torch.autograd.grad(base_of(reconstruction, video), reconstruction)
    for step, is_trained, is_felt in ((1, False, False), (2, True, False), (4, True, True)):
        loss, _ = sharpness(base_of(reconstruction, video), reconstruction, video, step)
        found = torch.autograd.grad(loss, [reconstruction, *sharpness.parameters()])
        assert any(each.any() for each in found[1:]) == is_trained
        extra = found[0] - alone
        share = 0.5 if is_felt else 0.0
        torch.testing.assert_close(extra.norm() / alone.norm(), torch.tensor(share), atol=1e-4, rtol=1e-3)
    # It points where the discriminator finds the reconstruction more real.
    realism = [sharpness.discriminator(reconstruction.detach() - move * extra).mean() for move in (0, 1e-2)]
    assert realism[1] > realism[0]


def test_filler_behind_a_picture_changes_nothing(files: dict[str, str]) -> None:
    """A picture that is filled up is judged as the still video that it stands for, whatever the filler holds."""
    config = SharpnessConfig(**files, frames=4, adversarial_cost=0.5, adversarial_start=0, discriminator_dim=8)
    torch.manual_seed(0)
    sharpness = Sharpness(config, CPU)
    anchors = sharpness.discriminator.anchors.clone()
    num_frames = torch.tensor([4, 1])
    found = []
    for filler in (0.0, 0.3):
        reconstruction, video = pair()
        video[1, :, 1:] = filler
        reconstruction = reconstruction.detach()
        reconstruction[1, :, 1:] = filler  # as the tokenizer returns it
        reconstruction.requires_grad_()
        base = base_of(reconstruction, video)
        sharpness.discriminator.anchors.copy_(anchors)
        loss, metrics = sharpness(base, reconstruction, video, 1, num_frames)
        (gradient,) = torch.autograd.grad(loss, reconstruction)
        assert not gradient[1, :, 1:].any()
        found.append((loss.detach() - base.detach(), gradient, metrics))
    torch.testing.assert_close(found[0], found[1])
    still = [each.detach()[1:, :, :1].expand(-1, -1, 4, -1, -1) for each in pair()]
    expected = RandomDistance()(rows_of(still[0]), rows_of(still[1])).mean()
    videos = RandomDistance()(*(rows_of(each[:1].detach()) for each in pair())).mean()
    torch.testing.assert_close(found[0][2]["perceptual"], (expected + videos) / 2)


def test_the_discriminators_loss_is_the_hinge_and_nothing_of_it_reaches_the_tokenizer() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    reconstruction, video = pair()
    fake, real = discriminator(reconstruction), discriminator(video)
    expected = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    verdict = discriminator.judge(reconstruction, video)
    torch.testing.assert_close(verdict.loss, expected)
    torch.testing.assert_close(verdict.realism, fake.mean())
    torch.testing.assert_close(discriminator.anchors, torch.stack((real.mean(), fake.mean())) * 0.01)
    config = SharpnessConfig(adversarial_cost=0.5, adversarial_start=4, discriminator_dim=8)
    loss, _ = Sharpness(config, CPU)(
        torch.zeros((), requires_grad=True) + 0 * reconstruction.sum(), reconstruction, video, 2
    )
    (gradient,) = torch.autograd.grad(loss, reconstruction)
    assert not gradient.any()


def test_a_discriminator_learns_to_tell_blur(files: dict[str, str]) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    for _ in range(60):
        video = torch.rand(4, 3, 4, 16, 16) - 0.5
        verdict = discriminator.judge(F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1)), video)
        optimizer.zero_grad()
        (verdict.loss + 0.01 * verdict.lecam).backward()
        optimizer.step()
    assert verdict.loss < 0.3


class NoDistance(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean()


def test_a_network_of_another_kind_is_one_line(tmp_path: Path, files: dict[str, str]) -> None:
    reconstruction, video = pair()
    base = base_of(reconstruction, video)
    for key, path, message in (
        (
            "perceptual_weights",
            save(NoDistance(), tmp_path / "one.pt"),
            r"perceptual_weights returned \[\], not one dist",
        ),
        ("perceptual_weights", files["gram_weights"], r"perceptual_weights cannot be called as docs/training\.md says"),
        (
            "gram_weights",
            save(nn.Flatten(), tmp_path / "flat.pt"),
            r"gram_weights returned \[8, 768\], not feature maps",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Sharpness(SharpnessConfig(**{key: path}), CPU)(base, reconstruction, video, 0)
    with pytest.raises(UserError, match=r"vqvae\.sharpness\.gram_weights .*absent\.pt does not exist"):
        networks_sha256(SharpnessConfig(gram_weights=str(tmp_path / "absent.pt")))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"perceptual_cost needs sharpness\.perceptual_weights"):
        load_config([], ["root=x", "vqvae.sharpness.perceptual_cost=1"])
    with pytest.raises(UserError, match=r"adversarial_cost needs training\.zero_stage 0, 1 or 2"):
        load_config([], ["root=x", "vqvae.sharpness.adversarial_cost=1", "vqvae.training.zero_stage=3"])
