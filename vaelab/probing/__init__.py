"""Wing 4: what layers and timesteps of a denoiser know (Revelio)."""
