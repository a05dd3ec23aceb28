"""The embedded miniature: an invented town, its tokenizer, and the two models that are trained on it."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
