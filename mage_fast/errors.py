"""The errors a user can cause, each with a one-line message: the command line prints it and exits with 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong; the message names argument or file, got and wanted."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, does not fit the model, or could not be written."""


class TrainingError(RuntimeError):
    """Training cannot go on, for instance because the loss is not finite."""
