"""Measures how fast the tokenizer trains and encodes, and the memory of its quantizer.

    train   time of a training step of a plain implementation of the published model (`published_vqvae.py`: one-hot
            codebook, contiguous layout, float32), divided by that of ours with the same sizes, optimizer and losses, in
            float32 and in bfloat16. Goal: 1.5
    encode  the same for clips -> codes, as in `clipmill tokenize`. Goal: 1.3
    memory  peak memory of a training forward pass of the quantizer for growing N rows and K codes. Goal: O(N + K), so
            doubling both at most doubles it
    scale   on CUDA only: training at the paper's BAIR and UCF-101 settings in bfloat16, compiled: clips/s, achieved
            TFLOP/s and their share of the device's peak. Goal: 40 %

The models alternate step by step in one process. Ratios are medians over rounds, in wall time and in CPU time, which is
more reliable on a shared machine.

    python benchmarks/vqvae.py [--rounds 4] [--batch 4] [vqvae.model.hidden_dim=128 vqvae.model.downsample=[2,2,2]]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from published_vqvae import Codebook, PublishedVQVAE
from timing import device_name, interleave, ratio
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from clipmill.config import VQVAEModelConfig, identity, load_config
from clipmill.models.export import load_vqvae, save_export
from clipmill.models.quantizers import EMACodebook
from clipmill.models.vqvae import VQVAE
from clipmill.training.throughput import peak_flops

PIXEL_VARIANCE = 0.06
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"narrow": ["vqvae.model.hidden_dim=64"], "paper": []}
"""What is compared: 64 channels, and the published 240."""
PAPER = {"bair": ((2, 2, 2), 64), "ucf101": ((4, 4, 4), 128)}
"""Downsampling and resolution of the paper's data sets; clips have 16 frames, other sizes are the defaults."""
QUANTIZER_SIZES = [(2**14, 2**10), (2**15, 2**10), (2**14, 2**11), (2**15, 2**11), (2**16, 2**12)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "assignments", nargs="*", help="vqvae.model.KEY=VALUE: sizes of your own, not ours and the paper's"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32 if DEVICE.type == "cuda" else 4, help="clips of a step")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=64)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "vqvae", "device": device_name(), "rounds": arguments.rounds, "compare": {}}
    clip = (3, arguments.frames, arguments.resolution, arguments.resolution)
    for name, sizes in ({"yours": arguments.assignments} if arguments.assignments else SIZES).items():
        config = load_config([], ["root=none", "vqvae.model.num_codes=1024", *sizes]).vqvae.model
        print(f"{name}: {config.hidden_dim} channels, stride {config.downsample}, {arguments.batch} clips {clip}")
        video = torch.rand(arguments.batch, *clip, device=DEVICE) - 0.5
        result["compare"][name] = compare(config, video, arguments.rounds)
    result["quantizer_memory"] = quantizer_memory(config.embedding_dim)
    if DEVICE.type == "cuda":
        result["scale"] = {name: train_at_scale(name, arguments.batch, arguments.rounds) for name in PAPER}
    print(json.dumps(result))


# --------------------------------------------------------------------------------- ours against the published one


