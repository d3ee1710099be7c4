"""The chapters' open projects, run once: a study each, whose docstring was written before its first run."""
