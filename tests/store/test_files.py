import fsspec
import numpy as np
import pytest
import xxhash

from vaelab.store.files import Folder

DATA = bytes(range(200))


@pytest.fixture(params=["local", "memory", "zip"])
def folder(request, tmp_path):
    """A folder with two files, on three kinds of file systems."""
    if request.param == "memory":
        system, root, url = fsspec.filesystem("memory"), "/of/storage", "memory://of/storage"
    elif request.param == "zip":
        system, root = fsspec.filesystem("zip", fo=str(tmp_path / "it.zip"), mode="w"), "/in"
        url = f"zip://in::{tmp_path / 'it.zip'}"
    else:
        system, root, url = fsspec.filesystem("file"), str(tmp_path), str(tmp_path)
    system.pipe_file(f"{root}/data", DATA)
    system.pipe_file(f"{root}/empty", b"")
    if request.param == "zip":
        system.close()
    yield Folder(url)
    if request.param == "memory":
        system.rm("/of", recursive=True)


def test_files_are_read_on_every_file_system(folder, tmp_path):
    sizes = folder.sizes()
    assert (sizes["data"], sizes["empty"]) == (len(DATA), 0)
    assert folder.local == (folder.url == str(tmp_path))
    assert folder.read("data") == DATA and folder.read_all(["empty", "data"]) == [b"", DATA]
    assert folder.checksum("data", piece=7) == xxhash.xxh3_128(DATA).hexdigest()
    assert folder.full_name("data") == f"{folder.url}/data"


@pytest.mark.parametrize(("begin", "wanted"), [(16, 40), (16, 184), (100, 40), (150, 80), (16, 300)])
def test_a_part_is_read_with_its_head_and_its_length(folder, begin, wanted):
    view = np.zeros(wanted, np.uint8)
    head, got = folder.read_into(view, "data", begin, head=16)
    assert got == min(wanted, len(DATA) - begin) and bytes(view[:got]) == DATA[begin : begin + got]
    assert not view[got:].any()
    assert head == DATA[:16] or (head is None and not folder.local and begin > 16)


def test_an_empty_file_is_read(folder):
    assert folder.read_into(np.zeros(3, np.uint8), "empty", 16, head=16) == (b"", 0)


def test_writing_to_a_mapped_file_leaves_the_file_unchanged(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    (tmp_path / "empty").touch()
    memory = Folder(str(tmp_path)).memory_map("data")
    assert memory[:] == DATA
    memory[0] = 77
    assert (tmp_path / "data").read_bytes() == DATA
    assert Folder(str(tmp_path)).memory_map("empty") == b""


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: folder.read("gone"),
        lambda folder: folder.read_all(["data", "gone"]),
        lambda folder: folder.checksum("gone"),
        lambda folder: folder.read_into(np.zeros(3, np.uint8), "gone", 16, head=16),
        lambda folder: (folder.local and folder.memory_map("gone")) or folder.read("gone"),
    ],
)
def test_a_missing_file_is_named(folder, read):
    with pytest.raises(ValueError, match="/gone is missing"):
        read(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        Folder(str(tmp_path / "nowhere")).sizes()
