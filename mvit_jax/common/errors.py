"""User-facing errors, and the entry and exit of the command-line programs."""

import io
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from mvit_jax.common import extras

renamed_keys: dict[str, tuple[str, str]] = {}
"""Renamed config keys, filled by `config`: last part of the old key to (old key, new key)."""


class UserError(ValueError):
    """An error that the user can fix; its message states what is wrong, where, and what to do."""


class MissingDataError(UserError):
    """A `UserError` for data that are not there: no folder, no list, or no prepared data set."""


class HungError(UserError):
    """A `UserError` raised while threads hang, which would block the interpreter's exit."""


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs an absl program; prints a `UserError` as one sentence and exits with status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may have bytes, and classes characters, that the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _guarded(main: Callable[[list[str]], Any], argv: list[str]) -> Any:
    # Orbax logs every file that it renames; --verbosity=0 shows these lines.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        with extras.explained():
            return main(argv)
    except HungError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_at_once(1)
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def lock(config: Any) -> None:
    """Locks the config; raises `UserError` if its file could not be loaded."""
    from ml_collections import config_flags

    try:
        config.lock()
    except OSError:  # raised by config_flags' placeholder for the config
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(f"there is no config file {path}: check --config") from None


def exit_at_once(status: int) -> NoReturn:
    """Kills child processes and exits at once, without joining threads or running exit handlers."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(status)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; prints errors in flags and configs as one sentence and exits."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # An exception in a config file arrives as a traceback; its last line is the message.
        message = str(error).strip().splitlines()[-1].strip()
        _end(re.sub(r"^[\w.]*(Error|Exception): ", "", message))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = str(error.args[0] if error.args else error)
        suggestion = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', message)
        if suggestion:
            _end_unknown(suggestion[2], suggestion[1])
        locked = r'.*Key "(\w+)" does not exist.*'  # in a config file
        if unknown := re.fullmatch(r"""["']+(\w+)["']+|""" + locked, message, re.DOTALL):
            _end_unknown(unknown[1] or unknown[2])
        _end(message.replace("\n", " "))
    except OSError as error:
        # For a missing file, the message of config_flags lists all paths that were tried.
        name = error.filename or re.sub(r"(?s).*Attempted.*?\n\s+(\S+)\n.*", r"\1", str(error))
        _end(f"{name} cannot be read: check --config")


def _end_unknown(key: str, similar: str | None = None) -> NoReturn:
    """Ends the program: no config key has the last part `key`."""
    if key in renamed_keys:
        old, new = renamed_keys[key]
        _end(f"the config key {old} is now called {new}")
    hint = f"did you mean {similar!r}?" if similar else "mvit_jax/config.py lists all keys"
    _end(f"there is no config key {key!r}; {hint}")


def _end(problem: object) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr, flush=True)
    sys.exit(1)
