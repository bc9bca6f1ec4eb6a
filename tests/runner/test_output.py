import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vaelab.runner.output import OutputFolder, complete_swap, recover


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".run")


def make(folder, **entries):
    """A finished run's folder."""
    output = OutputFolder(folder)
    for name, text in {**entries, "results.json": "{}"}.items():
        output.place(name, staged=False).write_text(text)
    output.release()
    return folder


def replace(folder, identity, **entries):
    """An overwriting run, all but its last step."""
    output = OutputFolder(folder)
    output.stage(identity)
    for name, text in entries.items():
        output.place(name, staged=True).write_text(text)
    return output


def test_staged_entries_replace_those_of_earlier_runs_only_when_committed(tmp_path):
    make(tmp_path, curve="old", table="old")
    (tmp_path / "mine").write_text("the user's")
    output = replace(tmp_path, {"k": 1}, curve="new", **{"results.json": "[]"})
    assert (tmp_path / "curve").read_text() == "old" and (tmp_path / "results.json").read_text() == "{}"
    output.commit(replace_all=True)
    assert names(tmp_path) == ["curve", "mine", "results.json"]
    assert (tmp_path / "curve").read_text() == "new" and (tmp_path / "mine").read_text() == "the user's"


@pytest.mark.parametrize("staged", [False, True])
def test_entry_that_no_run_made_is_never_replaced(tmp_path, staged):
    make(tmp_path)
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "mine").write_text("the user's")
    output = OutputFolder(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: .*activations' was not made by a run"):
        output.place("activations", staged=staged)
    assert (tmp_path / "activations" / "mine").read_text() == "the user's"


@pytest.mark.parametrize("name", ["../victim", "..", ".", "", "/etc", "a/b", ".run", ".hidden"])
def test_forged_list_of_made_names_reaches_nothing_outside(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = make(tmp_path / "run", curve="old")
    (folder / ".run" / "made.json").write_text(json.dumps(["curve", "results.json", name, str(victim)]))
    output = replace(folder, {}, curve="new", **{"results.json": "[]"})
    output.commit(replace_all=True)
    assert victim.read_text() == "precious"
    assert names(folder) == ["curve", "results.json"]
    with pytest.raises(ValueError, match="does not name an entry"):
        OutputFolder(folder).place(name, staged=True)


def test_links_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    folder = make(tmp_path / "run", curve="old")
    (folder / "curve").unlink()
    (folder / "curve").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link, which a run does not follow"):
        OutputFolder(folder).place("curve", staged=False)
    replace(folder, {}, curve="new").commit(replace_all=True)
    assert (folder / "curve").read_text() == "new" and (elsewhere / "precious").read_text() == "precious"
    other = tmp_path / "other"
    other.mkdir()
    (other / ".run").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link"):
        OutputFolder(other)


@pytest.mark.parametrize("name", ["new", "old"])
def test_private_folder_that_is_a_link_is_not_followed(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "curve").write_text("precious")
    folder = make(tmp_path / "run", curve="old")
    (folder / ".run" / name).symlink_to(elsewhere)
    (folder / ".run" / "staged.json").write_text("{}")
    replace(folder, {}, curve="new").commit(replace_all=True)
    assert (folder / "curve").read_text() == "new"
    assert [path.name for path in elsewhere.iterdir()] == ["curve"]
    assert (elsewhere / "curve").read_text() == "precious"


def test_damaged_record_of_a_killed_overwrite_starts_it_again(tmp_path):
    make(tmp_path, curve="old")
    replace(tmp_path, {"k": 1}, curve="half").release()
    (tmp_path / ".run" / "staged.json").write_text("{")
    replace(tmp_path, {"k": 1}).release()
    assert not (tmp_path / ".run" / "new" / "curve").exists()


def test_what_a_killed_overwrite_left_is_used_again_by_the_same_run_only(tmp_path):
    make(tmp_path, curve="old")
    replace(tmp_path, {"k": 1}, curve="half").release()
    replace(tmp_path, {"k": 1}).release()
    assert (tmp_path / ".run" / "new" / "curve").read_text() == "half"
    replace(tmp_path, {"k": 2}).release()
    assert not (tmp_path / ".run" / "new" / "curve").exists()
    assert (tmp_path / "curve").read_text() == "old"


@pytest.mark.parametrize("before", range(12))
def test_move_that_was_killed_anywhere_is_completed_by_whoever_opens_the_folder_next(tmp_path, monkeypatch, before):
    """The system calls that move or remove are counted; the one numbered ``before`` does not happen any more."""
    make(tmp_path, curve="old", table="old")
    output = replace(tmp_path, {}, curve="new", **{"results.json": "[]"})
    calls = iter(range(1000))

    def killed(function):
        def call(*args, **kwargs):
            if next(calls) >= before:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink", "rmdir"):
            patched.setattr(os, name, killed(getattr(os, name)))
        with contextlib.suppress(KeyboardInterrupt):
            output.commit(replace_all=True)
    state = "old" if not (tmp_path / ".run" / "swap.json").exists() and (tmp_path / "table").exists() else "new"
    output.release()
    recover(tmp_path)
    assert (tmp_path / "curve").read_text() == state
    assert (tmp_path / "results.json").read_text() == {"old": "{}", "new": "[]"}[state]
    assert (tmp_path / "table").exists() == (state == "old")
    complete_swap(tmp_path)  # nothing is left to do
    assert (tmp_path / "curve").read_text() == state


HOLD = """
import sys, time
from pathlib import Path
from vaelab.runner.output import OutputFolder
output = OutputFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_second_process_is_told_who_uses_the_folder_and_a_killed_one_frees_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"^output_dir: .* is in use by process {holder.pid} since 20"):
        OutputFolder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    OutputFolder(tmp_path).release()


def test_same_process_may_open_its_folder_again(tmp_path):
    OutputFolder(tmp_path)
    OutputFolder(tmp_path).release()
