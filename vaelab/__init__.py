"""vaelab: looking inside the two halves of a latent diffusion model, the VAE and the denoiser.

The package is the vocabulary of the notebooks. Its modules stand on floors and import only
downward (``tests/test_floors.py`` holds them to it)::

    0  checks, devices, files                    what is refused and how; where things run
    1  hooks, models, embedded_data,             reading layers, loading models,
       preprocessing, plots, checkpoints         pictures to tensors, drawing, saving
    2  training, data, channels, vae, report     training, pictures, statistics, results
    3  nudge, lens                               silent channels woken; what a layer sees
    4  study, frontpage                          fine-tuning; what has been run
    5  comparison, causes, bench, runs           runs side by side; how fast; params files

Importing ``vaelab`` imports nothing else: ``from vaelab import channels`` loads what it needs.
"""

__version__ = "0.1.0"
