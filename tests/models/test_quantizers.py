from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clipmill.models import quantizers
from clipmill.models.quantizers import EMACodebook, LinearCodebook, nearest_codes, rotated


def codebook(num_codes: int = 8, restart_share: float = 0.03, decay: float = 0.99) -> EMACodebook:
    return EMACodebook(num_codes, 4, decay, restart_share)


def rows_of(matrix: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in matrix.tolist()}


def test_first_batch_becomes_the_codebook_once() -> None:
    quantizer = codebook(restart_share=0.0)
    first, second = torch.randn(64, 4), torch.randn(64, 4) + 50
    quantizer._initialise(quantizer._draw_rows(first[:, None]), first[:, None])
    initial = rows_of(quantizer.codebook)
    assert len(initial) == 8
    assert initial <= rows_of(first)
    quantizer(first)
    assert quantizer.initialised
    before = quantizer.codebook.clone()
    quantizer(second)
    assert (quantizer.codebook - before).abs().max() < 5  # it moves towards the data, it is not drawn anew


def test_a_loaded_codebook_is_not_initialised_again() -> None:
    trained, resumed = codebook(), codebook()
    batches = [torch.randn(64, 4) + 10 * step for step in range(4)]
    for batch in batches[:2]:
        trained(batch)
    resumed.load_state_dict(trained.state_dict())
    for batch in batches[2:]:
        assert torch.equal(trained(batch).codes, resumed(batch).codes)
    for name, buffer in trained.state_dict().items():
        assert torch.equal(buffer, resumed.state_dict()[name]), name


def test_eval_changes_nothing() -> None:
    quantizer = codebook()
    quantizer(torch.randn(64, 4))
    before = {name: buffer.clone() for name, buffer in quantizer.state_dict().items()}
    quantizer.eval()(torch.randn(64, 4) * 9)
    assert all(torch.equal(buffer, before[name]) for name, buffer in quantizer.state_dict().items())


def test_averages_follow_the_formula() -> None:
    quantizer = codebook(num_codes=2, restart_share=0.0, decay=0.9)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0, 0, 0], [10, 10, 10, 10]]))
    quantizer.counts.copy_(torch.tensor([2.0, 4.0]))
    quantizer.sums.copy_(quantizer.codebook * quantizer.counts[:, None])
    quantizer.initialised.fill_(True)
    rows = torch.tensor([[1.0, 0, 0, 0], [3, 0, 0, 0], [9, 10, 10, 10]])
    assert quantizer(rows).codes.tolist() == [[0], [0], [1]]
    torch.testing.assert_close(quantizer.counts, torch.tensor([0.9 * 2 + 0.1 * 2, 0.9 * 4 + 0.1 * 1]))
    torch.testing.assert_close(quantizer.codebook[0, 0], torch.tensor(0.1 * 4 / 2.0))
    torch.testing.assert_close(quantizer.codebook[1, 0], torch.tensor((0.9 * 40 + 0.1 * 9) / 3.7))


def test_a_dead_code_restarts_from_the_batch_with_count_and_sum() -> None:
    quantizer = codebook(num_codes=4, restart_share=0.5)
    rows = torch.randn(64, 4)
    quantizer(rows)
    quantizer.codebook[2] = 1e4
    quantizer.counts[2] = 1.0
    quantizer.sums[2] = 1e4
    restarts = quantizer(rows).metrics["codebook_restarts"]
    assert restarts >= 1
    assert rows_of(quantizer.codebook[2:3].round(decimals=4)) <= rows_of(rows.round(decimals=4))
    assert quantizer.counts[2] == 2 * 0.5 * 64 / 4
    torch.testing.assert_close(quantizer.sums[2], quantizer.codebook[2] * quantizer.counts[2])


def test_few_tokens_a_step_do_not_restart_every_code() -> None:
    """The published absolute threshold overwrites most codes for ever when a step holds fewer rows than codes."""
    quantizer = codebook(num_codes=64)
    torch.manual_seed(1)
    restarts = [quantizer(torch.randn(32, 4)).metrics["codebook_restarts"].item() for _ in range(100)]
    assert sum(restarts) / len(restarts) < 6


