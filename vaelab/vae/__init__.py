"""Wing 1: suppressed channels of a variational autoencoder."""
