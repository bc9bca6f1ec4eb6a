"""Features of pictures for a language model: an image encoder's tokens, a denoiser's maps, and controls.

A stream is the sequence of tokens that shows a picture to the language model. Its name joins its parts with ``+``, as
in ``clip + up_ft1.t25``; the tokens of the parts are interleaved. The parts are

==================== =============================================================================================
``clip``             tokens of the main image encoder, usually a CLIP
``other``            tokens or maps of another image encoder
``up_ft1.t25``       maps of a denoiser's block, here ``up_ft1``, at a timestep, here t = 25
``untrained:up_ft1.t25``  the same of a denoiser with random weights
``noise``            random tokens, normally distributed, in the main image encoder's shape
==================== =============================================================================================

``none`` is the stream without a picture. ``clip + clip`` is the control of ``clip + up_ft1.t25``: it has as many tokens
and as large projectors, but no new information.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vaelab import activations
from vaelab.core import devices, hub
from vaelab.core.disk import readable
from vaelab.core.finite import all_finite
from vaelab.models.block_names import DENOISERS, find_denoiser
from vaelab.models.clip import load_clip, to_images
from vaelab.models.registry import embedded_clip_path
from vaelab.models.similarity import EFFICIENTNET, load_picture_model
from vaelab.probing.layer_features import digest, split_layer_name

CLIP, OTHER, NOISE, NONE, UNTRAINED = "clip", "other", "noise", "none", "untrained:"
WORDS = (CLIP, OTHER, NOISE)
"""The parts that are no layer of a denoiser."""
HELD_BYTES = 2**31
"""Features that take at most so many bytes are computed once and held in memory."""
STATISTICS_PICTURES = 512
"""The number of pictures, at most, from which the mean and deviation of each channel are measured."""


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel of a part, each (d,), by which its tokens are normalised."""

    mean: Tensor
    deviation: Tensor


class ImageEncoder(Protocol):
    """A model that turns pictures into tokens (B, T, d) or maps (B, h, w, d)."""

    name: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1]."""


class PatchTokens:
    """Tokens of a vision transformer's patches, such as those of CLIP or DINOv2."""

    def __init__(self, model: Any, processor: Any, name: str):
        """Take a loaded model.

        Args:
            model: a vision transformer of transformers, with ``config.num_hidden_layers``.
            processor: its image processor.
            name: the name under which results mention the model.
        """
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode pictures as the patches' states before the last layer, as LLaVA does (section 4.1), without the
        class token and registers: (B, T, d)."""
        inputs = self.processor(images=to_images(pixels), return_tensors="pt")["pixel_values"]
        inputs = inputs.to(self.model.device, self.model.dtype)
        states = self.model(pixel_values=inputs, output_hidden_states=True).hidden_states[-2]
        return states[:, 1 + getattr(self.model.config, "num_register_tokens", 0) :]


class PictureMaps:
    """Maps of EfficientNet-Lite0 before its classifier."""

    def __init__(self, network: Any):
        """Take a loaded :class:`vaelab.models.similarity.EfficientNetLite`."""
        self.network, self.name = network, network.name

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode pictures as maps (B, 7, 7, 1280)."""
        return self.network.model.extract_features(self.network.preprocess(pixels)).permute(0, 2, 3, 1)


