"""The command line without the imports of a new process: in this process, or in one that is forked."""

import io
import logging
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from helpers import CHILDREN

from vaelab.runner import cli, execute, forked


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def call(*words):
    """Run ``vaelab <words>`` in this process and its current folder."""
    here, root, stdout, stderr = Path.cwd(), logging.getLogger(), io.StringIO(), io.StringIO()
    handlers, level, root.handlers = root.handlers, root.level, []  # as in a new process
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            returncode = cli.main(list(words))
    finally:
        os.chdir(here)
        root.handlers = handlers
        root.setLevel(level)
    return Ended(returncode, stdout.getvalue(), stderr.getvalue())


def start(folder, *words):
    """Run ``vaelab <words>`` in another process and folder; what it says to the user is written to ``stderr`` there."""
    process = CHILDREN.Process(target=_main, args=(folder, words))
    process.start()
    return process


def start_holding(folder, *words):
    """The same, but the run waits where its notebook would be executed."""
    process = CHILDREN.Process(target=_hold, args=(folder, words))
    process.start()
    return process


def _main(folder, words):
    os.chdir(folder)
    for number, name in ((1, os.devnull), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(cli.main(list(words)))


def _hold(folder, words):
    execute._execute = lambda *args: time.sleep(60)
    _main(folder, words)


def run_forked(params_file, libraries):
    """Run one params file in a kernel that is forked from a server with these libraries: for a process to be killed."""
    forked.LIBRARIES = libraries
    execute.run(Path(params_file), show_output=False, fork=True)
