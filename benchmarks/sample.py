"""Measures how fast a prior is sampled.

Sizes: 6 layers x 288, 4 heads, 1,024 codes, clips of 4 x 16 x 16 latents, float32 on a CPU. All comparisons alternate
in one run:

    published   tokens/s of `generate`, divided by those of a plain implementation of the published sampler: one
                position after another, with keys and values of all layers concatenated at each, an L x L float mask,
                norms written out, and the codebook looked up and projected each time. Goal: 4 at batch 8
    gpt2        the same against transformers' GPT-2 of this shape, `generate` with its cache. Goal: 3 at batch 8, 2 at
                batch 1. Without transformers, a line says so and the ratio is null
    bandwidth   bytes that a step reads (weights, and the cache so far) times steps/s, divided by this machine's read
                bandwidth, measured by a sum over a large array. Goal: 0.6
    step        milliseconds of a step; of its matrix products alone, one after another in the layout and on the
                threads that decoding uses; and of reading its bytes at the measured bandwidth, which is the lower limit
    precision   tokens/s in bfloat16, divided by those in float32
    parallel    speed of the parallel decoder relative to the sequential one at batch 1, and its passes. The result
                depends on how well codes can be guessed, so give --prior with the URL of a trained export

Ratios are of wall time and, without a GPU, also of CPU time, which is more reliable on a busy machine. On a GPU (preset
100m, batches 1, 8, 64, 256), the goals are a bandwidth of 0.6 at batch 1 and 0.7 at the best batch, and a parallel
decoder 3 times as fast as the sequential one at batch 1.

    OMP_WAIT_POLICY=passive python benchmarks/sample.py [--rounds 3] [--threads 1] [--positions 1024] [--prior URL]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from published_prior import PlainBlock, PlainNorm
from timing import device_name, interleave, ratio
from torch import Tensor, nn

from clipmill.config import PriorModelConfig
from clipmill.models.decoding import CachedPrior
from clipmill.models.export import load_prior
from clipmill.models.prior import Prior
from clipmill.sampling.drawing import Drawing
from clipmill.sampling.filters import Filters
from clipmill.sampling.generate import generate
from clipmill.sampling.noise import Noise
from clipmill.sampling.parallel import decode_in_parallel

NUM_CODES, CODE_DIM = 1024, 256
SIZES = {"hidden_dim": 288, "num_heads": 4, "num_layers": 6, "dropout": 0.0, "attention_dropout": 0.0}


class CachedBlock(PlainBlock):
    """A block as the published code decodes with it: one position, the cache grows by concatenation."""

    def __init__(self, dim: int, num_heads: int, length: int) -> None:
        super().__init__(dim, num_heads, length)
        self.cache: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, position: int) -> Tensor:
        q, k, v = self.heads(x)
        if self.cache is not None:
            k, v = torch.cat((self.cache[0], k), 2), torch.cat((self.cache[1], v), 2)
        self.cache = k, v
        return self.mix(x, q, k, v, self.mask[position : position + 1, : position + 1])


class PlainSampler(nn.Module):
    """The published transformer and its loop over positions."""

    def __init__(self, length: int) -> None:
        super().__init__()
        dim = SIZES["hidden_dim"]
        self.length = length
        self.register_buffer("codebook", torch.randn(NUM_CODES, CODE_DIM))
        self.project = nn.Linear(CODE_DIM, dim, bias=False)
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.01)
        self.blocks = nn.ModuleList(CachedBlock(dim, SIZES["num_heads"], length) for _ in range(SIZES["num_layers"]))
        self.norm, self.head = PlainNorm(dim), nn.Linear(dim, NUM_CODES, bias=False)

    @torch.no_grad()
    def sample(self, batch_size: int) -> Tensor:
        for block in self.blocks:
            block.cache = None
        codes = torch.zeros(batch_size, self.length, dtype=torch.int64, device=self.start.device)
        x = self.start.expand(batch_size, 1, -1)
        for position in range(self.length):
            x = x + self.positions[position]
            for block in self.blocks:
                x = block.step(x, position)
            probabilities = self.head(self.norm(x))[:, 0].softmax(-1)
            codes[:, position] = torch.multinomial(probabilities, 1)[:, 0]
            x = self.project(F.embedding(codes[:, position : position + 1], self.codebook))
        return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; None: all cores")
    parser.add_argument("--positions", type=int, default=1024, help="codes of a clip, a multiple of 256")
    parser.add_argument("--batches", type=int, nargs="*", help="None: 1 and 8; on a GPU 1, 8, 64 and 256")
    parser.add_argument("--prior", help="URL of an export, to compare the decoders on")
    arguments = parser.parse_args()
    if arguments.positions % 256:
        parser.error(f"--positions {arguments.positions} is no multiple of 256")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    shape = (arguments.positions // 256, 16, 16)
    sizes = {"preset": "100m"} if cuda else {"style": "videogpt", **SIZES}
    prior = new_prior(PriorModelConfig.model_validate(sizes), shape, device)
    bandwidth = read_bandwidth(device)
    result: dict[str, Any] = {
        "benchmark": "sample",
        "device": device_name(),
        "positions": arguments.positions,
        "read_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "batches": {},
    }
    for batch_size in arguments.batches or ([1, 8, 64, 256] if cuda else [1, 8]):
        result["batches"][batch_size] = compare(prior, batch_size, bandwidth, arguments.rounds, cuda)
        print(batch_size, json.dumps(result["batches"][batch_size]), flush=True)
    if arguments.prior is not None:
        prior = load_prior(arguments.prior)[0].to(device)
    result["parallel"] = compare_decoders(prior, arguments.rounds, arguments.prior)
    print(json.dumps(result))


def new_prior(config: PriorModelConfig, shape: tuple[int, ...], device: torch.device) -> Prior:
    """A prior of random weights whose codes are spread."""
    prior = Prior(config, shape, NUM_CODES, torch.randn(NUM_CODES, CODE_DIM)).eval()
    nn.init.normal_(prior.head.weight, std=0.05)
    return prior.to(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 512 MiB reads, the best of ten."""
    data, best = torch.ones(2**27, device=device), math.inf
    for _ in range(10):
        began = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - began)
    return data.numel() * 4 / best


