from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipmill.config import VQVAEModelConfig
from clipmill.errors import UserError
from clipmill.models import coders, modern_coders
from clipmill.models.coders import GroupNorm, halvings
from clipmill.models.convolutions import Downsample, Upsample
from clipmill.models.vqvae import VQVAE, codes_shape, latent_shape, to_input, to_pixels


def tiny(**changes: object) -> VQVAE:
    settings = {"hidden_dim": 8, "num_res_layers": 1, "embedding_dim": 4, "num_codes": 16, "downsample": (2, 2, 2)}
    return VQVAE(VQVAEModelConfig.model_validate(settings | changes), pixel_variance=0.06)


def clips(batch_size: int = 2, num_frames: int = 8, size: tuple[int, int] = (8, 16)) -> torch.Tensor:
    return torch.rand(batch_size, 3, num_frames, *size) - 0.5


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 1, 16, 16, 3)
    video = to_input(pixels)
    assert video.shape == (1, 3, 1, 16, 16)
    assert (video.min(), video.max()) == (-0.5, 0.5)
    assert torch.equal(to_pixels(video), pixels)


@pytest.mark.parametrize("outside", [-0.6, 0.7])
def test_pixels_outside_the_range_are_clipped(outside: float) -> None:
    assert to_pixels(torch.full((1, 3, 1, 2, 2), outside)).unique().tolist() == [255 if outside > 0 else 0]


@pytest.mark.parametrize("downsample", [(4, 4, 4), (2, 2, 2), (1, 2, 2), (1, 4, 4), (4, 2, 2), (2, 8, 4), (1, 1, 2)])
@pytest.mark.parametrize("style", [{"style": "modern", "decoder_dim": 12}, {}, {"axial_attention": False}], ids=str)
def test_shapes_for_any_downsampling(downsample: tuple[int, int, int], style: dict[str, object]) -> None:
    model = tiny(downsample=downsample, **style).eval()
    video = clips()
    codes = model.encode(video)
    assert codes.shape == (2, *latent_shape(model.config, 8, (8, 16)))
    assert codes.dtype == torch.int64
    reconstruction = model.decode(codes)
    assert reconstruction.shape == video.shape
    torch.testing.assert_close(model(video).reconstruction, reconstruction)


@given(powers=st.tuples(*[st.integers(0, 5)] * 3))
def test_halvings_multiply_to_the_downsampling(powers: tuple[int, int, int]) -> None:
    downsample = tuple(2**power for power in powers)
    strides = halvings(downsample)
    assert tuple(torch.tensor(strides).reshape(-1, 3).prod(0).tolist()) == downsample
    assert len(strides) == max(powers)
    assert all(2 in stride for stride in strides)


def test_sizes_that_do_not_fit_are_user_errors() -> None:
    with pytest.raises(UserError, match="do not divide"):
        latent_shape(VQVAEModelConfig(), 15, (64, 64))
    with pytest.raises(UserError, match="compresses nothing"):
        tiny(downsample=(1, 1, 1))
    with pytest.raises(UserError, match="at least 2"):
        tiny(hidden_dim=1)


@pytest.mark.parametrize("hidden_dim", [6, 7])
def test_widths_need_not_divide_by_four(hidden_dim: int) -> None:
    model = tiny(hidden_dim=hidden_dim)
    model(clips()).loss.backward()
    assert model.decode(model.eval().encode(clips())).shape == clips().shape


def test_the_attention_of_a_block_begins_smaller_than_in_the_published_code() -> None:
    """There the branch is some 45 times as large as its shortcut: a block begins as a mean over rows and columns."""
    model = tiny(hidden_dim=64, num_res_layers=1, downsample=(4, 4, 4))
    block, ratios = model.encoder.stack[0], []
    block.register_forward_hook(lambda _, x, y: ratios.append(((y - x[0]).std() / x[0].std()).item()))
    model(clips(size=(32, 32)))
    attention = block.layers[-1]
    for weight in (attention.qkv.weight, attention.out.weight):
        nn.init.normal_(weight, std=64**-0.5)
    model(clips(size=(32, 32)))
    assert ratios[0] < 0.4 * ratios[1]