def test_unused_codes_survive_without_restarts() -> None:
    quantizer = codebook(num_codes=2, restart_share=0.0, decay=0.01)
    quantizer(torch.cat((torch.zeros(8, 4), torch.full((8, 4), 9.0))))
    far = quantizer.codebook.clone()
    for _ in range(40):
        quantizer(torch.zeros(8, 4))
    assert quantizer.codebook.isfinite().all()
    torch.testing.assert_close(quantizer.codebook, far)


def test_gradient_goes_straight_through() -> None:
    rows = torch.randn(16, 4, requires_grad=True)
    quantized = codebook()(rows)
    direction = torch.randn(16, 4)
    (gradient,) = torch.autograd.grad((quantized.latents * direction).sum(), rows, retain_graph=True)
    assert torch.equal(gradient, direction)
    (gradient,) = torch.autograd.grad(quantized.commitment.sum(), rows)
    torch.testing.assert_close(gradient, (rows - quantized.latents).detach() / 2)


@settings(max_examples=25)
@given(num_rows=st.integers(1, 70), num_codes=st.integers(1, 20), seed=st.integers(0, 1000))
def test_nearest_codes_are_nearest_in_any_chunking(num_rows: int, num_codes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, 3, generator=generator)
    embeddings = torch.randn(num_codes, 3, generator=generator)
    codes = nearest_codes(rows, embeddings)
    distances = torch.cdist(rows.double(), embeddings.double())
    torch.testing.assert_close(distances.gather(1, codes[:, None]).squeeze(1), distances.min(1).values)
    whole, quantizers.CHUNK_SCORES = quantizers.CHUNK_SCORES, 2 * num_codes + 1
    try:
        assert torch.equal(nearest_codes(rows, embeddings), codes)
    finally:
        quantizers.CHUNK_SCORES = whole


