"""Runs chapters as on a machine with GPUs where there is none: see `device` and `chapters`."""
