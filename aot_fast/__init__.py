"""aot_fast: Adversarial Opponent Training of vision-language models (arXiv 2602.22227), the whole game."""

__version__ = "0.1.0"