def compare(config: VQVAEModelConfig, video: Tensor, rounds: int) -> dict[str, Any]:
    """Times of training steps and encodings, and the ratios of the published model's to ours in each precision."""
    models = {
        "published": PublishedVQVAE(config, PIXEL_VARIANCE),
        "float32": VQVAE(config, PIXEL_VARIANCE),
        "bfloat16": VQVAE(config, PIXEL_VARIANCE),
    }
    # The published attentions add three biases where ours have their sum.
    parameters = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    trained = interleave({name: train_step(model.to(DEVICE), video, name) for name, model in models.items()}, rounds)
    encoders = {name: as_loaded(model) if isinstance(model, VQVAE) else model for name, model in models.items()}
    encoded = interleave({name: encoding(model.eval(), video, name) for name, model in encoders.items()}, 2 * rounds)
    result: dict[str, Any] = {"model": config.model_dump(mode="json", exclude_defaults=True), "parameters": parameters}
    result["clips"] = list(video.shape)
    for what, (wall, cpu) in (("train", trained), ("encode", encoded)):
        medians = {name: round(statistics.median(durations), 4) for name, durations in wall.items()}
        result[what] = {"seconds": medians, "published_to_ours": {}, "published_to_ours_in_cpu_seconds": {}}
        for name in ("float32", "bfloat16"):
            in_wall, in_cpu = (ratio(clock["published"], clock[name]) for clock in (wall, cpu))
            result[what]["published_to_ours"][name] = in_wall
            result[what]["published_to_ours_in_cpu_seconds"][name] = in_cpu
            print(
                f"{what}, {name}: {medians[name] * 1e3:.0f} ms ({len(video) / medians[name]:.2f} clips/s), published "
                f"{medians['published'] * 1e3:.0f} ms: {in_wall} times as fast, in CPU seconds {in_cpu}"
            )
    return result


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def train_step(model: nn.Module, video: Tensor, precision: str) -> Callable[[], None]:
    """Forward, backward and optimizer, without a loop around them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, fused=DEVICE.type == "cuda")

    def step() -> None:
        with autocast(precision):
            output = model(video)
        (output if isinstance(output, Tensor) else output.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def as_loaded(model: VQVAE) -> VQVAE:
    """The model as `clipmill tokenize` loads it from its export."""
    body = {"kind": "vqvae", "model": identity(model.config), "pixel_variance": PIXEL_VARIANCE}
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        save_export(folder, model, body)
        return load_vqvae(folder)[0].to(DEVICE)


def encoding(model: nn.Module, video: Tensor, precision: str) -> Callable[[], Tensor]:
    """Clips -> codes."""

    @torch.inference_mode()
    def encode() -> Tensor:
        with autocast(precision):
            return model.encode(video)

    return encode


# ------------------------------------------------------------------------------------------ memory of the quantizer


def quantizer_memory(dim: int) -> dict[str, Any]:
    """Peaks of both quantizers, in MiB, while rows and codes grow."""
    table = []
    for num_rows, num_codes in QUANTIZER_SIZES:
        rows = torch.randn(num_rows, dim, device=DEVICE)
        ours = EMACodebook(num_codes, dim, decay=0.99, restart_share=0.03).to(DEVICE)
        entry = {"rows": num_rows, "codes": num_codes, "ours_mib": peak_mib(lambda: ours(rows))}  # noqa: B023
        if num_rows * num_codes <= 2**25:  # beyond, the published one takes gigabytes
            published = Codebook(num_codes, dim, decay=0.99).to(DEVICE)
            entry["published_mib"] = peak_mib(lambda: published(rows.view(1, -1, 1, 1, dim).movedim(-1, 1)))  # noqa: B023
        print("quantizer: " + ", ".join(f"{name} {value:,}" for name, value in entry.items()))
        table.append(entry)
    by_size = {(entry["rows"], entry["codes"]): entry["ours_mib"] for entry in table}
    growth = {
        f"{n} x {k}": round(by_size[2 * n, 2 * k] / peak, 2)
        for (n, k), peak in by_size.items()
        if (2 * n, 2 * k) in by_size
    }
    print(f"quantizer: doubling rows and codes multiplies the peak by {growth} (2: O(N + K), 4: O(N K))")
    return {"dim": dim, "peaks": table, "growth_when_both_double": growth}


def peak_mib(run: Callable[[], Any]) -> float:
    """Most memory that tensors take at once while ``run`` runs, beyond what they took before."""
    run()  # what is only made once (the first codes) is no part of it
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return round(peak / 2**20, 1)


# ----------------------------------------------------------------------------------------- at the paper's settings


def train_at_scale(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Rate of compiled bfloat16 training, and what share of the device it uses."""
    downsample, resolution = PAPER[name]
    model = VQVAE(VQVAEModelConfig(num_codes=1024, downsample=downsample), PIXEL_VARIANCE).to(DEVICE)
    video = torch.rand(batch, 3, 16, resolution, resolution, device=DEVICE) - 0.5
    with FlopCounterMode(display=False) as counter:
        train_step(model, video, "bfloat16")()
    for block in model.blocks:
        block.compile()
    seconds = interleave({name: train_step(model, video, "bfloat16")}, rounds)[0][name]
    median = statistics.median(seconds)
    tflops = counter.get_total_flops() / median / 1e12
    peak = (peak_flops(device_name(), "bfloat16") or math.nan) / 1e12
    print(
        f"{name}: {batch / median:.1f} clips/s, {median * 1e3:.0f} ms a step of {batch} clips, {tflops:.0f} TFLOP/s, "
        f"{tflops / peak:.1%} of a peak of {peak:g}"
    )
    return {
        "clips_per_second": round(batch / median, 2),
        "seconds_per_step": round(median, 4),
        "tflops": round(tflops, 1),
        "peak_tflops": None if math.isnan(peak) else peak,
        "share_of_peak": None if math.isnan(peak) else round(tflops / peak, 4),
    }


if __name__ == "__main__":
    main()
