"""Make a denoiser's inputs from a picture and a prompt: scaled latents, noise, timestep, conditioning.

Each kind of pipeline encodes these in its own way; the functions here work for all of them. They read what a model or
scheduler needs from its configuration and its own functions.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.models import loading
from vaelab.models.block_names import architecture, find_denoiser
from vaelab.models.vocabulary import report_unknown_words

UNET, DIT, FLUX = "UNet2DConditionModel", "DiTTransformer2DModel", "FluxTransformer2DModel"
FLUX_PATCH = 2
"""Side of the square of latent pixels that is one token of FLUX; its pipeline forms the tokens."""
AESTHETIC_SCORE = 6.0, 2.5
"""Aesthetic scores that condition SDXL's refiner with and without a prompt; the defaults of its pipeline."""


def is_class_conditional(pipeline: Any) -> bool:
    """Whether the pipeline's prompts are classes."""
    return architecture(find_denoiser(pipeline)) == DIT


def is_flow(pipeline: Any) -> bool:
    """Whether the pipeline's schedule is a rectified flow.

    This is the case if the scheduler's configuration says so (a diffusion solver that is set to flow sigmas), or if
    the scheduler has the function with which diffusers' flow schedulers add noise.
    """
    scheduler = pipeline.scheduler
    by_config = scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    return bool(by_config) or hasattr(scheduler, "scale_noise")


def last_timestep(pipeline: Any) -> int:
    """Return the timestep with the most noise."""
    return pipeline.scheduler.config.num_train_timesteps - (0 if is_flow(pipeline) else 1)


def validate_timesteps(pipeline: Any, timesteps: Sequence[int]) -> None:
    """Raise ValueError if the pipeline's scheduler does not have one of these timesteps, or there is none."""
    last = last_timestep(pipeline)
    if not timesteps or min(timesteps) < 0 or max(timesteps) > last:
        raise ValueError(f"timesteps: expected numbers from 0 to {last}, got {list(timesteps)}")


def patch_size(model: nn.Module) -> int:
    """Return the side of the square of latent pixels that is one token of a denoiser; 1 for a U-Net."""
    return FLUX_PATCH if architecture(model) == FLUX else model.config.get("patch_size", 1)


def encode_pictures(pipeline: Any, pixels: Tensor) -> Tensor:
    """Encode pictures (B, 3, H, W) in [-1, 1] to latents (B, c, h, w) as the denoiser takes them.

    The latents are the posterior's means, shifted and scaled so that the pipeline's own decoding undoes it (see
    :func:`vaelab.models.loading.uses_latent_statistics`). For a model that works on pixels they are the pictures,
    resized to the model's size.

    Raises:
        ValueError: autoencoder and denoiser cannot divide the sides evenly.
    """
    model, vae = find_denoiser(pipeline), getattr(pipeline, "vae", None)
    pixels = pixels.to(model.device)
    if vae is None:  # resized in float32: on a CPU there is no such kernel for half precision
        sized = nn.functional.interpolate(pixels, size=model.config.sample_size, mode="bilinear", antialias=True)
        return sized.to(model.dtype)
    pixels = pixels.to(model.dtype)
    with _wide_enough(vae):
        latents = loading.encode_latents(vae, pixels.to(vae.dtype))
    multiple = pixels.shape[-1] // latents.shape[-1] * patch_size(model)
    if any(side % multiple for side in pixels.shape[-2:]):
        height, width = pixels.shape[-2:]
        raise ValueError(f"resolution: pictures of {height} x {width}; this model takes multiples of {multiple}")
    used = loading.uses_latent_statistics(pipeline)
    return loading.scale_latents(vae, latents, statistics=used).to(model.dtype)


@contextlib.contextmanager
def _wide_enough(vae: nn.Module) -> Iterator[None]:
    """Run a VAE in float32 inside the context if it overflows in float16, like the SDXL-VAE."""
    dtype = vae.dtype
    overflows = dtype == torch.float16 and vae.config.get("force_upcast")
    nn.Module.to(vae, torch.float32 if overflows else dtype)
    try:
        yield
    finally:
        nn.Module.to(vae, dtype)


