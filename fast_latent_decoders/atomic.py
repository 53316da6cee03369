"""Writing files whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FileError(ValueError):
    """A file that cannot be read or written. The message is one sentence that names the file and what to do."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line and without the file name that OSError repeats."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(said.split())


@contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary name in `path`'s folder: it becomes `path` when the block ends well, and is removed when it does not.

    Raises:
        FileError: `path` exists and `force` is not given, or the folder cannot be written to or is full.
    """
    if path.exists() and not force:
        raise FileError(f"{path} is already there; pass force (--force) to replace it")
    # Short, so that the longest name a folder allows still works; hidden, so that no command takes it for an input.
    temporary = path.with_name(f".fld-{uuid.uuid4().hex[:12]}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {reason(error)}") from error
    finally:
        with suppress(OSError):  # the folder itself is unusable, and that has been said
            temporary.unlink(missing_ok=True)
