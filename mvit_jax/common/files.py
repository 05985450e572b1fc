"""Local paths, paths in Google Cloud Storage, and atomic writes.

A path in a bucket, gs://BUCKET/FOLDER, is an `etils.epath.Path`. It has the pathlib methods that
the package uses on a workdir. A file in a bucket is an object: it appears once its upload is
complete, and nothing can be appended to it. All access uses one account, Google's application
default credentials. Files are accessed through TensorFlow, arrays through TensorStore. Orbax also
queries the type of the bucket, through Google's storage clients.
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from mvit_jax.common.errors import UserError
from mvit_jax.common.extras import pip_line

# Type of the paths that `to_path` returns. `epath.Path` is a `PurePath` with the methods of `Path`.
# As importing `epath` is slow, type checkers get `Path`.
if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = PurePath

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ROLES = "roles/storage.objectUser and roles/storage.legacyBucketReader"
_TIMEOUT = 60  # seconds, of a request to a bucket


def to_path(path: str | os.PathLike[str]) -> AnyPath:
    """Returns a local path, or a path in a bucket if `path` begins with gs://.

    A leading `~` of a local path is the user's home, as in `expanded`.

    Raises:
      UserError: `path` is another kind of address, or its bucket cannot be reached or used.
    """
    text = os.fspath(path)
    opened = isinstance(path, PurePath) and not isinstance(path, Path) and hasattr(path, "exists")
    if opened and (_ADDRESS.match(text) or PurePath(text).is_absolute()):
        return path  # pyright: ignore[reportReturnType]  # an earlier result of this function
    if not _ADDRESS.match(text):
        return expanded(text)
    bucket = text.removeprefix("gs://").partition("/")[0]
    if not text.startswith("gs://") or not bucket:
        raise UserError(
            f"{text} is neither a local folder nor in a bucket: give a local folder or gs://BUCKET/DIR"
        )
    _check_bucket(bucket)
    from etils import epath

    return epath.Path(text)  # pyright: ignore[reportReturnType]


def local_path(path: str) -> Path:
    """Returns a path on this machine, `expanded`.

    Raises:
      UserError: `path` is an address, which pathlib would take for a local folder.
    """
    if _ADDRESS.match(path):
        raise UserError(
            f"{path} is not a local path: name a folder or file on this machine, and copy it later"
        )
    return expanded(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Returns a local path with a leading `~` or `~name` replaced by that user's home, if known.

    Shells expand `~` at the start of a word only, so not in `--workdir=~/runs`. A folder called `~`
    is written as `./~`.
    """
    home = Path(os.path.expanduser(path))  # noqa: PTH111, pathlib raises for an unknown user
    # pathlib drops the "./" of such a folder, and later calls would expand it.
    return home.absolute() if str(home).startswith("~") else home


def is_local(path: AnyPath) -> bool:
    return isinstance(path, Path)


def io_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading or writing a path may raise, for use in `except`."""
    tensorflow = sys.modules.get("tensorflow")  # its errors do not derive from `OSError`
    return (OSError,) if tensorflow is None else (OSError, tensorflow.errors.OpError)


def describe_error(error: Exception) -> str:
    """Returns the reason for a failed read or write in a few words, from the exception."""
    reason = getattr(error, "strerror", None) or str(error).partition(" with body '")[0].strip()
    reason = re.sub(r"^\{\{function_node .*?\}\} ", "", reason)  # TensorFlow's prefix
    return reason.partition("\n")[0] or type(error).__name__


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8.

    Bytes that are not UTF-8, as in names of files, are written as escapes. A local file is written
    under a temporary name in the same folder, then renamed.

    Raises:
      UserError: the file cannot be written; an earlier file at `path` stays unchanged.
    """
    path = to_path(path)
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    if not is_local(path):
        try:
            path.write_bytes(content)
        except io_errors() as error:
            raise UserError(f"{path} cannot be written ({describe_error(error)})") from None
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the file or its folder may not exist
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks that the local file `path` can be written, before hours of work.

    Raises:
      UserError: the folder of the file does not exist, or the file cannot be written.
    """
    path = local_path(os.fspath(path))
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: make the folder {path.parent} first")
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder, name a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is not writable")


@functools.cache  # exceptions are not cached
def _check_bucket(bucket: str) -> None:
    """Raises `UserError` if a bucket cannot be read, in place of each library's own error."""
    # Silences TensorFlow's lines about CPU features and oneDNN.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

        # Orbax needs storage_control_v2 for buckets with a hierarchical namespace.
        from google.cloud import storage, storage_control_v2  # noqa: F401
        from google.cloud.storage.retry import DEFAULT_RETRY

        if importlib.util.find_spec("tensorflow") is None:
            raise ImportError
    except ImportError:
        raise UserError(
            f"gs://{bucket} needs Google's clients and TensorFlow: {pip_line('gcs')}"
        ) from None
    advice = "check the network, and GOOGLE_CLOUD_PROJECT"
    try:
        client = storage.Client()
        retry = DEFAULT_RETRY.with_timeout(_TIMEOUT)
        client.get_bucket(bucket, retry=retry)  # as Orbax does
        next(iter(client.list_blobs(bucket, max_results=1, retry=retry)), None)
        return
    except NotFound:
        raise UserError(
            f"there is no bucket gs://{bucket}: check its name, or make it (gcloud storage buckets "
            f"create gs://{bucket})"
        ) from None
    except (Forbidden, Unauthorized) as error:
        problem, advice = error.message, f"give this account {_ROLES} on it"
    except DefaultCredentialsError as error:
        problem, advice = str(error), "gcloud auth application-default login"
    except (GoogleAPIError, GoogleAuthError, OSError) as error:
        problem = str(error)
    problem = " ".join(problem.split())[:300].rstrip(". ")
    raise UserError(f"the bucket gs://{bucket} cannot be used ({problem}): {advice}")
