"""ZeRO: what knows DeepSpeed, and how it lays out weights, gradients, optimizer states and checkpoints."""

__all__: list[str] = []
