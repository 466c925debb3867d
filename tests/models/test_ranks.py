"""Several gloo ranks against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipmill.config import VQVAEModelConfig
from clipmill.models.ranks import GlobalBatchNorm
from clipmill.models.vqvae import VQVAE
from tests.models.processes import run_ranks

State = dict[str, torch.Tensor]
CONFIG = VQVAEModelConfig(hidden_dim=8, num_res_layers=1, embedding_dim=4, num_codes=64, downsample=(2, 2, 2))


def whole_batch(step: int) -> torch.Tensor:
    return torch.rand(8, 3, 4, 8, 8, generator=torch.Generator().manual_seed(step)) - 0.5


def train(rank: int, world_size: int, num_steps: int) -> tuple[list[float], State]:
    """Loss of each step, averaged over ranks, and the state at the end."""
    torch.manual_seed(0)
    model = VQVAE(CONFIG, pixel_variance=0.06)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for step in range(num_steps):
        output = model(whole_batch(step).chunk(world_size)[rank])
        optimizer.zero_grad()
        output.loss.backward()
        loss = output.loss.detach()
        if world_size > 1:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world_size
            torch.distributed.all_reduce(loss)
        optimizer.step()
        losses.append(loss.item() / world_size)
    return losses, model.state_dict()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_as_one_process_does(world_size: int, tmp_path: Path) -> None:
    alone_losses, alone = train(0, 1, 4)
    ranks = run_ranks(train, world_size, tmp_path, 4)
    for losses, state in ranks:
        assert losses == pytest.approx(alone_losses, rel=1e-5)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5, msg=name)
    for _, state in ranks[1:]:  # the codebook is one: bit for bit
        for name in ("codebook", "counts", "sums", "num_updates"):
            assert torch.equal(state[f"quantizer.{name}"], ranks[0][1][f"quantizer.{name}"])


def normalise(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, State]:
    """Output and input gradient of a norm over inputs with a large mean and a different scale in each rank."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([1.0, 30.0]).repeat_interleave(2).view(4, 1, 1, 1, 1)
    x = (torch.randn(4, 6, 2, 3, 3, generator=generator) * scale + 100).requires_grad_()
    direction = torch.randn(4, 6, 2, 3, 3, generator=generator)
    norm = GlobalBatchNorm(6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6, generator=generator) + 0.5)
    mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    y = norm(x[mine])
    (y * direction[mine]).sum().backward()
    return y.detach(), x.grad[mine], norm.state_dict()


def test_batch_norm_is_the_whole_batchs(tmp_path: Path) -> None:
    y, grad, state = normalise(0, 1)
    results = run_ranks(normalise, 2, tmp_path)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), grad, rtol=1e-4, atol=1e-6)
    for _, _, rank_state in results:
        for name, tensor in rank_state.items():
            torch.testing.assert_close(tensor, state[name], msg=name)


def test_batch_norm_in_eval_uses_its_running_statistics() -> None:
    norm, reference = GlobalBatchNorm(3), torch.nn.BatchNorm3d(3)
    x = torch.randn(4, 3, 2, 2, 2) * 3 + 1
    torch.testing.assert_close(norm(x), reference(x))
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x))