def test_drawn_rows_are_distinct_spread_and_change_with_the_step() -> None:
    quantizer = codebook(num_codes=16)
    rows = torch.arange(64.0)[:, None].expand(-1, 4).contiguous()
    first = quantizer._draw_rows(rows[:, None])[:, 0]
    assert first.unique().numel() == 16
    assert torch.equal(first // 4, torch.arange(16.0))
    quantizer.num_updates.add_(1)
    assert not torch.equal(first, quantizer._draw_rows(rows[:, None])[:, 0])
    draws = torch.stack([quantizers._keyed_uniform(torch.tensor(step), torch.arange(100)) for step in range(100)])
    assert (draws.min() >= 0) & (draws.max() < 1)
    assert draws.unique().numel() == 10_000
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_perplexity_and_usage() -> None:
    metrics = quantizers.codebook_metrics(torch.tensor([4.0, 4.0, 0.0, 0.0]))
    assert metrics["codebook_usage"] == 0.5
    assert metrics["codebook_perplexity"].item() == pytest.approx(2)


def test_several_codebooks_each_quantise_their_channels() -> None:
    joint = EMACodebook(8, 8, 0.9, 0.0, num_codebooks=2)
    alone = [EMACodebook(8, 4, 0.9, 0.0) for _ in range(2)]
    joint.initialised.fill_(True)
    for half, single in zip(joint.codebook.chunk(2), alone, strict=True):
        single.codebook.copy_(half)
        single.initialised.fill_(True)
    rows = torch.randn(64, 8)
    for _ in range(3):
        quantized = joint(rows)
        halves = [single(part) for single, part in zip(alone, rows.chunk(2, 1), strict=True)]
        assert torch.equal(quantized.codes, torch.cat([half.codes for half in halves], 1))
        torch.testing.assert_close(quantized.latents, torch.cat([half.latents for half in halves], 1))
    torch.testing.assert_close(joint.codebook, torch.cat([single.codebook for single in alone]))
    torch.testing.assert_close(joint.eval()(rows).latents, joint.embed(joint(rows).codes))


def test_cosine_distance_ignores_length() -> None:
    quantizer = EMACodebook(8, 4, 0.9, 0.03, cosine=True)
    rows = torch.randn(64, 4)
    for _ in range(3):
        quantizer(rows)
    torch.testing.assert_close(quantizer.codebook.square().mean(1), torch.ones(8))
    assert torch.equal(quantizer.eval()(rows).codes, quantizer(rows * 7).codes)
    similarity = torch.nn.functional.normalize(rows) @ quantizer.codebook.T
    assert torch.equal(quantizer(rows).codes[:, 0], similarity.argmax(1))
    before = quantizer(rows)
    quantizer.codebook *= torch.rand(8, 1) + 0.5  # as averages of codebooks are no longer of one length
    assert torch.equal(quantizer(rows).codes, before.codes)
    torch.testing.assert_close(quantizer.embed(before.codes), before.latents)


def test_clusters_are_a_better_start_than_rows() -> None:
    centres = torch.randn(8, 4) * 10
    rows = (centres.repeat(16, 1) + torch.randn(128, 4) * 0.1)[torch.randperm(128)]
    errors = {}
    for start in ("rows", "kmeans"):
        quantizer = EMACodebook(8, 4, 0.99, 0.0, start=start)
        errors[start] = quantizer(rows).commitment.mean()
        assert quantizer.initialised
    assert errors["kmeans"] < 0.9 * errors["rows"]


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a number from the device to the host."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("start", ["rows", "kmeans"])
def test_no_step_but_the_first_two_waits_for_the_device(start: str) -> None:
    quantizer = EMACodebook(8, 4, 0.99, 0.03, start=start)
    reads = []
    for _ in range(4):
        with HostReads() as mode:
            quantizer(torch.randn(64, 4))
        reads.append(mode.count)
    assert reads == ([1, 1, 0, 0] if start == "kmeans" else [0, 0, 0, 0])


def test_clusters_are_found_again_when_the_first_step_was_undone() -> None:
    quantizer = EMACodebook(8, 4, 0.99, 0.0, start="kmeans")
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    rows = torch.randn(64, 4)
    quantizer(rows)
    expected = quantizer.codebook.clone()
    for name, buffer in quantizer.named_buffers():
        buffer.copy_(before[name])
    quantizer(rows)
    assert torch.equal(quantizer.codebook, expected)


def test_a_linear_codebook_learns_by_gradient_and_its_fixed_codes_stay() -> None:
    quantizer = LinearCodebook(8, 4, 2, "straight_through")
    frozen = quantizer.frozen.clone()
    rows = (torch.randn(64, 4) * 3).requires_grad_()
    quantized = quantizer(rows)
    torch.testing.assert_close(quantized.latents, quantizer.embed(quantized.codes))
    torch.testing.assert_close(quantized.codebook_loss, quantized.commitment)
    commitment = quantized.commitment.mean()
    assert torch.autograd.grad(commitment, quantizer.transform, allow_unused=True, retain_graph=True) == (None,)
    losses = []
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for _ in range(30):
        loss = quantizer(rows).codebook_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(quantizer.frozen, frozen)


def test_the_rotation_trick_is_a_rotation_and_a_scaling() -> None:
    rows = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.randn(16, 5, dtype=torch.float64)
    passed = rotated(rows, chosen)
    torch.testing.assert_close(passed, chosen)
    jacobians = torch.autograd.functional.jacobian(lambda x: rotated(x, chosen), rows.detach())
    for row in range(16):
        scale = chosen[row].norm() / rows[row].norm()
        turn = jacobians[row, :, row] / scale
        torch.testing.assert_close(turn @ turn.T, torch.eye(5, dtype=torch.float64))
        assert torch.linalg.det(turn).item() == pytest.approx(1)


def test_counts_of_batches_add_up_to_those_of_the_whole() -> None:
    quantizer = codebook()
    rows = torch.randn(64, 4)
    quantizer(rows)
    quantizer.eval()
    parts = sum(quantizer(part).counts for part in rows.split(16))
    assert torch.equal(parts, quantizer(rows).counts)
    weight = torch.cat((torch.ones(32), torch.zeros(32)))
    assert torch.equal(quantizer(rows, weight).counts, quantizer(rows[:32]).counts)
