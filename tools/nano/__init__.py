"""nano, the course's small base model: its text, its training, what is measured of it and its card; `tools.pretrain_nano` is the command."""
