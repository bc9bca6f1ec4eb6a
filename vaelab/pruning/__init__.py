"""Wing 2: PeLAP-A, adaptive pruning of latent channels."""
