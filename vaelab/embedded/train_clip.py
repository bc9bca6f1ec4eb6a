"""Training of the small CLIP shipped with the package, on pictures and prompts of the scene world.

Radford et al. (2021), section 2.3: pictures and prompts are embedded in one space, and each picture of a batch must
find its prompt, and each prompt its picture. The text model starts from the embedded pipeline's text encoder, which has
learned to read the world's prompts; the picture model starts from random weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least
from vaelab.embedded.train_unet import training_precision
from vaelab.models.loading import quiet_imports
from vaelab.models.registry import embedded_path
from vaelab.training.batches import Batches, NumberedBatches
from vaelab.training.loop import TrainConfig, Trained, train
from vaelab.training.planning import TrainingPlan, plan_training
from vaelab.world.scenes import SIDE, render, sample

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

BATCH_SIZE = 64
SCHEDULE = 500
"""The learning rate falls over at least so many steps: a shorter training is the beginning of a longer one."""
PATCH = 16
"""Side of the patches of a picture, in pixels: 4 x 4 tokens."""
WIDTH, LAYERS = 128, 4
"""Channels and layers of the picture model."""


class TrainedClip(NamedTuple):
    """Result of :func:`train_clip`."""

    model: "CLIPModel"
    processor: "CLIPProcessor"
    trained: Trained


class ContrastiveObjective(nn.Module):
    """The symmetric cross-entropy of pictures and prompts (Radford et al. 2021, figure 3).

    Args:
        clip: a ``transformers.CLIPModel``.
    """

    def __init__(self, clip: "CLIPModel"):
        super().__init__()
        self.clip = clip

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: ``pixel_values`` (B, 3, 64, 64), ``input_ids`` and ``attention_mask`` (B, L).

        Returns:
            Scalars: the ``loss``, and the ``accuracy``: the share of pictures whose own prompt is the nearest.
        """
        found = self.clip(**batch, return_loss=True)
        nearest = found.logits_per_image.argmax(1)
        own = torch.arange(len(nearest), device=nearest.device)
        return {"loss": found.loss, "accuracy": (nearest == own).float().mean()}


def new_clip(seed: int = 0) -> tuple["CLIPModel", "CLIPProcessor"]:
    """Make a CLIP whose picture model is untrained and whose text model is the embedded pipeline's text encoder."""
    with quiet_imports():
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")
    text = CLIPTextModel.from_pretrained(embedded_path() / "text_encoder", dtype=torch.float32)
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    # the folder that the text model came from must not be saved with this one
    reads = {name: value for name, value in text.config.to_dict().items() if name != "_name_or_path"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=reads, vision_config=vision, projection_dim=text.config.hidden_size))
    # older versions of transformers have one more name in the path
    model.text_model.load_state_dict({name.removeprefix("text_model."): v for name, v in text.state_dict().items()})
    sides = {"height": SIDE, "width": SIDE}
    return model, CLIPProcessor(CLIPImageProcessor(size=sides, crop_size=sides), tokenizer)


def pair_batches(batch_size: int, processor: "CLIPProcessor") -> Batches:
    """Make endless batches of training scenes and their prompts, for :meth:`ContrastiveObjective.forward`."""
    at_least("batch_size", batch_size, 1)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )

    def make(number: int) -> dict[str, Tensor]:
        scenes = [sample(number * batch_size + i) for i in range(batch_size)]
        tokens = processor.tokenizer([scene.prompt for scene in scenes], padding=True, return_tensors="pt")
        pixels = ((render(scenes) + 1) / 2 - mean) / std
        return {"pixel_values": pixels, "input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    return NumberedBatches(make)


def train_clip(folder: str | Path, *, steps: int, device: str = "auto", seed: int = 0) -> TrainedClip:
    """Train the small CLIP; an interrupted training is resumed from the folder's checkpoint.

    Args:
        folder: the folder for the checkpoint.
        steps: the number of steps, with 64 pictures and prompts each.
        device: the device to train on.
        seed: determines the initial weights of the picture model.
    """
    model, processor = new_clip(seed)
    trained = train(
        ContrastiveObjective(model), pair_batches(BATCH_SIZE, processor), _training(steps, device, seed),
        folder=folder, settings={"batch_size": BATCH_SIZE, "width": WIDTH, "layers": LAYERS, "patch": PATCH},
        title="CLIP",
    )  # fmt: skip
    return TrainedClip(model, processor, trained)


def plan_clip(*, steps: int, device: str = "auto", seed: int = 0) -> TrainingPlan:
    """Estimate what :func:`train_clip` takes; the arguments are its own."""
    model, processor = new_clip(seed)
    batches = pair_batches(BATCH_SIZE, processor)
    return plan_training(ContrastiveObjective(model), batches, _training(steps, device, seed), "CLIP")


def retrieval_accuracy(model: "CLIPModel", processor: "CLIPProcessor", seeds: Sequence[int], split: str) -> float:
    """Compute the share of pictures of a split's scenes whose own prompt, with every factor named, is nearest among the
    prompts of all these scenes."""
    from vaelab.models.clip import Clip

    clip, scenes = Clip(model, processor), [sample(seed, split) for seed in seeds]
    pictures = clip.embed_pictures(render(scenes))
    prompts = clip.embed_sentences([scene.spelled_out().prompt for scene in scenes])
    nearest = (pictures @ prompts.T).argmax(1)
    return float((nearest == torch.arange(len(scenes), device=nearest.device)).float().mean())


def _training(steps: int, device: str, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, learning_rate=1e-3, weight_decay=0.05, warmup=min(50, steps // 2), schedule="cosine",
        horizon=max(steps, SCHEDULE), precision=training_precision(device), device=device, seed=seed, log_every=20,
        checkpoint_every=50,
    )  # fmt: skip
