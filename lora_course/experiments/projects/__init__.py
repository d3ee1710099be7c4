"""The chapters' open projects, carried out: one small study each, which book/projects.md tells the outcome of.

Each says before its first run what it asks and what it expects; settings, arms and scoring are those of the chapter's study.
Three seeds are an observation.
"""
