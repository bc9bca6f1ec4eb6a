import functools
import gc
import logging
import shutil
from pathlib import Path

import fsspec
import pytest

FORKING = (
    "test_cli", "test_collect", "test_collection_survives", "test_finetune", "test_forked", "test_io",
    "test_notebooks", "test_writer",
)  # fmt: skip
"""The modules that start processes from a fork server, see :mod:`helpers`."""


def pytest_sessionstart():
    """What is imported and collected stays to the end: the garbage collector need not look through it."""
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """The smoke runs are first, since they take longest, and then the modules that start processes."""
    items.sort(key=lambda item: (item.path.stem != "test_smoke", item.path.stem not in FORKING))


@pytest.fixture
def tiny_vae():
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
    return vae.eval()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """Folder of a small pipeline, by its name in :mod:`small_pipelines`; saved once."""
    from small_pipelines import save

    return functools.cache(functools.partial(save, folder=tmp_path_factory.mktemp("pipelines")))


@pytest.fixture(scope="session")
def small_pipeline(pipeline_folder):
    """A small pipeline by its name, loaded once: who changes one loads another from its folder."""
    from vaelab.models.loading import load_pipeline

    return functools.cache(lambda name: load_pipeline(str(pipeline_folder(name)), device="cpu"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Folder of a small CLIP with random weights."""
    from small_pipelines import save_whole_clip

    return save_whole_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def once_written(tmp_path_factory):
    from collecting import fill

    return fill(tmp_path_factory.mktemp("once") / "store")


@pytest.fixture
def written(once_written, tmp_path):
    """A small store of one's own, as :mod:`collecting` fills it."""
    return Path(shutil.copytree(once_written, tmp_path / "store"))


@pytest.fixture(params=["local", "memory"])
def url(request, written):
    """The same store in a folder and on a file system that knows neither folders nor mapping."""
    if request.param == "local":
        yield str(written)
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(written), "/some/store", recursive=True)
    yield "memory://some/store"
    memory.rm("/some", recursive=True)


@pytest.fixture
def forked_kernels(monkeypatch):
    """What the runner executes has its kernel forked from the fork server of :mod:`helpers`, which has the imports."""
    from helpers import PRELOADED

    from vaelab.runner import cli, execute, forked, schedule

    def run(path, **options):
        return execute.run(path, **{**options, "fork": True})

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(schedule, "run", run)
    monkeypatch.setattr(forked, "LIBRARIES", PRELOADED)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return {"kernel_manager_class": forked.ForkedKernelManager}


@pytest.fixture
def complaints(recwarn):
    """What the libraries of models warn of: a function that gives the messages so far."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)

    def messages():
        shown = [warning.message for warning in recwarn.list if warning.category is not DeprecationWarning]
        return [*(record.getMessage() for record in records), *map(str, shown)]

    yield messages
    for logger in loggers:
        logger.removeHandler(handler)
