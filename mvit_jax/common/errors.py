"""The one exception that is meant for people, and how programs start and end."""

import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

renamed_keys: dict[str, str] = {}
"""New names of config keys by the last part of their old ones (`config.RENAMED`)."""


class UserError(ValueError):
    """Something that the user can mend: says what is wrong, where, and what to do."""


class HungError(UserError):
    """Something in this process hangs, and Python would wait for its threads at exit."""


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs an absl program; a `UserError` ends it with one sentence and exit status 1."""
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _guarded(main: Callable[[list[str]], Any], argv: list[str]) -> Any:
    # Orbax tells of every file that it renames; --verbosity=0 brings that back.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        return main(argv)
    except HungError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(1)
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def lock(config: Any) -> None:
    """Has the value of --config take no new keys; one sentence where its file cannot be loaded."""
    from ml_collections import config_flags

    try:
        config.lock()
    except OSError:  # what config_flags keeps of a file that it could not load
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(f"there is no config file {path}: check --config") from None


def leave(status: int) -> NoReturn:
    """Ends without waiting for threads, and ends the processes that nothing else would end then."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(status)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with one, or with a config, is one sentence too."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # An exception inside a config file arrives as a printed traceback: its last line says it.
        _end(re.sub(r"^[\w.]*(Error|Exception): ", "", str(error).strip().splitlines()[-1].strip()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = str(error.args[0] if error.args else error)
        meant = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', message)
        unknown = re.fullmatch(r"""["']+(\w+)["']+""", message)
        key = meant[2] if meant else unknown[1] if unknown else ""
        if key in renamed_keys:
            _end(f"the config key {key!r} is now called {renamed_keys[key]}")
        if meant:
            _end(f"there is no config key {meant[2]!r}; did you mean {meant[1]!r}?")
        if unknown:
            _end(f"there is no config key {unknown[1]!r}; mvit_jax/config.py lists them all")
        _end(message.replace("\n", " "))
    except OSError as error:
        _end(f"{error.filename or error} cannot be read: check --config")


def _end(problem: object) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr, flush=True)
    sys.exit(1)
