"""PIT and SRT, two ways to teach a language model to improve its own answers, in JAX."""

__version__ = "0.1.0"
