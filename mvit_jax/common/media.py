"""Opening of media files with the arguments that the installed PyAV has."""

import io
from typing import Any

import av
from av.container import InputContainer

# Metadata in an unknown encoding must not make a video unreadable. PyAV 19 keeps such bytes.
_ARGUMENTS: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


def open_media(file: str | io.BytesIO) -> InputContainer:
    """Opens a media file, or one in memory, for reading; raises PyAV's error if it cannot."""
    return av.open(file, "r", **_ARGUMENTS)