# ---------------------------------------------------------------------------------------------- comparisons


def compare(prior: Prior, batch_size: int, bandwidth: float, rounds: int, cuda: bool) -> dict[str, Any]:
    """Ours in both precisions against the published sampler and GPT-2, in turns."""
    samplers: dict[str, Callable[[], Any]] = {
        precision: lambda precision=precision: generate(prior, seed=0, indices=range(batch_size), precision=precision)
        for precision in ("float32", "bfloat16")
    }
    if not cuda:
        published = PlainSampler(prior.num_positions)
        samplers["published"] = lambda: published.sample(batch_size)
        gpt2 = gpt2_sampler(prior.num_positions, batch_size)
        if gpt2 is not None:
            samplers["gpt2"] = gpt2
    wall, cpu = interleave(samplers, rounds)
    tokens = batch_size * prior.num_positions
    facts: dict[str, Any] = {
        "tokens_per_second": {name: round(tokens / min(seconds), 1) for name, seconds in wall.items()},
        "bandwidth_share": {
            precision: round(bytes_read(prior, batch_size, size) / min(wall[precision]) / bandwidth, 3)
            for precision, size in (("float32", 4), ("bfloat16", 2))
        },
    }
    steps = prior.num_positions
    facts["step_milliseconds"] = {
        **{name: round(min(seconds) / steps * 1e3, 3) for name, seconds in wall.items()},
        "products_alone": round(products_seconds(prior, batch_size) * 1e3, 3),
        "bytes_at_bandwidth": round(bytes_read(prior, batch_size, 4) / steps / bandwidth * 1e3, 3),
    }
    for clock, seconds in (("", wall), ("_cpu", cpu)):
        if clock and cuda:
            continue
        facts[f"bfloat16_to_float32{clock}"] = ratio(seconds["float32"], seconds["bfloat16"])
        for other in ("published", "gpt2"):
            known = other in seconds
            facts[f"float32_to_{other}{clock}"] = ratio(seconds[other], seconds["float32"]) if known else None
    return facts


