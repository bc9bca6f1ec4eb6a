"""vaelab: looking inside the two halves of a latent diffusion model, the VAE and the denoiser.

The package is the vocabulary of the notebooks. Its modules stand on floors and import only
downward (``tests/test_floors.py`` holds them to it)::

    0  checks, devices                     what is refused and how; where things run
    1  hooks, models, training, plots      reading layers, loading models, training, drawing
    2  data, channels, lens, report        pictures, channel statistics, the lens, results
    3  nudge                               what is done to suppressed channels
    4  vae, bench, runs, frontpage         the studies; how fast; running params files

Importing ``vaelab`` imports nothing else: ``from vaelab import channels`` loads what it needs.
"""

__version__ = "0.1.0"
