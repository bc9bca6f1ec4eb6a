"""Find out why channels become suppressed, by an ablation study that changes one setting at a time.

Shi, Wang and Roshka ("Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs") leave open
why suppression emerges (their sections 5.2 and 6). Here a VAE is trained from scratch for each :class:`Variant` of a
reference setting, with several seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from vaelab import models
from vaelab.core.validate import at_least, one_of
from vaelab.data.images import Images
from vaelab.vae.channels import groupnorms
from vaelab.vae.finetune import StudyConfig, VAERun, scale_parameters, train_vae


@dataclass(frozen=True)
class Variant:
    """A change to the reference setting."""

    decay: float = 1.0
    """Factor on the reference's weight decay."""
    decay_scales: bool = True
    """Whether weight decay applies to GroupNorm's scales and shifts."""
    width: float = 1.0
    """Factor on the reference's numbers of channels."""
    length: float = 1.0
    """Factor on the reference's number of training steps."""
    dataset: str = ""
    """The data set to train on; empty means the reference's data set."""


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

UNDECAYED = ("no weight decay", "scales not decayed")
"""The variants without weight decay on GroupNorm's scales."""


def train_variant(
    model: str,
    name: str,
    config: StudyConfig,
    pictures: Callable[[str], tuple[Images, Images]],
    dataset: str,
    folder: str | Path,
    *,
    revision: str | None = None,
) -> VAERun:
    """Train one variant from scratch.

    Args:
        model: the model whose configuration is the reference architecture; its weights are not used.
        name: a key of ``VARIANTS``.
        config: the reference setting.
        pictures: a function that returns, for a data set's name, the pictures to train on and the pictures to evaluate
            on.
        dataset: the reference's data set.
        folder: the run's folder, see :func:`vaelab.vae.finetune.train_vae`.
        revision: a branch, tag or commit of a model on the hub.

    Raises:
        ValueError: the variant is unknown; also the errors of :func:`vaelab.vae.finetune.train_vae`.
    """
    one_of("variants", name, VARIANTS)
    variant = VARIANTS[name]
    changes = _width_changes(model, variant.width, revision)
    train = replace(
        config.train,
        steps=max(1, round(config.train.steps * variant.length)),
        weight_decay=config.train.weight_decay * variant.decay,
    )
    if not variant.decay_scales:
        vae = models.load_vae(model, device="cpu", revision=revision, changes=changes)
        train = replace(train, undecayed=scale_parameters(vae))
    pair = pictures(variant.dataset or dataset)
    return train_vae(model, "baseline", replace(config, train=train), pair, folder, revision=revision, changes=changes)


def train_variants(
    model: str,
    names: list[str],
    seeds: list[int],
    config: StudyConfig,
    pictures: Callable[[str], tuple[Images, Images]],
    dataset: str,
    folder: str | Path,
    *,
    revision: str | None = None,
) -> pd.DataFrame:
    """Train every variant with every seed; the arguments are those of :func:`train_variant`.

    Returns:
        One row per validation of each training run, with the columns ``variant``, ``seed``, ``step``, the fields of
        :class:`vaelab.vae.objective.Reconstruction`, ``suppressed`` (the number of suppressed channels), ``share``
        (this number divided by the number of GroupNorm channels) and ``final`` (whether it is the run's last
        validation).

    Raises:
        ValueError: a variant is unknown; this is checked before anything is trained.
    """
    for name in names:
        one_of("variants", name, VARIANTS)
    rows: list[dict[str, Any]] = []
    for name in names:
        total = _groupnorm_channels(model, VARIANTS[name].width, revision)
        for seed in seeds:
            seeded = replace(config, train=replace(config.train, seed=seed))
            run_folder = Path(folder, f"{name.replace(' ', '-')}-seed{seed}")
            run = train_variant(model, name, seeded, pictures, dataset, run_folder, revision=revision)
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


def describe_causes(final: pd.DataFrame) -> str:
    """Describe in words which share of the channels each variant suppresses; ``final`` has the rows of
    :func:`train_variants` that are ``final``."""
    shares = final.groupby("variant", sort=False)["share"].mean()
    each = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    seeds = final["seed"].nunique()
    sentence = f"Suppressed channels after training: {each} (mean over {seeds} seed{'s' * (seeds > 1)})."
    undecayed = [name for name in UNDECAYED if name in shares]
    if "reference" in shares and shares["reference"] > 0 and undecayed:
        few = [name for name in undecayed if shares[name] < 0.1 * shares["reference"]]
        if few == undecayed:
            sentence += " Without weight decay on the scales, the control, fewer than a tenth of these are suppressed."
        else:
            sentence += " Weight decay on the scales is not the only cause: without it, channels are suppressed too."
    return sentence


def _width_changes(model: str, width: float, revision: str | None) -> dict[str, Any]:
    """Make the changes to the model's configuration that multiply its numbers of channels by ``width``."""
    at_least("width", width, 0, exclusive=True)
    if width == 1:
        return {}
    config = models.load_vae(model, device="cpu", revision=revision, changes={}).config
    # the number of groups changes too, so that the number of channels per group stays the same
    return {
        "block_out_channels": [round(channels * width) for channels in config["block_out_channels"]],
        "norm_num_groups": max(1, round(config["norm_num_groups"] * width)),
    }


def _groupnorm_channels(model: str, width: float, revision: str | None) -> int:
    changes = _width_changes(model, width, revision)
    vae = models.load_vae(model, device="cpu", revision=revision, changes=changes, groupnorm=True)
    return sum(layer.num_channels for layer in groupnorms(vae).values())
