"""Files that appear whole or not at all, and take no other's place unless they are told to."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_free", "written"]


def check_free(path: Path, force: bool) -> None:
    """Check that a file may be written, before there is any work.

    Raises:
        OSError: if it is there already, unless ``force`` is given and it is a file; or if there is no folder for it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
    if os.path.lexists(path):
        if not path.is_file():
            raise FileExistsError(errno.EEXIST, "is there already, and is no file; name another", str(path))
        if not force:
            raise FileExistsError(errno.EEXIST, "is there already; --force overwrites it", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder; make it first", str(path.parent))


@contextmanager
def written(path: Path, force: bool, end: str = "") -> Iterator[Path]:
    """Yield a path beside another, with this ``end``: the file takes that name when the block has ended well, or goes.

    Raises:
        OSError: as by :func:`check_free`, also if the file has come to be meanwhile.
    """
    check_free(path, force)
    path = Path(os.path.realpath(path))  # a link stays, and what it points to is written
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.tmp{end}")
    try:
        yield temporary
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        if force:
            temporary.replace(path)
        else:
            _take_free_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _take_free_name(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)  # which, unlike a renaming, fails if the name is taken
    except FileExistsError:
        check_free(path, force=False)
        raise
    except OSError:  # a file system without links
        check_free(path, force=False)
        temporary.replace(path)
