"""ZeRO: all code that depends on DeepSpeed, and on its layout of weights, gradients, states and checkpoints."""

__all__: list[str] = []
