"""What can go wrong for a user, in one line each.

Every exception that a bad input can cause is one of these.  Its text is a single line: what is wrong, where (file, row,
key) and what to do.  The command line prints that line and ends with exit code 2; nothing else of minilora catches them.
Note text is patient data: no message quotes it.
"""
from __future__ import annotations


class MiniloraError(Exception):
    """Base of the package's errors; ``str(error)`` is one line for the user."""


class DataError(MiniloraError):
    """A table of notes is missing, malformed, or lacks a column, a label or rows."""


class CheckpointError(MiniloraError):
    """A model folder, weight file, tokenizer, adapter or 4-bit state cannot be used."""


class ConfigError(MiniloraError):
    """A hyper-parameter, flag or run.toml entry is out of its range or contradicts another."""


class HubError(MiniloraError):
    """A hub id cannot be turned into files: offline, missing, gated, wrong token or revision."""


class OutputError(MiniloraError):
    """An output exists already, is in use by another run, or cannot be written."""


class QuantizationError(MiniloraError, ValueError):
    """A tensor cannot be quantized: not finite, not floating point, or an impossible block size."""
