import os
import threading
import time

import pytest
import xxhash
from helpers import files_of_at_most

from vaelab import lasting
from vaelab.lasting import Background, SummedFile, send, sync_names

DATA = bytes(range(256)) * 40


# the thread


def test_jobs_are_done_in_their_order_by_one_other_thread():
    background, done = Background(10), []
    for number in range(50):
        background.do(lambda number=number: done.append((number, threading.current_thread())), holds=number % 3)
    background.wait()
    assert [number for number, _ in done] == list(range(50))
    (thread,) = {thread for _, thread in done}
    assert thread is not threading.current_thread() and thread.is_alive()
    assert background.close() is None and not thread.is_alive()


def test_waiting_and_closing_end_when_the_last_job_has():
    for end in ("wait", "close"):
        background, done = Background(10), []
        for _ in range(3):
            background.do(lambda done=done: (time.sleep(0.02), done.append(1)))
        getattr(background, end)()
        assert len(done) == 3
        background.close()


@pytest.mark.parametrize(
    ("holds", "at_once"), [((4, 4, 2), 3), ((4, 4, 3), 2), ((10, 1), 1), ((99, 99), 1), ((0,) * 9, 9)]
)
def test_jobs_that_wait_hold_no_more_than_they_may(holds, at_once):
    background, gate, taken = Background(10), threading.Event(), []

    def hand_on():
        for number, size in enumerate(holds):
            background.do(gate.wait, holds=size)
            taken.append(number)

    thread = threading.Thread(target=hand_on)
    thread.start()
    thread.join(0.1)
    assert len(taken) == at_once and thread.is_alive() == (at_once < len(holds))
    gate.set()
    thread.join()
    background.wait()
    assert len(taken) == len(holds)
    background.close()


def test_after_a_job_that_failed_no_other_is_done_and_every_call_says_so():
    background, gate, done = Background(10), threading.Event(), []

    def fail():
        gate.wait()
        raise OSError(5, "Input/output error")

    background.do(done.append, 1)
    background.do(fail)
    background.do(done.append, 2)
    gate.set()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            background.wait()
        with pytest.raises(OSError, match="Input/output error"):
            background.do(done.append, 3)
    assert isinstance(background.close(), OSError)
    assert done == [1]


def test_nobody_waits_for_room_behind_a_job_that_failed():
    background = Background(10)
    background.do(lambda: 1 / 0, holds=10)
    with pytest.raises(ZeroDivisionError):
        background.do(print, holds=10)
    background.close()


# the file


@pytest.mark.parametrize("piece", [lasting.PIECE, 1000])
@pytest.mark.parametrize("pieces", [1, 3, 17])
def test_a_file_is_what_was_written_and_so_is_its_checksum(tmp_path, monkeypatch, pieces, piece):
    monkeypatch.setattr(lasting, "PIECE", piece)
    file, size = SummedFile(tmp_path / "file"), -(-len(DATA) // pieces)
    for begin in range(0, len(DATA), size):
        file.write(memoryview(DATA)[begin : begin + size])
    assert not file.closed
    assert file.finish() == {"xxh128": xxhash.xxh3_128(DATA).hexdigest(), "bytes": len(DATA)}
    assert file.closed and (tmp_path / "file").read_bytes() == DATA


def test_a_head_that_is_written_anew_counts_in_the_checksum(tmp_path):
    file = SummedFile(tmp_path / "file")
    file.write(DATA)
    file.rewrite(b"head")
    whole = b"head" + DATA[4:]
    assert file.finish() == {"xxh128": xxhash.xxh3_128(whole).hexdigest(), "bytes": len(DATA)}
    assert (tmp_path / "file").read_bytes() == whole


def test_a_file_is_synced_when_it_is_finished_and_not_before(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), fsync(descriptor))
    )
    file = SummedFile(tmp_path / "file")
    file.write(DATA)
    assert not synced
    file.finish()
    assert synced == [len(DATA)]


def test_a_file_that_is_left_stays_as_it_is(tmp_path):
    file = SummedFile(tmp_path / "file")
    file.write(b"half")
    for _ in range(2):
        file.close()
    assert file.closed and (tmp_path / "file").read_bytes() == b"half"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with files_of_at_most(5000):
        file = SummedFile(tmp_path / "file")
        with pytest.raises(OSError, match=r"File too large: '.*file'$"):
            file.write(DATA)  # of which a part was written
        file.close()
    assert (tmp_path / "file").read_bytes() == DATA[:5000]


@pytest.mark.parametrize("call", ["rewrite", "finish"])
def test_what_the_system_refuses_names_the_file(tmp_path, monkeypatch, call):
    file = SummedFile(tmp_path / "file")
    file.write(DATA)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, {"rewrite": "pwrite", "finish": "fsync"}[call], refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'$"):
        file.finish() if call == "finish" else file.rewrite(b"head")
    assert not file.closed
    file.close()


def test_names_of_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    sync_names(tmp_path)
    closed, close = [], os.close

    def refuse(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor)))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        sync_names(tmp_path)
    assert len(closed) == 1


def test_the_disk_is_asked_for_each_part_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        lasting,
        "_sync_file_range",
        lambda descriptor, begin, size, flags: asked.append((begin.value, size.value, flags)),
    )
    file = SummedFile(tmp_path / "file")
    for size in (4096, 0, 10, 300):
        file.write(DATA[:size])
    file.close()
    assert asked == [(0, 4096, 2), (4096, 10, 2), (4106, 300, 2)]


@pytest.mark.skipif(lasting._sync_file_range is None, reason="only Linux can be asked")
def test_linux_understands_what_it_is_asked(tmp_path):
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(DATA)
        ask = lasting._sync_file_range
        assert ask(file.fileno(), lasting.ctypes.c_int64(0), lasting.ctypes.c_int64(len(DATA)), 2) == 0
        assert ask(file.fileno(), lasting.ctypes.c_int64(-1), lasting.ctypes.c_int64(1), 2) == -1


def test_a_system_that_cannot_be_asked_writes_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(lasting, "_sync_file_range", None)
    file = SummedFile(tmp_path / "file")
    file.write(DATA)
    send(0, 0, 1)
    assert file.finish()["bytes"] == len(DATA) and (tmp_path / "file").read_bytes() == DATA
