"""Benchmarks of tracking, collecting, the store and the autoencoders."""
