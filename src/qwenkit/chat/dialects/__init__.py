"""Tool calling as one kind of model knows it: one dialect a file, found by scanning (`spec.py`)."""
