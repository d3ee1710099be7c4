"""Exercises: their checks, and what follows from them for a class."""
