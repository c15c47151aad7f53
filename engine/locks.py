"""One process at a time in a folder, by a lock on a file of it. Nothing here loads torch.

POSIX locks: they end with their process, however that ends, and loader processes do not inherit them. On a file system
that has none, folders are used without.
"""

import fcntl
import os

from engine.errors import UserError

_HELD = {}  # path -> its open file; to close any file of that path gives up the lock


def lock(path):
    """Hold the file `path`, made where it is missing, until unlock(path) or the process's end.

    Raises UserError where another process holds it. To hold it twice is to hold it.
    """
    path = os.path.realpath(path)
    if path in _HELD and os.path.exists(path) and os.path.samestat(os.fstat(_HELD[path].fileno()), os.stat(path)):
        return
    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{os.path.dirname(path)} is in use by another process: wait for its end") from None
    except OSError:  # no locks here
        pass
    _HELD[path] = file


def unlock(path):
    """Give up a lock; no harm where there is none."""
    held = _HELD.pop(os.path.realpath(path), None)
    if held:
        held.close()


def check_free(path):
    """Raises UserError where another process holds the file `path`; makes and keeps nothing."""
    if os.path.exists(path) and os.path.realpath(path) not in _HELD:
        lock(path)
        unlock(path)
