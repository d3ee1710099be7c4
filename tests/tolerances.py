"""How far two results may differ, and why: `torch.testing.assert_close(found, expected, **ROUNDED)`.

A difference of another size, for a reason of its own, is stated where it is used.
"""

EXACT = {"atol": 0, "rtol": 0}
"""The same operations in the same order: to the last bit."""

ROUNDED = {"atol": 1e-5, "rtol": 1e-5}
"""The same numbers added in another order: a sum of 100 terms in fp32 is off by 100 · 6e-8, through a few layers."""

TRAINED = {"atol": 1e-5, "rtol": 1e-4}
"""Rounding that several optimiser steps have passed on: Adam divides by a gradient's size, so a small one carries it far."""
