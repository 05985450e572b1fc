"""Paths that people name, here or in a bucket; and files, which are written whole or not at all.

A path in a bucket, gs://BUCKET/FOLDER, is one of etils' `epath`. It has those of pathlib's methods
that are used on a run's folder; its files are objects, each of which appears when all of it has
arrived, and to which nothing can be appended. Four libraries go there, with one account,
Google's application default credentials: TensorFlow for files, TensorStore for arrays, and of
Google's clients that of storage, with which Orbax asks what kind of bucket it is.
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

# What `to_path` gives: to a type checker a path like any other; `epath`, which takes a while to
# import, derives from pathlib's pure paths.
if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = PurePath

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ROLES = "roles/storage.objectUser and roles/storage.legacyBucketReader"
_SECONDS = 60  # in which a bucket must answer


def to_path(named: str | os.PathLike[str]) -> AnyPath:
    """What somebody has named: a path here, or, where it begins with gs://, one in a bucket.

    Raises:
      UserError: it is another kind of address, or the bucket cannot be reached or used.
    """
    if isinstance(named, PurePath) and not isinstance(named, Path):
        return named  # pyright: ignore[reportReturnType]  # it comes from here
    text = os.fspath(named)
    if not _ADDRESS.match(text):
        return Path(named)
    bucket = text.removeprefix("gs://").partition("/")[0]
    if not text.startswith("gs://") or not bucket:
        raise UserError(f"{text} is neither a folder nor in a bucket: name DIR or gs://BUCKET/DIR")
    _reach(bucket)
    from etils import epath

    return epath.Path(text)  # pyright: ignore[reportReturnType]


def local_path(named: str) -> Path:
    """A path here.

    Raises:
      UserError: it is an address, of which pathlib would make a folder of that name.
    """
    if _ADDRESS.match(named):
        raise UserError(f"{named} is written here alone: name a folder or a file, and copy it then")
    return Path(named)


def is_local(path: AnyPath) -> bool:
    return isinstance(path, Path)


def faults() -> tuple[type[Exception], ...]:
    """What a path's methods raise where it cannot be read or written: for `except`."""
    tensorflow = sys.modules.get("tensorflow")  # whose errors are no `OSError`s
    return (OSError,) if tensorflow is None else (OSError, tensorflow.errors.OpError)


def why(fault: Exception) -> str:
    """What one of the `faults` says, in a few words."""
    words = getattr(fault, "strerror", None) or str(fault).partition(" with body '")[0].strip()
    words = re.sub(r"^\{\{function_node .*?\}\} ", "", words)  # TensorFlow's, of its own
    return words.partition("\n")[0] or type(fault).__name__


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes under another name in the same folder, then renames; text as UTF-8.

    Raises:
      UserError: the file cannot be written; whatever was there before is still there.
    """
    path = to_path(path)
    content = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        try:
            path.write_bytes(content)
        except faults() as error:
            raise UserError(f"{path} cannot be written ({why(error)})") from None
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not be there, nor its folder
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror})") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """For programs that write after hours of work: what `write_whole` would complain of at the end.

    Raises:
      UserError: there is no folder for the file, or it cannot be written.
    """
    path = local_path(os.fspath(path))
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: make the folder {path.parent} first")
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder, give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is not writable")


@functools.cache  # what was raised is not kept
def _reach(bucket: str) -> None:
    """Returns where a bucket can be read: else each library would fail in its own words."""
    # TensorFlow prints lines about processors and oneDNN otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

        # Orbax wants the second one in buckets with a hierarchical namespace.
        from google.cloud import storage, storage_control_v2  # noqa: F401
        from google.cloud.storage.retry import DEFAULT_RETRY

        if importlib.util.find_spec("tensorflow") is None:
            raise ImportError
    except ImportError:
        raise UserError(
            f"gs://{bucket} needs Google's clients and TensorFlow: pip install -e '.[gcs]'"
        ) from None
    mend = "check the network, and GOOGLE_CLOUD_PROJECT"
    try:
        client = storage.Client()
        retry = DEFAULT_RETRY.with_timeout(_SECONDS)
        client.get_bucket(bucket, retry=retry)  # as Orbax does
        next(iter(client.list_blobs(bucket, max_results=1, retry=retry)), None)
        return
    except NotFound:
        raise UserError(
            f"there is no bucket gs://{bucket}: check its name, or make it (gcloud storage buckets "
            f"create gs://{bucket})"
        ) from None
    except (Forbidden, Unauthorized) as error:
        problem, mend = error.message, f"give this account {_ROLES} on it"
    except DefaultCredentialsError as error:
        problem, mend = str(error), "gcloud auth application-default login"
    except (GoogleAPIError, GoogleAuthError, OSError) as error:
        problem = str(error)
    problem = " ".join(problem.split())[:300].rstrip(". ")
    raise UserError(f"the bucket gs://{bucket} cannot be used ({problem}): {mend}")
