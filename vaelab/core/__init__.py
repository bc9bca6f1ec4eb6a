"""Shared basics: validation, paths, files, devices, configuration, statistics, timing."""
