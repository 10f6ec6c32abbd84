import hashlib
import tarfile

import pytest
from llama_patches import source
from llama_patches.errors import BuildError
from llama_patches.pin import Pin, file_sha256, read_hashes

FILES = {"CMakeLists.txt": b"project(x)\n", "src/a.cpp": b"int a;\n"}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "up-1.0"
    for name, content in (FILES | {"docs/unlisted.md": b"not taken\n"}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def packed(folder):
    path = folder.parent / "up-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "up-1.0")
    return path


@pytest.fixture
def pin(packed):
    return Pin("up", "1.0", "ziggurat.1", "up-1.0.tar.gz", file_sha256(packed))


def taken(tree):
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_only_the_listed_files_are_taken(folder, packed, pin, tmp_path):
    for i, given in enumerate((folder, packed)):
        source.unpack(str(given), pin, HASHES, tmp_path / "cache", tmp_path / str(i))
        assert taken(tmp_path / str(i)) == FILES


def test_a_folder_may_be_trimmed(folder, pin, tmp_path):
    (folder / "docs/unlisted.md").unlink()
    source.unpack(str(folder), pin, HASHES, tmp_path / "cache", tmp_path / "tree")
    assert taken(tmp_path / "tree") == FILES


def test_a_changed_file_is_named(folder, pin, tmp_path):
    (folder / "src/a.cpp").write_text("int b;\n")
    with pytest.raises(BuildError, match=r"src/a\.cpp differs from the pinned release"):
        source.unpack(str(folder), pin, HASHES, tmp_path / "cache", tmp_path / "tree")


def test_a_missing_file_is_named(folder, pin, tmp_path):
    (folder / "src/a.cpp").unlink()
    with pytest.raises(BuildError, match=r"src/a\.cpp is missing"):
        source.unpack(str(folder), pin, HASHES, tmp_path / "cache", tmp_path / "tree")


def test_a_damaged_archive_is_refused(packed, pin, tmp_path):
    packed.write_bytes(packed.read_bytes()[:-1] + b"x")
    with pytest.raises(BuildError, match=r"up-1\.0\.tar\.gz: sha256 is"):
        source.unpack(str(packed), pin, HASHES, tmp_path / "cache", tmp_path / "tree")


def test_an_archive_without_a_listed_file(packed, pin, tmp_path):
    with pytest.raises(BuildError, match=r"up-1\.0\.tar\.gz: src/b\.cpp is missing"):
        source.unpack(str(packed), pin, HASHES | {"src/b.cpp": "0" * 64}, tmp_path / "cache", tmp_path / "tree")


def test_a_source_that_is_not_there(pin, tmp_path):
    with pytest.raises(BuildError, match="no such archive or folder"):
        source.unpack(str(tmp_path / "nothing"), pin, HASHES, tmp_path / "cache", tmp_path / "tree")


def test_an_archive_is_fetched_once_and_again_if_it_spoiled(packed, pin, tmp_path, monkeypatch):
    fetched = []

    def download(pin, folder):
        fetched.append(1)
        (folder / pin.archive).write_bytes(packed.read_bytes())

    monkeypatch.setattr(source, "_download", download)
    cache = tmp_path / "cache"
    path = source.kept_archive(pin, cache)
    assert source.kept_archive(pin, cache) == path
    assert len(fetched) == 1
    path.write_bytes(b"half")
    source.unpack(None, pin, HASHES, cache, tmp_path / "tree")
    assert len(fetched) == 2 and taken(tmp_path / "tree") == FILES
    assert sorted(taken(cache)) == ["sources/up-1.0.tar.gz"]


def test_a_download_of_something_else_is_refused_and_not_kept(pin, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_download", lambda pin, folder: (folder / pin.archive).write_bytes(b"other"))
    with pytest.raises(BuildError, match="sha256 is"):
        source.kept_archive(pin, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_failed_download_says_what_to_do(pin, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(BuildError, match=r"cannot download up-1\.0\.tar\.gz .*source=PATH"):
        source.kept_archive(pin, tmp_path / "cache")


def test_the_list_of_hashes_is_well_formed(patches, tmp_path):
    hashes = read_hashes(patches / "upstream.sha256")
    assert list(hashes) == sorted(hashes)
    assert "vendor/llama.cpp/src/llama-quant.cpp" in hashes
    (tmp_path / "bad").write_text("abc  name\n")
    with pytest.raises(BuildError, match="bad:1: not a line of sha256sum"):
        read_hashes(tmp_path / "bad")