@pytest.mark.parametrize("each_frame", [False, True])
def test_group_norm_of_a_gpu_is_the_same(each_frame: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = GroupNorm(12, each_frame).double()
    with torch.no_grad():
        norm.weight.uniform_()
        norm.bias.uniform_()
    x = torch.randn(2, 12, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for is_gpu in (False, True):
        monkeypatch.setattr(coders, "is_on_gpu", lambda _, is_gpu=is_gpu: is_gpu)
        y = norm(x.contiguous(memory_format=torch.channels_last_3d))
        found.append((y, *torch.autograd.grad(y.square().sum() + y[:, 0].sum(), (x, norm.weight, norm.bias))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # its statistics are float32
    assert found[1][0].is_contiguous(memory_format=torch.channels_last_3d)


def test_shifted_content_stays_in_place() -> None:
    """A transposed convolution that crops the wrong end would shift the picture against the input."""
    model = tiny(downsample=(1, 2, 2), axial_attention=False).eval()
    with torch.no_grad():
        features = torch.zeros(1, 8, 4, 8, 8)
        features[0, :, 2, 4, 4] = 1
        grow = model.decoder.grow[0]
        grow.weight.fill_(1)
        grow.bias.zero_()
        touched = grow(features)[0, 0].nonzero()
    # kernel 4: stride 2 reaches [2i - 1, 2i + 2]; stride 1, the mirror of padding (2, 1), reaches [i - 1, i + 2].
    assert touched.min(0).values.tolist() == [1, 7, 7]
    assert touched.max(0).values.tolist() == [3, 10, 10]


@pytest.mark.parametrize("style", ["videogpt", "modern"])
@pytest.mark.parametrize("axial_attention", [True, False])
def test_gradients_reach_every_parameter(axial_attention: bool, style: str) -> None:
    model = tiny(axial_attention=axial_attention, style=style)
    stir(model)
    model(clips()).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    still = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    # A convolution's bias right before a batch norm has no effect; every other parameter has.
    assert still <= {"encoder.last.bias", "from_latent.bias"}


def test_loss_is_its_formula() -> None:
    model = tiny().eval()
    video = clips()
    output = model(video)
    mse = (output.reconstruction - video).square().mean()
    torch.testing.assert_close(output.metrics["recon_mse"], mse)
    torch.testing.assert_close(output.loss, mse / 0.06 + 0.25 * output.metrics["commitment"])
    assert all(metric.dim() == 0 and not metric.requires_grad for metric in output.metrics.values())


def test_padding_enters_neither_loss_nor_codebook() -> None:
    model = tiny().eval()
    video = clips(3)
    weight = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(model(video, weight).loss, model(video[:2]).loss)
    assert model(video, torch.zeros(3)).loss == 0
    latents = torch.randn(6, 4)
    row_weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    with_padding, without = model.train().quantizer, tiny().quantizer
    with_padding.codebook.copy_(without.codebook)
    for quantizer in (with_padding, without):
        quantizer.initialised.fill_(True)
        quantizer.counts.fill_(1)
        quantizer.sums.copy_(quantizer.codebook)
        quantizer.restart_share = 0.0
    with_padding(latents, row_weight)
    without(latents[:4])
    torch.testing.assert_close(with_padding.codebook, without.codebook)


QUANTIZERS = [
    {"num_codes": 32},
    {"num_codes": 32, "num_codebooks": 2},
    {"num_codes": 32, "distance": "cosine", "codebook_start": "kmeans"},
    {"num_codes": 64, "quantizer": "fsq", "fsq_levels": (4, 4, 4)},
    {"num_codes": 64, "quantizer": "lfq"},
    {"num_codes": 16, "quantizer": "lfq", "num_codebooks": 4},
    {"num_codes": 64, "quantizer": "bsq"},
    {"num_codes": 32, "quantizer": "simvq", "code_gradient": "rotation"},
    {"norm": "group"},
    {"style": "modern", "decoder_dim": 24},
    {"style": "modern", "causal": True, "downsample": (1, 4, 4)},
    {"l1_cost": 1.0},
    {"causal": True, "downsample": (1, 2, 2)},
]


@pytest.mark.parametrize("changes", QUANTIZERS, ids=str)
def test_it_learns(changes: dict[str, object]) -> None:
    model = tiny(hidden_dim=16, **changes)
    ramp = torch.linspace(-0.5, 0.5, 16)
    pixels = torch.stack((ramp.expand(8, 16, 16), ramp[:, None].expand(8, 16, 16), -ramp.expand(8, 16, 16)))
    video = torch.stack((pixels, -pixels))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        output = model(video)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.metrics["recon_mse"].item())
    assert losses[-1] < 0.25 * losses[0]
    codes = model.eval().encode(video)
    assert codes.shape == (2, *codes_shape(model.config, 8, (16, 16)))
    torch.testing.assert_close(model.decode(codes), model(video).reconstruction)


def test_l1_and_entropy_enter_the_loss_by_their_formula() -> None:
    video = clips()
    model = tiny(l1_cost=0.5).eval()
    output = model(video)
    mse = (output.reconstruction - video).square().mean()
    l1 = (output.reconstruction - video).abs().mean()
    torch.testing.assert_close(output.metrics["recon_l1"], l1)
    expected = mse / 0.06 + 0.5 * l1 / 0.06**0.5 + 0.25 * output.metrics["commitment"]
    torch.testing.assert_close(output.loss, expected)
    model = tiny(quantizer="lfq", entropy_cost=0.3)
    metrics = model(video).metrics
    loss = model(video).loss
    terms = metrics["recon_mse"] / 0.06 + 0.25 * metrics["commitment"] + 0.3 * metrics["entropy"]
    torch.testing.assert_close(loss, terms)


def stir(model: VQVAE) -> None:
    """Gives every branch that begins at zero a value."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(("style", "norm"), [("videogpt", "batch"), ("videogpt", "group"), ("modern", "group")])
@pytest.mark.parametrize("downsample", [(4, 4, 4), (2, 2, 2), (1, 2, 2)])
def test_a_causal_model_never_looks_ahead(style: str, norm: str, downsample: tuple[int, int, int]) -> None:
    model = tiny(causal=True, style=style, norm=norm, downsample=downsample)
    stir(model)
    step = downsample[0]
    video = clips(num_frames=1 + 3 * step)
    model(video)
    model.eval()
    codes = model.encode(video)
    assert codes.shape[1] == 4
    whole = model.decode(codes)
    assert whole.shape == video.shape
    for latents in (1, 2, 3):
        frames = 1 + (latents - 1) * step
        start = model.encode(video[:, :, :frames])
        assert torch.equal(start, codes[:, :latents])
        torch.testing.assert_close(model.decode(start), whole[:, :, :frames])
    with pytest.raises(UserError, match=r"1 \+ a multiple of"):
        latent_shape(model.config, 1 + 3 * step, (15, 15))


def test_the_modern_style_begins_with_its_shortcuts() -> None:
    """No branch of a block adds anything, and a constant clip stays constant away from its edges."""
    model = tiny(style="modern", downsample=(4, 4, 4))
    x = torch.randn(2, 8, 2, 4, 4)
    assert torch.equal(model.encoder.stack[0](x), x)
    assert VQVAEModelConfig(style="modern").hidden_dim == 256
    assert VQVAEModelConfig(style="modern", hidden_dim=64, norm="batch").norm == "batch"


@pytest.mark.parametrize("causal", [False, True])
def test_shortcuts_average_and_repeat_what_an_output_stands_for(causal: bool) -> None:
    stride = (2, 2, 1)
    frames = 5 if causal else 4
    x = torch.arange(float(frames)).view(1, 1, frames, 1, 1).expand(1, 1, frames, 4, 4).contiguous()
    averaged = modern_coders._averaged(x, Downsample(1, 1, stride, causal))
    assert averaged[0, 0, :, 0, 0].tolist() == ([0, 1.5, 3.5] if causal else [0.5, 2.5])
    assert averaged.shape[3:] == (2, 4)
    repeated = modern_coders._repeated(averaged, Upsample(1, 1, stride, causal))
    assert repeated.shape == x.shape
    assert repeated[0, 0, :, 0, 0].tolist() == ([0, 1.5, 1.5, 3.5, 3.5] if causal else [0.5, 0.5, 2.5, 2.5])


def test_group_norm_needs_no_other_clip() -> None:
    model = tiny(norm="group", quantizer="fsq", fsq_levels=(4, 4), num_codes=16)
    video = clips(3)
    alone = torch.cat([model(clip).reconstruction for clip in video.split(1)])
    torch.testing.assert_close(model(video).reconstruction, alone)


def test_settings_that_do_not_fit_are_refused() -> None:
    for changes, message in (
        ({"quantizer": "fsq", "fsq_levels": (8, 8), "num_codes": 256}, "make 64 codes"),
        ({"quantizer": "lfq", "num_codes": 100}, "power of two"),
        ({"num_codebooks": 3}, "multiple of num_codebooks"),
        ({"decoder_dim": 16}, "decoder_dim needs style=modern"),
        ({"quantizer": "fsq", "fsq_levels": (2, 8), "num_codes": 16}, "greater than or equal to 3"),
        ({"fsq_levels": (4, 4)}, "fsq_levels needs quantizer=fsq, not ema"),
        ({"quantizer": "lfq", "codebook_start": "kmeans"}, "need quantizer=ema, not lfq"),
        ({"quantizer": "bsq", "num_codes": 16, "code_gradient": "rotation"}, "needs quantizer=ema or simvq, not bsq"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)


def test_bfloat16_autocast_keeps_the_codebook_in_float32() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(clips())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert model.quantizer.codebook.dtype == model.quantizer.sums.dtype == torch.float32
    assert output.loss.isfinite()