def products(cached: CachedPrior) -> list[Any]:
    """The linear layers of a step, in order."""
    return [part for layer in cached.layers for part in layer if hasattr(part, "weight")] + cached.heads


@torch.inference_mode()
def products_seconds(prior: Prior, batch_size: int) -> float:
    """Seconds that the products of a step take in float32 with nothing between them, the best of fifty."""
    linears = products(CachedPrior(prior, batch_size, None, None, torch.float32))
    device = prior.head.weight.device
    widths = [part.weight.shape[1 if part.weight.is_mkldnn else 0] for part in linears]
    inputs = [torch.randn(batch_size, width, device=device) for width in widths]
    best = math.inf
    for _ in range(50):
        began = time.perf_counter()
        for linear, x in zip(linears, inputs, strict=True):
            linear(x)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def bytes_read(prior: Prior, batch_size: int, element_bytes: int) -> float:
    """That all steps of a batch read: the weights, and of the cache the positions so far."""
    with torch.inference_mode():
        cached = CachedPrior(prior, 1, None, None, torch.float32)
    weights = sum(part.weight.numel() for part in products(cached))
    of_a_position = cached.cache[:, :, :, :, 0].numel() * batch_size
    length = prior.num_positions
    return element_bytes * (weights * length + of_a_position * length * (length + 1) / 2)


def gpt2_sampler(num_positions: int, batch_size: int) -> Callable[[], Any] | None:
    """transformers' GPT-2 of the same shape, sampling with its cache; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: GPT-2 is not compared")
        return None
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=NUM_CODES + 1,
        n_positions=num_positions + 1,
        n_embd=SIZES["hidden_dim"],
        n_layer=SIZES["num_layers"],
        n_head=SIZES["num_heads"],
        bos_token_id=NUM_CODES,
        eos_token_id=NUM_CODES,
    )
    model = GPT2LMHeadModel(config).eval()
    start = torch.full((batch_size, 1), NUM_CODES)
    settings = {"max_new_tokens": num_positions, "min_new_tokens": num_positions, "do_sample": True, "top_k": 0}
    mask = torch.ones_like(start)

    def sample() -> Tensor:
        with torch.inference_mode():
            return model.generate(start, attention_mask=mask, pad_token_id=NUM_CODES, **settings)

    return sample


def compare_decoders(prior: Prior, rounds: int, url: str | None) -> dict[str, Any]:
    """The two decoders at batch 1, in turns, and the passes of the parallel one."""
    label = torch.zeros(1, dtype=torch.int64) if prior.norms.num_classes else None
    samplers = {
        decoder: lambda decoder=decoder: generate(prior, seed=0, indices=[0], labels=label, decoder=decoder)
        for decoder in ("sequential", "parallel")
    }
    wall, cpu = interleave(samplers, rounds)
    with torch.inference_mode():
        device = prior.head.weight.device
        cached = CachedPrior(prior, 1, None if label is None else label.to(device), None, torch.float32)
        drawing = Drawing(prior, cached, 1, 1.0, Filters())
        drawing.begin(Noise(0, [0], prior.num_codes, device))
        num_passes = decode_in_parallel(drawing)
    return {
        "prior": url or "random weights",
        "positions": prior.num_positions,
        "passes": num_passes,
        "parallel_to_sequential": ratio(wall["sequential"], wall["parallel"]),
        "parallel_to_sequential_cpu": ratio(cpu["sequential"], cpu["parallel"]),
    }


if __name__ == "__main__":
    main()
