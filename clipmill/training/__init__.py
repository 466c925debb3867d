"""Training of the tokenizer and of the prior: one loop, one engine, exact resume."""

__all__: list[str] = []
