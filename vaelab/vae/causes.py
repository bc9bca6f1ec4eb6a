"""What makes channels fall silent: a small study of causes, one change at a time.

Shi, Wang and Roshka leave open why suppression emerges (their sections 5.2 and 6). Here a VAE is
trained from scratch again and again, each time with one thing changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from vaelab import models
from vaelab.core.validate import at_least, one_of
from vaelab.data.images import Images
from vaelab.vae.finetune import StudyConfig, VAERun, scale_parameters, train_vae


@dataclass(frozen=True)
class Variant:
    """One change to the reference setting."""

    decay: float = 1.0
    """Times the reference's weight decay."""
    decay_scales: bool = True
    """Whether weight decay reaches GroupNorm's scales and shifts."""
    width: float = 1.0
    """Times the reference's channels."""
    length: float = 1.0
    """Times the reference's steps."""
    dataset: str = ""
    """Other pictures than the reference's."""


VARIANTS = {
    "reference": Variant(),
    "no weight decay": Variant(decay=0.0),
    "scales not decayed": Variant(decay_scales=False),
    "half the decay": Variant(decay=0.5),
    "half the width": Variant(width=0.5),
    "twice the length": Variant(length=2.0),
    "photos": Variant(dataset="photos"),
    "digits": Variant(dataset="digits"),
    "glyphs": Variant(dataset="glyphs"),
}


def train_variant(
    model: str,
    name: str,
    config: StudyConfig,
    pictures: Callable[[str], tuple[Images, Images]],
    dataset: str,
    folder: str | Path,
) -> VAERun:
    """Train one variant from scratch.

    Args:
        model: whose configuration is the reference architecture.
        name: a key of ``VARIANTS``.
        config: the reference setting.
        pictures: gives the pictures to train and to measure on for a data set's name.
        dataset: the reference's data set.
        folder: the run's place.
    """
    one_of("variants", name, VARIANTS)
    variant = VARIANTS[name]
    changes = _narrowed(model, variant.width)
    train = replace(
        config.train,
        steps=max(1, round(config.train.steps * variant.length)),
        weight_decay=config.train.weight_decay * variant.decay,
    )
    if not variant.decay_scales:
        vae = models.load_vae(model, device="cpu", changes=changes)
        train = replace(train, undecayed=scale_parameters(vae))
    shown = pictures(variant.dataset or dataset)
    return train_vae(model, "baseline", replace(config, train=train), shown, folder, changes=changes)


def train_variants(
    model: str,
    names: list[str],
    seeds: list[int],
    config: StudyConfig,
    pictures: Callable[[str], tuple[Images, Images]],
    dataset: str,
    folder: str | Path,
) -> pd.DataFrame:
    """Train every variant with every seed; a row for every validation of each.

    Returns:
        Columns ``variant``, ``seed``, ``step``, ``mse``, ``suppressed``, ``share`` (suppressed over
        all GroupNorm channels) and ``final``.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        total = _channels(model, VARIANTS[name].width) if name in VARIANTS else 0
        for seed in seeds:
            one = replace(config, train=replace(config.train, seed=seed))
            place = Path(folder, f"{name.replace(' ', '-')}-seed{seed}")
            run = train_variant(model, name, one, pictures, dataset, place)
            rows += [
                {
                    "variant": name,
                    "seed": seed,
                    "share": row["suppressed"] / total,
                    "final": row is run.validation[-1],
                    **row,
                }
                for row in run.validation
            ]
    return pd.DataFrame(rows)


def _narrowed(model: str, width: float) -> dict[str, Any]:
    at_least("width", width, 0, exclusive=True)
    if width == 1:
        return {}
    config = models.load_vae(model, device="cpu", changes={}).config
    # fewer groups too, so that a group keeps its number of channels
    return {
        "block_out_channels": [round(channels * width) for channels in config["block_out_channels"]],
        "norm_num_groups": max(1, round(config["norm_num_groups"] * width)),
    }


def _channels(model: str, width: float) -> int:
    from vaelab.vae.channels import groupnorms

    vae = models.load_vae(model, device="cpu", changes=_narrowed(model, width), groupnorm=True)
    return sum(layer.num_channels for layer in groupnorms(vae).values())
