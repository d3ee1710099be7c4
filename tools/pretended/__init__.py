"""Runs chapters as on a machine with GPUs where there is none: `device`, `four_bits`, `machine`, `held`, `live`, `chapters`."""
