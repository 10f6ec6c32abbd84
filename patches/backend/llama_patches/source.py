"""Getting the upstream files: from the package index, a local archive, or a local folder; always verified.

Only the files listed in `upstream.sha256` are taken, whatever the source, so that a trimmed folder builds exactly what
the full archive builds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import BuildError
from .pin import Pin, file_sha256


def unpack(source: str | None, pin: Pin, hashes: Mapping[str, str], cache: Path, target: Path) -> None:
    """Put every listed upstream file under `target`, verified.

    Args:
        source: an archive or a folder; `None` takes the archive kept in `cache`, or else asks pip for it.
        pin: the release.
        hashes: relative path to sha256 of each file that is wanted.
        cache: the folder where a downloaded archive is kept.
        target: an empty or absent folder.

    Raises:
        BuildError: the source is missing, or anything in it differs from what is pinned.
    """
    if source is None:
        _unpack_archive(kept_archive(pin, cache), hashes, target)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        _copy_folder(path, hashes, target)
    elif path.is_file():
        _check_archive(path, pin)
        _unpack_archive(path, hashes, target)
    else:
        raise BuildError(f"source={source}: no such archive or folder")


def kept_archive(pin: Pin, cache: Path) -> Path:
    """The pinned archive in the cache, downloaded there through pip if it is not there yet.

    Raises:
        BuildError: pip cannot get it, or what it got differs from the pin.
    """
    path = cache / "sources" / pin.archive
    if path.is_file() and file_sha256(path) == pin.sha256:
        return path
    with tempfile.TemporaryDirectory() as folder:
        _download(pin, Path(folder))
        found = Path(folder) / pin.archive
        _check_archive(found, pin)
        store(found, path)
    return path


def store(source: Path, target: Path) -> None:
    """Copy a file so that `target` is never seen half written.

    Raises:
        BuildError: the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        os.close(handle)
        try:
            shutil.copyfile(source, name)
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        next_step = "ZIGGURAT_WHEEL_CACHE names another folder"
        raise BuildError(f"cannot write {target}: {error.strerror}; {next_step}") from error


def _download(pin: Pin, folder: Path) -> None:
    """Let pip fetch the archive, so that index settings (pip.conf, PIP_INDEX_URL, proxies) are the user's own."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{pin.project}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    # Constraints may name our own version, and the outer pip's tracker would take this for a recursive build.
    environment = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "PIP_BUILD_TRACKER")}
    # Without isolation pip reads the archive's metadata with the build requirements that are here already.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", pin.project, "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    print(f"ziggurat: downloading {pin.archive}", flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        said = [line.strip() for line in done.stdout.splitlines() if line.startswith("ERROR:")]
        reason = said[-1] if said else f"pip download ended with code {done.returncode}"
        raise BuildError(f"cannot download {pin.archive} ({reason}); source=PATH takes a local archive or folder")


def _check_archive(path: Path, pin: Pin) -> None:
    actual = file_sha256(path)
    if actual != pin.sha256:
        raise BuildError(f"{path}: sha256 is {actual}, but {pin.archive} has {pin.sha256}")


def _unpack_archive(path: Path, hashes: Mapping[str, str], target: Path) -> None:
    missing = dict(hashes)
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if name not in missing or not member.isfile():
                    continue
                file = archive.extractfile(member)
                assert file is not None  # it is a plain file
                _write(target, name, file.read(), missing.pop(name), lambda name: f"{path}: {name}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BuildError(f"{path}: cannot be unpacked: {error}") from error
    if missing:
        raise BuildError(f"{path}: {next(iter(missing))} is missing")


def _copy_folder(folder: Path, hashes: Mapping[str, str], target: Path) -> None:
    for name, expected in hashes.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise BuildError(f"{folder / name} is missing ({error.strerror})") from error
        _write(target, name, content, expected, lambda name: f"{folder / name}")


def _write(target: Path, name: str, content: bytes, expected: str, where: Callable[[str], str]) -> None:
    if hashlib.sha256(content).hexdigest() != expected:
        raise BuildError(f"{where(name)} differs from the pinned release (see upstream.sha256)")
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
