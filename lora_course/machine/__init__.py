"""Where the course runs: what is installed there, what is missing, and how both are mended.

Nothing here imports torch or PEFT at the top, since it has to speak where they can't be imported.
"""
