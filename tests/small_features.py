"""Features of a small model, with all that they are shown and scored on."""

from types import SimpleNamespace

import torch

from vaelab.activations import collect
from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling
from vaelab.data.prompts import load_prompts
from vaelab.sae import feature_scores
from vaelab.sae.feature_statistics import collect_statistics
from vaelab.sae.model import SAE, SAEConfig

BLOCK, WIDTH, N = "up.1.1", 16, 40


def pictures(count, side=8, seed=1):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class MeanColours:
    """Embeds a picture by the mean colour of its quarters."""

    name = "mean colours"

    def embed_pictures(self, pixels):
        quarters = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return torch.nn.functional.normalize(quarters + 0.1)


class Letters:
    """Embeds a sentence by how often it has some letters."""

    name = "letters"

    def embed_sentences(self, sentences):
        counts = [[1.0 + sentence.count(letter) for letter in "abcdefgh"] for sentence in sentences]
        return torch.nn.functional.normalize(torch.tensor(counts))


def collect_small(pipeline, folder, blocks, count, *, side="update", settings=None):
    """A store of both halves of a few prompts, as notebook 30 collects it."""
    prompts = load_prompts("world", count=count)
    config = CollectConfig(blocks, Sampling(1, 2.0), side=side, halves="both")
    layout, per_prompt, _ = collect.run_trial_batch(pipeline, prompts.texts, config)
    return collect.collect_prompts(
        pipeline, prompts.texts, config, folder, layout=layout, items_per_prompt=per_prompt, rows=prompts.rows,
        settings=settings, progress=False,
    )  # fmt: skip


def build(pipeline, folder):
    """A small pipeline, a store of six prompts, an autoencoder with its statistics, and a scorer."""
    stored = collect_small(pipeline, folder, (BLOCK,), 6)
    mean = stored.maps(BLOCK, range(4)).float().mean((0, 1, 2))
    sae = feature_scores.controls_of(SAE(SAEConfig(WIDTH, N, 3)), mean)["untrained"]
    statistics = collect_statistics(sae, stored, BLOCK, step=0)
    shown = feature_scores.ItemPictures(pipeline, stored, MeanColours(), batch_size=4)
    pool = feature_scores.items_at_step(stored, 0)
    scoring = feature_scores.ScoreConfig(
        0, examples=3, top=0.5, steered=2, betas=(-5.0, 5.0), prompts=2, samples=3, batch_size=4
    )
    scorer = feature_scores.FeatureScorer(
        pipeline, shown, pool, scoring, textures=pictures(3), sentences=Letters(), held_out=stored
    )
    return SimpleNamespace(
        pipeline=pipeline, store=stored, sae=sae, statistics=statistics, pictures=shown, pool=pool, scorer=scorer
    )