def load_image_encoder(
    name: str, *, device: str = "auto", revision: str | None = None, parameter: str = "image_encoder"
) -> ImageEncoder:
    """Load an image encoder.

    Args:
        name: ``embedded`` (the small CLIP of the world), ``efficientnet-lite0``, or an id on the hub or a folder of a
            CLIP or DINOv2 model.
        device: the device that the model runs on.
        revision: the revision on the hub.
        parameter: the notebook parameter that gave the name; errors begin with it.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    if name == EFFICIENTNET:
        return PictureMaps(load_picture_model(name, device=device, revision=revision, parameter=parameter))
    path = str(embedded_clip_path()) if name == "embedded" else name
    folder = hub.find_folder(path, revision=revision, files=("config.json",), parameter=parameter)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{parameter}: {name!r} holds no model of transformers ({error})") from error
    if kind == "clip":
        clip = load_clip(path, device=device, revision=revision, parameter=parameter)
        return PatchTokens(clip.model.vision_model, clip.processor.image_processor, Path(name).name)
    if not kind.startswith("dinov2"):
        raise ValueError(f"{parameter}: {name!r} holds a {kind} model; expected CLIP, DINOv2 or {EFFICIENTNET}")
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    folder = hub.find_folder(path, revision=revision, files=files, parameter=parameter)
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{parameter}: {name!r} holds no image encoder with its processor ({error})") from error
    return PatchTokens(model.to(devices.pick(device)), processor, Path(name).name)


def stream_parts(stream: str, parameter: str = "streams") -> tuple[str, ...]:
    """Split a stream's name into its parts; ``none`` has no parts.

    Raises:
        ValueError: a part is neither a known word nor a block at a timestep.
    """
    if stream.strip() == NONE:
        return ()
    parts = tuple(part.strip() for part in stream.split("+"))
    for part in parts:
        block, mark, timestep = part.removeprefix(UNTRAINED).rpartition(".t")
        if part not in WORDS and not (mark and block and timestep.isdecimal()):
            raise ValueError(
                f"{parameter}: {part!r} of {stream!r} is no part; expected {CLIP}, {OTHER}, {NOISE}, {NONE}, or a "
                f"block at a timestep such as up_ft1.t25 or {UNTRAINED}up_ft1.t25"
            )
    return parts


def stream_layers(streams: Sequence[str]) -> list[str]:
    """List the blocks at timesteps that streams need, of the trained or the untrained denoiser, each once."""
    parts = [part.removeprefix(UNTRAINED) for stream in streams for part in stream_parts(stream)]
    return [part for part in dict.fromkeys(parts) if part not in WORDS]


def untrained_denoiser(pipeline: Any, seed: int) -> Any:
    """Copy a pipeline with a denoiser of the same architecture and random weights; everything else is shared."""
    denoiser = find_denoiser(pipeline)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(denoiser).from_config(denoiser.config)
    fresh.to(denoiser.device, denoiser.dtype).eval().requires_grad_(False)
    copied = copy.copy(pipeline)
    name = next(name for name in DENOISERS if getattr(pipeline, name, None) is denoiser)
    setattr(copied, name, fresh)
    return copied


@dataclass
class PictureFeatures:
    """Computes the parts of streams for pictures."""

    parts: tuple[str, ...]
    """The parts to compute."""
    encoder: ImageEncoder
    """The image encoder, which gives ``clip`` and the shape of ``noise``."""
    other: ImageEncoder | None = None
    """The other image encoder."""
    pipelines: dict[str, Any] = field(default_factory=dict)
    """The pipelines with a trained (key "") and with an untrained denoiser (key ``untrained:``), as far as needed."""
    seed: int = 0
    """Determines, with a picture's content, the denoiser's noise and the noise tokens."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Compute for pictures (B, 3, H, W) in [-1, 1] each part: tokens (B, T, d) or maps (B, h, w, d), float32.

        Raises:
            ValueError: the image encoder gives maps, or the other encoder gives another number of tokens.
        """
        seeds = [(int(digest(picture.cpu()), 16) ^ self.seed) >> 1 for picture in pixels]
        tokens = self.encoder(pixels).float()
        found = {}
        for part in self.parts:
            if part == CLIP:
                found[part] = tokens
            elif part == NOISE:
                drawn = [torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(one)) for one in seeds]
                found[part] = torch.stack(drawn).to(tokens)
            elif part == OTHER:
                found[part] = self.other(pixels).float()
                if found[part].ndim == 3 and found[part].shape[1] != tokens.shape[1]:
                    raise ValueError(
                        f"other_encoder: {self.other.name} gives {found[part].shape[1]} tokens of a picture, "
                        f"{self.encoder.name} gives {tokens.shape[1]}; interleaving needs as many"
                    )
        for prefix, pipeline in self.pipelines.items():
            found |= self._maps(pipeline, prefix, pixels, seeds)
        return {part: found[part].to(tokens.device) for part in self.parts}

    def _maps(self, pipeline: Any, prefix: str, pixels: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        wanted = [part for part in self.parts if part.startswith(UNTRAINED) == bool(prefix)]
        wanted = [part.removeprefix(prefix) for part in wanted if part not in WORDS]
        by_timestep: dict[int, list[str]] = {}
        for layer in wanted:
            block, timestep = split_layer_name(layer)
            by_timestep.setdefault(timestep, []).append(block)
        found = {}
        for timestep, blocks in by_timestep.items():
            maps = activations.from_pictures(pipeline, pixels, seeds, [timestep], blocks).maps
            found |= {f"{prefix}{block}.t{timestep}": each[0].float() for block, each in maps.items()}
        return found


class FeatureTable:
    """The features of a set of pictures, computed once if they fit in memory, otherwise whenever they are asked for."""

    def __init__(
        self, features: PictureFeatures, pictures: Callable[[Sequence[int]], Tensor], count: int, batch_size: int = 32,
        *, hold: bool = True,
    ):  # fmt: skip
        """Compute the features, in batches of consecutive pictures, and hold them in float16.

        Args:
            features: computes them.
            pictures: reads pictures by their indices, (B, 3, H, W) in [-1, 1].
            count: the number of pictures.
            batch_size: the number of pictures that are encoded together.
            hold: False computes nothing beforehand, as for an estimate.

        Raises:
            ValueError: a feature is not finite.
        """
        self.features, self.pictures, self.count = features, pictures, count
        first = features(pictures(range(min(batch_size, count))))
        self.shapes = {part: tuple(values.shape[1:]) for part, values in first.items()}
        self.bytes = 2 * count * sum(int(np.prod(shape)) for shape in self.shapes.values())
        self._held: dict[str, Tensor] | None = None
        if not hold or self.bytes > HELD_BYTES:
            where = "each batch computes its own" if self.bytes > HELD_BYTES else "they will be held in memory"
            print(f"the features of {count:,} pictures take {readable(self.bytes)}: {where}")
            return
        self._held = {part: torch.empty(count, *shape, dtype=torch.float16) for part, shape in self.shapes.items()}
        starts = range(0, count, batch_size)
        for begin in tqdm(starts, desc="features", file=sys.stdout, mininterval=2, ncols=100):
            rows = range(begin, min(begin + batch_size, count))
            for part, values in (first if begin == 0 else features(pictures(rows))).items():
                self._held[part][rows.start : rows.stop] = values.clamp(-65504, 65504).half().cpu()
        for part, values in self._held.items():
            if not all_finite(values):
                raise ValueError(f"streams: {part!r} has NaN or infinite features")

    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the features of pictures by their indices, float32."""
        if self._held is None:
            return self.features(self.pictures(rows))
        chosen = torch.as_tensor(list(rows))
        return {part: values[chosen].float() for part, values in self._held.items()}

    def statistics(self) -> dict[str, Statistics]:
        """Measure each part's channels on the first pictures."""
        found = self.take(range(min(STATISTICS_PICTURES, self.count)))
        flat = {part: values.reshape(-1, values.shape[-1]) for part, values in found.items()}
        return {part: Statistics(values.mean(0), values.std(0) + 1e-6) for part, values in flat.items()}
