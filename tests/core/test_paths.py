from pathlib import Path

import pytest

from vaelab.core import paths


@pytest.fixture
def repository(tmp_path):
    for name in ("vaelab", "notebooks", "pictures"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_from_the_root_paths_begin_there(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert paths.project_root() == repository
    assert paths.resolve("pictures") == repository / "pictures"


def test_from_the_notebooks_they_begin_one_folder_up(repository, monkeypatch):
    monkeypatch.chdir(repository / "notebooks")
    assert paths.project_root() == repository
    assert paths.resolve("pictures") == repository / "pictures"


def test_from_the_copies_for_jupyterlab_they_begin_two_folders_up(repository, monkeypatch):
    (repository / "outputs" / "lab").mkdir(parents=True)
    monkeypatch.chdir(repository / "outputs" / "lab")
    assert paths.project_root() == repository
    assert paths.resolve("outputs/10_finetune_vae") == repository / "outputs" / "10_finetune_vae"


def test_another_folder_called_notebooks_is_its_own_root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert paths.project_root() == tmp_path / "notebooks"


def test_an_absolute_path_stays(repository):
    assert paths.resolve(str(repository / "anything")) == repository / "anything"


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    assert paths.resolve("~/pictures") == Path("/somebody/pictures")


def test_local_is_what_exists(repository, monkeypatch):
    monkeypatch.chdir(repository / "notebooks")
    assert paths.local("pictures") == repository / "pictures"
    assert paths.local("stabilityai/sdxl-vae") is None
