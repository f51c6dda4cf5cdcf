"""Make new model checkpoints out of old ones. Knows only its version: everything else is imported where it is used."""

__version__ = "0.1.0"
