"""The error of everything that is wrong with a file."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A file that is damaged, is no checkpoint, or does not fit; nothing was changed."""
