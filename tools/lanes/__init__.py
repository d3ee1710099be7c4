"""Lanes: the course as it meets the world, each a `make` target and a workflow. `image`, `wheel`, `sphinx9`."""
