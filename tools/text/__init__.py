"""The course's text: a room for each kind of source, for how documents are split, and for the data card; `tools.build_text` writes it."""
