from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.server.listen import Listen, ListenError, bound


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for a Unix socket's."""
    path = Path(tempfile.mkdtemp(prefix="zs"))
    yield path
    shutil.rmtree(path)


def test_loopback_and_any_free_port() -> None:
    with bound(Listen(port=0)) as sock:
        host, port = sock.getsockname()
        assert host == "127.0.0.1" and Listen().url(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ListenError, match=f"port {port}.*choose another --port"), bound(Listen(port=port)):
            pass


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert Listen(host).local is local


@pytest.mark.parametrize("host", ["256.1.1.1", "no such host.invalid", "192.0.2.77"])
def test_addresses_that_are_not_ours(host: str) -> None:
    with pytest.raises(ListenError, match="address|listen"), bound(Listen(host, port=0)):
        pass


def test_a_unix_socket_is_for_its_owner_and_goes_away(folder: Path) -> None:
    path = folder / "s"
    before = os.umask(0)
    try:
        with bound(Listen(unix_socket=path)) as sock:
            assert sock.family == socket.AF_UNIX and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not path.exists()
        with bound(Listen(unix_socket=path, socket_mode=0o660)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_a_socket_left_by_a_dead_server_is_replaced(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with bound(Listen(unix_socket=path)):
        # and one that is alive is not
        with pytest.raises(ListenError, match="another server listens"), bound(Listen(unix_socket=path)):
            pass
        assert path.exists()


def test_other_files_are_left_alone(folder: Path) -> None:
    path = folder / "precious"
    path.write_text("x")
    with pytest.raises(ListenError, match="is no socket"), bound(Listen(unix_socket=path)):
        pass
    link = folder / "link"
    link.symlink_to(path)
    with pytest.raises(ListenError, match="is no socket"), bound(Listen(unix_socket=link)):
        pass
    assert path.read_text() == "x"
    with pytest.raises(ListenError, match="cannot listen"), bound(Listen(unix_socket=folder / "no" / "s")):
        pass


def test_a_socket_that_somebody_else_took_over_stays(folder: Path) -> None:
    path = folder / "s"
    with bound(Listen(unix_socket=path)):
        path.unlink()
        path.write_text("somebody else's")
    assert path.exists()


def test_tls_files(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="without a certificate"):
        Listen(tls_key=folder / "key.pem")
    with pytest.raises(ListenError, match="cannot be read"):
        Listen(tls_certificate=folder / "none.pem").check_tls()
    (folder / "bad.pem").write_text("not PEM")
    with pytest.raises(ListenError, match="no certificate"):
        Listen(tls_certificate=folder / "bad.pem").check_tls()