def add_noise(pipeline: Any, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Add noise to latents by the pipeline's own schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, or for a
    rectified flow x_t = (1 - t / T) x_0 + (t / T) eps.

    Args:
        pipeline: a diffusers pipeline.
        latents: x_0, (B, c, h, w).
        noise: eps, of the same shape.
        timestep: t, from 0 to :func:`last_timestep`.

    Raises:
        ValueError: the scheduler has no ``alphas_cumprod`` and is not a rectified flow, or its flow runs backwards
            (``invert_sigmas``).
    """
    scheduler = pipeline.scheduler
    if is_flow(pipeline):
        if scheduler.config.get("invert_sigmas"):
            raise ValueError(
                f"model: {type(scheduler).__name__} with invert_sigmas runs its flow backwards; unsupported"
            )
        share = timestep / scheduler.config.num_train_timesteps
        return (1 - share) * latents + share * noise
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"model: {type(scheduler).__name__} has neither alphas_cumprod nor is it a rectified flow")
    signal = scheduler.alphas_cumprod[timestep].item()  # abar_t, the signal's share of the variance
    return signal**0.5 * latents + (1 - signal) ** 0.5 * noise


def encode_prompts(
    pipeline: Any, prompts: Sequence[str | int] | None, count: int, size: Sequence[int]
) -> dict[str, Any]:
    """Make the denoiser's arguments besides latents and timestep: text states, class indices, sizes, guidance
    embeddings.

    Args:
        pipeline: a diffusers pipeline.
        prompts: one prompt per picture; for a class-conditional model class indices or class names. None means no
            prompt, as in classifier-free guidance: the empty prompt, zeros for SDXL, and the class after the last for
            a class-conditional model. Words that no text model of the pipeline can represent are printed.
        count: the number of pictures.
        size: (height, width) of the pictures in pixels, on which some models are conditioned.

    Raises:
        ValueError: the model does not have one of the classes.
    """
    model = find_denoiser(pipeline)
    if is_class_conditional(pipeline):
        none = [model.config.num_embeds_ada_norm] * count
        numbers = none if prompts is None else class_numbers(pipeline, prompts)
        return {"class_labels": torch.tensor(numbers, device=model.device)}
    texts = [""] * count if prompts is None else [str(prompt) for prompt in prompts]
    report_unknown_words(pipeline, texts)
    conditions = CONDITIONS[architecture(model)](pipeline, texts, size)
    if prompts is not None or architecture(model) != UNET:
        return conditions
    added = dict(conditions.get("added_cond_kwargs", {}))
    if getattr(pipeline.config, "requires_aesthetics_score", False):
        added["time_ids"] = torch.cat(
            [added["time_ids"][:, :-1], torch.full_like(added["time_ids"][:, -1:], AESTHETIC_SCORE[1])], 1
        )
    if getattr(pipeline.config, "force_zeros_for_empty_prompt", False) and added:
        conditions["encoder_hidden_states"] = torch.zeros_like(conditions["encoder_hidden_states"])
        added["text_embeds"] = torch.zeros_like(added["text_embeds"])
    return {**conditions, "added_cond_kwargs": added} if added else conditions


def class_numbers(pipeline: Any, prompts: Sequence[str | int]) -> list[int]:
    """Convert prompts of a class-conditional model, indices or names of its classes, to class indices.

    Raises:
        ValueError: the model does not have one of the classes.
    """
    labels = getattr(pipeline, "labels", {})
    known = 1 + max(labels.values()) if labels else find_denoiser(pipeline).config.num_embeds_ada_norm
    found = []
    for prompt in prompts:
        synonyms = [str(prompt), *map(str.strip, str(prompt).split(","))]
        number = next((labels[name] for name in synonyms if name in labels), str(prompt))
        if not str(number).isdecimal() or int(number) >= known:
            named = f", or names such as {next(iter(labels))!r}" if labels else ""
            raise ValueError(f"prompts: expected class numbers from 0 to {known - 1}{named}, got {prompt!r}")
        found.append(int(number))
    return found


def predict(pipeline: Any, noisy: Tensor, timestep: int, conditions: dict[str, Any]) -> Tensor:
    """Run the denoiser once over noisy latents (B, c, h, w) and return its prediction unchanged.

    It has the latents' shape; some models add further channels for the variance. FLUX returns tokens (B, h/2 w/2, 4 c).

    Args:
        pipeline: a diffusers pipeline.
        noisy: the noisy latents from :func:`add_noise`.
        timestep: the timestep to which they were noised.
        conditions: the arguments from :func:`encode_prompts`.
    """
    model = find_denoiser(pipeline)
    times = torch.full((len(noisy),), timestep, device=noisy.device)
    if architecture(model) != FLUX:
        return model(noisy, timestep=times, **conditions, return_dict=False)[0]
    share = times.to(noisy.dtype) / pipeline.scheduler.config.num_train_timesteps
    tokens, places = _flux_tokens(noisy)
    return model(tokens, timestep=share, img_ids=places, **conditions, return_dict=False)[0]


def prediction_target(pipeline: Any, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Compute what a perfect denoiser of this kind predicts, in float32.

    This is the noise eps, the velocity sqrt(abar) eps - sqrt(1 - abar) x_0, or the sample x_0, depending on the
    model's prediction type; for a rectified flow it is eps - x_0.

    Args:
        pipeline: a diffusers pipeline.
        latents: x_0, (B, c, h, w).
        noise: eps, of the same shape.
        timestep: t.

    Raises:
        ValueError: the prediction type is unknown, or the model is FLUX, which predicts tokens.
    """
    latents, noise = latents.float(), noise.float()
    if is_flow(pipeline):
        if architecture(find_denoiser(pipeline)) == FLUX:
            raise ValueError("model: FLUX predicts tokens; only predictions of latents can be compared")
        return noise - latents
    kind = pipeline.scheduler.config.prediction_type
    signal = pipeline.scheduler.alphas_cumprod[timestep].item()
    targets = {
        "epsilon": noise,
        "v_prediction": signal**0.5 * noise - (1 - signal) ** 0.5 * latents,
        "sample": latents,
    }
    if kind not in targets:
        raise ValueError(f"model: its prediction_type is {kind!r}; supported are {', '.join(targets)}")
    return targets[kind]


def _flux_tokens(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange squares of latent pixels as tokens (B, n, 4 c); return them with their positions (n, 3): 0, row,
    column."""
    height, width = (side // FLUX_PATCH for side in latents.shape[-2:])
    squares = latents.unflatten(3, (width, FLUX_PATCH)).unflatten(2, (height, FLUX_PATCH))  # (B, c, h, 2, w, 2)
    tokens = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return tokens, torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(latents)


def _unet_condition(pipeline: Any, texts: list[str], size: Sequence[int]) -> dict[str, Any]:
    device = pipeline.unet.device
    states, *others = pipeline.encode_prompt(
        texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    conditions = {"encoder_hidden_states": states}
    width = pipeline.unet.config.get("time_cond_proj_dim")
    if width is not None:  # a model distilled from guided ones, such as LCM, takes the guidance scale minus 1
        unguided = pipeline.get_guidance_scale_embedding(torch.zeros(len(texts)), embedding_dim=width)
        conditions["timestep_cond"] = unguided.to(device, states.dtype)
    if pipeline.unet.config.addition_embed_type != "text_time":
        return conditions
    original, corner, target = [*size], [0, 0], [*size]
    if getattr(pipeline.config, "requires_aesthetics_score", False):
        target = [AESTHETIC_SCORE[0]]
    ids = torch.tensor([original + corner + target] * len(texts), device=device, dtype=states.dtype)
    return {**conditions, "added_cond_kwargs": {"text_embeds": others[1], "time_ids": ids}}


def _pixart_condition(pipeline: Any, texts: list[str], size: Sequence[int]) -> dict[str, Any]:
    device = pipeline.transformer.device
    states, mask, *_ = pipeline.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
    sizes = {"resolution": None, "aspect_ratio": None}
    if pipeline.transformer.use_additional_conditions:
        values = {"resolution": [*size], "aspect_ratio": [size[0] / size[1]]}
        sizes = {
            name: torch.tensor([value] * len(texts), device=device, dtype=states.dtype)
            for name, value in values.items()
        }
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}


def _sd3_condition(pipeline: Any, texts: list[str], size: Sequence[int]) -> dict[str, Any]:
    states, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, device=pipeline.transformer.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _flux_condition(pipeline: Any, texts: list[str], size: Sequence[int]) -> dict[str, Any]:
    model = pipeline.transformer
    states, pooled, places = pipeline.encode_prompt(texts, None, device=model.device)
    unguided = torch.ones(len(texts), device=model.device) if model.config.guidance_embeds else None
    return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": places, "guidance": unguided}


CONDITIONS: dict[str, Callable[[Any, list[str], Sequence[int]], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet_condition,
    "PixArtTransformer2DModel": _pixart_condition,
    "SD3Transformer2DModel": _sd3_condition,
    "FluxTransformer2DModel": _flux_condition,
}
