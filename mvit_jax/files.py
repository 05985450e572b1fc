"""Files are written whole or not at all."""

import os
from pathlib import Path

from mvit_jax.errors import UserError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes under another name in the same folder, then renames; text as UTF-8.

    Raises:
      UserError: the file cannot be written; whatever was there before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
