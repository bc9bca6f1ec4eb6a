"""Check names of blocks and timesteps on a model's configuration, before its weights are read or downloaded."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

from vaelab.core.validate import one_of
from vaelab.hooks import SIDES
from vaelab.models.block_names import example_outputs, find_blocks, picture_entry
from vaelab.models.conditioning import validate_timesteps
from vaelab.models.loading import denoiser_without_weights, load_scheduler


def check_blocks(
    model: str,
    names: str | Iterable[str],
    *,
    revision: str | None = None,
    side: str = "output",
    parameter: str = "blocks",
    model_parameter: str = "model",
) -> list[str]:
    """Check the names of blocks of a pipeline's denoiser without loading weights.

    Call it at the start of a notebook. It builds the denoiser from its configuration on torch's meta device, which
    computes no values and takes no memory.

    Args:
        model: the pipeline's name, as for :func:`vaelab.models.load_pipeline`.
        names: short names, globs of short names (``up.*``), or module paths.
        revision: the model's revision on the hub.
        side: what will be captured or edited: ``output``, ``input`` or ``update`` (output minus input).
        parameter: the notebook parameter that gave ``names``; error messages about them begin with it.
        model_parameter: the notebook parameter that gave ``model``.

    Returns:
        The names, with every glob replaced by the short names that it matches.

    Raises:
        ValueError: there is no such model; ``names`` is empty; a block is unknown (the error lists the nearest names);
            it works on text; or the side is ``update`` and a block's output and input differ in shape.
    """
    one_of("side", side, SIDES)
    denoiser = denoiser_without_weights(model, revision=revision, parameter=model_parameter)
    found = find_blocks(denoiser, names, parameter)
    try:
        for path in found.values():
            picture_entry(denoiser, path)
        example_outputs(denoiser, list(dict.fromkeys(found.values())), side)
    except ValueError as error:
        reason = str(error).removeprefix("blocks: ").removeprefix("layers: ")
        raise ValueError(f"{parameter}: {reason}") from error
    return list(found)


def check_timesteps(model: str, timesteps: Sequence[int], *, revision: str | None = None) -> None:
    """Check that a pipeline's scheduler has some timesteps, without loading weights.

    Args:
        model: the pipeline's name, as for :func:`vaelab.models.load_pipeline`.
        timesteps: the timesteps.
        revision: the model's revision on the hub.

    Raises:
        ValueError: there is no such model, or the scheduler does not have one of the timesteps.
    """
    validate_timesteps(SimpleNamespace(scheduler=load_scheduler(model, revision=revision)), timesteps)
