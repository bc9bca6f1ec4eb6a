import pytest

from vaelab.core import hub


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


def test_an_id_that_cannot_be_read_is_one_error_with_its_cause(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*given, **more):
        raise LocalEntryNotFoundError("no way out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"model: 'some/one' could not be read from the hub \(.*no way out"):
        hub.find_folder("some/one", parameter="model")


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
    assert hub.find_folder("some/one", subfolder=subfolder, files=files) == tmp_path / subfolder
    assert asked["allow_patterns"] == patterns
    with pytest.raises(ValueError, match=r"clip: 'some/one' on the hub has none of the files \*\.safetensors"):
        hub.find_folder("some/one", subfolder=subfolder, files=["*.safetensors"], parameter="clip")
