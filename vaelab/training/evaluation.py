"""Switch modules to evaluation mode while something is measured."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode and restore the mode of each of their submodules afterwards.

    The mode is restored after an exception too, and for every submodule separately: ``module.train()`` would also
    switch submodules to training mode that had been frozen in evaluation mode.

    ::

        with evaluation_mode(vae):
            reconstruction = vae(pixels)
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
