"""``python -m ziggurat.tui.child serve …``: the server that a chat starts, which ends when the chat does.

The chat holds the other end of standard input and never writes to it. When that end closes, because the chat has
closed it or died in whatever way, the process is told to end, and ends at the latest a few seconds after.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading

_LEASH_FD = 0
_GRACE_S = 5.0


def _hold(fd: int) -> None:
    """Wait for the end of a pipe, and end the process with it."""
    try:
        while os.read(fd, 1024):
            pass
    except OSError:
        pass
    _remove_folder(sys.argv)
    timer = threading.Timer(_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the ``ziggurat`` command on a leash."""
    leash = os.dup(_LEASH_FD)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _LEASH_FD)
    os.close(nothing)
    threading.Thread(target=_hold, args=(leash,), daemon=True, name="leash").start()
    # the chat asks twice a second how things are, which nobody wants to read in its log
    logging.getLogger("ziggurat.runtime.server.middleware.log").setLevel(logging.WARNING)
    from ziggurat.runtime.cli import main as ziggurat

    ziggurat(sys.argv[1:])


def _remove_folder(arguments: list[str]) -> None:
    """Remove the socket and the folder that was made for it: the chat, whose task it is, may be gone."""
    if "--unix-socket" in arguments:
        path = arguments[arguments.index("--unix-socket") + 1]
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


if __name__ == "__main__":
    main()
