"""What the page that plays holds: trained, scored, recorded, and packed for a browser. `python -m tools.playpage` makes it."""
