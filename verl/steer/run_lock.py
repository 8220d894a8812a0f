# SPDX-License-Identifier: Apache-2.0
"""One training at a time in a folder: a second start would delete the checkpoint that the first is writing."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

#: File in `trainer.default_local_dir`, which the program that trains there keeps locked.
LOCK = ".lock"


def lock_folder(folder: Path) -> TextIO:
    """Lock `trainer.default_local_dir` until the file that is returned is closed, or this process ends in any way.

    A file system without locks, as some of clusters are, gives a warning and no lock.

    Raises:
        ValueError: if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"trainer.default_local_dir={folder}: a training runs in it; expected another trainer.experiment_name or "
            "OUTPUT_DIR"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no other training in this folder", folder, error.strerror)
    return file
