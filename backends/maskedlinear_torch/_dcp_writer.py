"""A writer of distributed checkpoints that may be killed at any time, in the folder of an earlier one too."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

__all__ = ["AtomicFileSystemWriter"]


class AtomicFileSystemWriter(FileSystemWriter):
    """Writes a checkpoint beside the one that a folder has, and exchanges the list of what belongs to it at once."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = _Replacing()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse what has a list of its own for each process: those cannot be exchanged at once."""
        if not kwargs.get("use_collectives", True):
            raise ValueError(
                "a checkpoint is exchanged at once by the process that coordinates; got use_collectives=False: save with "
                "use_collectives=True, or with torch's FileSystemWriter into a new folder"
            )
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Plan without the warning that an earlier checkpoint will be overwritten: it is kept until this one is there."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected an existing checkpoint")
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Write into files that no other save has written, or will."""
        prefix: Any = plan.storage_data
        own = replace(prefix, prefix=f"__{uuid4().hex}{prefix.prefix}")
        return super().write_data(replace(plan, storage_data=own), planner)

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Exchange the list of what belongs to the checkpoint, and then remove what does not: of earlier saves, killed or
        whole."""
        folder = Path(self.path)
        _to_disk(folder)
        super().finish(metadata, results)
        _to_disk(folder)
        named = {info.relative_path for info in metadata.storage_data.values()}
        for path in folder.glob("*.distcp"):
            if path.name not in named:
                path.unlink(missing_ok=True)


class _Replacing(FileSystem):
    """Files in which a rename takes the place of what is there, in one step; torch removes that before."""

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        pass

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        Path(path).replace(new_path)


def _to_disk(folder: Path) -> None:
    """Have the names of a folder's files on the disk, where folders can be asked that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
