"""Directories of files that appear together."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path


@contextmanager
def appearing(target: Path, stale: tuple[str, ...] = (), last: str = "") -> Iterator[Path]:
    """A directory beside the target, whose files take their place there when all went well.

    A target that is missing or empty appears whole, by one rename. Otherwise the files are moved one by one, when all
    of them are written.

    Args:
        target: created if it is missing, with its parents.
        stale: globs over the names of older files in the target that do not belong with the new ones.
        last: the name of the file that says what the others are: it is moved behind them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        if target.is_dir() and any(target.iterdir()):
            names = sorted((path.name for path in partial.iterdir()), key=lambda name: name == last)
            old = [p for p in target.iterdir() if p.name not in names and any(fnmatchcase(p.name, s) for s in stale)]
            for name in names:
                os.replace(partial / name, target / name)
            for path in old:
                path.unlink()
        else:
            partial.chmod(0o777 & ~_umask())
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
