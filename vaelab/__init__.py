"""vaelab: a lab for looking inside the two halves of a latent diffusion model, the VAE and the denoiser.

The subjects of the lab are folders: ``vae`` (a VAE's channels), ``pruning`` (masks on the latent), ``sae``
(sparse autoencoders on a denoiser's activations), ``probing`` (what layers and timesteps encode) and ``world``
(synthetic pictures with known factors). They build on ``data``, ``models``, ``hooks``, ``activations`` and
``store``, which load pictures and models, read and edit layers, and keep activations on disk.

Importing ``vaelab`` imports nothing else: ``from vaelab import sae`` loads what it needs.
"""

__version__ = "0.1.0"
