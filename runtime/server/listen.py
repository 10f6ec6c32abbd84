"""Where the server listens: an address, loopback by default, or a Unix socket; with TLS or without."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ziggurat.runtime.errors import InvalidRequestError, ZigguratError


class ListenError(ZigguratError):
    """The address cannot be listened on, or a TLS file not be used."""


@dataclass(frozen=True)
class Listen:
    """``host`` and ``port`` (0: any free one), or ``unix_socket`` with the permissions ``socket_mode``.

    ``tls_certificate`` (PEM, the chain behind it in the same file) and ``tls_key`` turn TLS on.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    unix_socket: Path | None = None
    socket_mode: int = 0o600
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if self.tls_key is not None and self.tls_certificate is None:
            raise InvalidRequestError("a TLS key without a certificate: give both, or a file with both as certificate")

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.unix_socket is not None or self.host == "localhost" or _loopback(self.host)

    def url(self, bound: socket.socket) -> str:
        """Return what clients connect to."""
        scheme = "http" if self.tls_certificate is None else "https"
        if self.unix_socket is not None:
            return f"{scheme}+unix://{self.unix_socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{bound.getsockname()[1]}"

    def remove(self) -> None:
        """Remove the file of the Unix socket, if there is one; only for whoever has bound it."""
        if self.unix_socket is not None:
            with contextlib.suppress(OSError):
                self.unix_socket.unlink()

    def check_tls(self) -> None:
        """Raise ListenError for TLS files that cannot be used."""
        if self.tls_certificate is None:
            return
        for path in filter(None, (self.tls_certificate, self.tls_key)):
            try:
                path.open("rb").close()
            except OSError as error:
                raise ListenError(f"TLS: {path} cannot be read ({error.strerror or error})") from None
        try:
            # an empty password instead of a question at the terminal
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls_certificate, self.tls_key, password="")
        except (ssl.SSLError, ValueError) as error:
            files = " and ".join(str(path) for path in (self.tls_certificate, self.tls_key) if path is not None)
            raise ListenError(f"TLS: {files} are no certificate and its key without a password ({error})") from None


@contextlib.contextmanager
def bound(listen: Listen) -> Iterator[socket.socket]:
    """Bind a socket for the block, and take a Unix socket's file away after it. Raises ListenError."""
    if listen.unix_socket is None:
        with _bind_address(listen.host, listen.port) as sock:
            yield sock
        return
    with _bind_unix(listen.unix_socket, listen.socket_mode) as sock:
        own = os.stat(listen.unix_socket)
        try:
            yield sock
        finally:
            # another server may have taken the name meanwhile
            with contextlib.suppress(OSError):
                now = os.stat(listen.unix_socket)
                if (now.st_dev, now.st_ino) == (own.st_dev, own.st_ino):
                    listen.remove()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind_address(host: str, port: int) -> socket.socket:
    try:
        # IPv4 first: what a name such as localhost means to most clients
        found = sorted(socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"--host {host}: is not an address of this machine ({error.strerror or error})") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        hint = (
            ": choose another --port, or 0 for any free one" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        )
        raise ListenError(f"cannot listen on {host} port {port} ({error.strerror or error}){hint}") from None
    return sock


def _bind_unix(path: Path, mode: int) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)  # never wider than it will be, not even for a moment
    try:
        sock.bind(os.fspath(path))
        os.chmod(path, mode)
        sock.listen(2048)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on the Unix socket {path} ({error.strerror or error})") from None
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that is gone; refuse to touch anything else."""
    try:
        status = os.lstat(path)
    except OSError:
        return  # nothing there, or binding says what is wrong
    if not stat.S_ISSOCK(status.st_mode):
        raise ListenError(f"{path} exists and is no socket: choose another name, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            pass
        except OSError as error:
            raise ListenError(f"the Unix socket {path} cannot be looked at ({error.strerror or error})") from None
        else:
            raise ListenError(f"another server listens on the Unix socket {path}: stop it, or choose another name")
    path.unlink(missing_ok=True)
