import functools
import shutil
import socket
import time
import types

import pytest
from small_hub import small_hub

from vaelab.core import disk, hub


def test_a_local_folder_and_a_part_of_it(tmp_path):
    (tmp_path / "saes" / "mid.0").mkdir(parents=True)
    assert hub.find_folder(tmp_path / "saes") == tmp_path / "saes"
    assert hub.find_folder(str(tmp_path / "saes"), subfolder="mid.0") == tmp_path / "saes" / "mid.0"


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/here", "a/b/c", "~/nowhere"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(name):
    with pytest.raises(ValueError, match=r"sae: .*neither a folder nor an id on the hub"):
        hub.find_folder(name)


def test_a_file_and_a_part_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        hub.find_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="no folder 'mid'"):
        hub.find_folder(tmp_path, subfolder="mid")


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty cache of the hub; returns a function that puts a repository there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return lambda name: (tmp_path / "cache" / f"models--{name.replace('/', '--')}").mkdir(parents=True)


@pytest.fixture
def closed_port(monkeypatch, hub_cache):
    """The hub's address is a port of this machine at which nothing listens."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=address))


@pytest.fixture
def answer(monkeypatch, hub_cache):
    """A function that lets every request to the hub be answered with a status."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    def set_status(status):
        def refuse(self, *given, **more):
            response = types.SimpleNamespace(status_code=status, headers={}, request=None)
            raise HfHubHTTPError(f"status {status}", response=response)

        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)

    return set_status


@pytest.mark.parametrize("dataset", [False, True])
def test_a_hub_out_of_reach_is_one_sentence_within_seconds(closed_port, dataset):
    began = time.perf_counter()
    expected = (
        r"^clip: 'some/one' could not be read from the hub: the hub cannot be reached \(.*; give a local folder; new$"
    )
    with (
        pytest.raises(ValueError, match=expected) as raised,
        hub.access_repository("some/one", dataset=dataset, parameter="clip", hint="; new"),
    ):
        raise FileNotFoundError("not in the cache")
    assert time.perf_counter() - began < 5
    assert "licence" not in str(raised.value)


def test_a_hub_out_of_reach_leaves_its_cache(closed_port, hub_cache, capsys):
    from huggingface_hub import constants

    hub_cache("some/one")
    with hub.access_repository("some/one") as described:
        assert described is None and constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert "some/one: the hub cannot be reached" in capsys.readouterr().out


def test_other_errors_are_passed_on_if_the_hub_is_out_of_reach(closed_port, hub_cache):
    hub_cache("some/one")
    with pytest.raises(ValueError, match=r"^model: weights are damaged$"), hub.access_repository("some/one"):
        raise ValueError("model: weights are damaged")


@pytest.mark.parametrize(
    ("status", "reason", "licence"),
    [
        (401, r"access is denied \(401\)", True),
        (403, r"access is denied \(403\)", True),
        (404, "it has no such repository or revision", False),
        (503, "the hub cannot be reached", False),
    ],
)
def test_licences_are_named_only_if_access_is_denied(answer, status, reason, licence):
    answer(status)
    with pytest.raises(ValueError, match=f"^model: 'some/one' .*{reason}") as raised, hub.access_repository("some/one"):
        pass
    assert ("HF_TOKEN" in str(raised.value)) == licence


def test_a_licence_that_only_a_file_asks_for(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    monkeypatch.setattr(hub, "_describe", lambda *given: "a description")
    expected = r"^model: 'some/one' .*access is denied \(403\)"
    with pytest.raises(ValueError, match=expected), hub.access_repository("some/one"):
        try:
            raise GatedRepoError("gated", response=types.SimpleNamespace(status_code=403, headers={}, request=None))
        except GatedRepoError as error:
            raise ValueError("model: no such file") from error


def test_offline_by_the_environment_is_said(monkeypatch, hub_cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^sae: 'some/one' .*: HF_HUB_OFFLINE is set, .*give a local folder$"):
        hub.find_folder("some/one")


@pytest.mark.parametrize(
    ("subfolder", "files", "patterns"),
    [("", (), None), ("mid", (), ["mid/*"]), ("", ("*.json",), ["*.json"]), ("mid", ("a", "b"), ["mid/a", "mid/b"])],
)
def test_only_the_files_that_are_loaded_are_downloaded(monkeypatch, tmp_path, subfolder, files, patterns):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked.update(options)
        (tmp_path / subfolder).mkdir(exist_ok=True)
        for name in ("a", "b", "c.json"):
            (tmp_path / subfolder / name).write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_describe", lambda *given: None)
    assert hub.find_folder("some/one", subfolder=subfolder, files=files) == tmp_path / subfolder
    assert asked["allow_patterns"] == patterns
    with pytest.raises(ValueError, match=r"clip: 'some/one' on the hub has none of the files \*\.safetensors"):
        hub.find_folder("some/one", subfolder=subfolder, files=["*.safetensors"], parameter="clip")


def test_a_download_is_announced_and_refused_if_the_disk_cannot_hold_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "source" / "part").mkdir(parents=True)
    for name, size in (("config.json", 1000), ("part/weights.safetensors", 5000), ("other.bin", 9000)):
        (tmp_path / "source" / name).write_bytes(b"x" * size)
    files = ["*.json", "part/*"]
    with small_hub(tmp_path / "source", monkeypatch, tmp_path / "cache") as downloaded:
        with monkeypatch.context() as full:
            full.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 5999))
            with pytest.raises(ValueError, match=r"^clip: the download of 'lab/small' needs 6 kB of disk space"):
                hub.find_folder("lab/small", files=files, parameter="clip")
            with pytest.raises(ValueError, match=r"^dataset: the download of 'lab/small' needs 10 kB"):
                hub.announce_download("lab/small", ["part/*"], parameter="dataset", prepared=True)
        assert downloaded == []
        capsys.readouterr()
        folder = hub.find_folder("lab/small", files=files)
        assert capsys.readouterr().out == "lab/small: 2 files of 6 kB are downloaded from the hub\n"
        assert sorted(downloaded) == ["config.json", "part/weights.safetensors"]
        assert hub.find_folder("lab/small", files=files) == folder
        assert capsys.readouterr().out == ""  # both are in the cache
