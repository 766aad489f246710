"""Room 8: measurements. Every figure is a ratio against a peer in one run, in turns, warm."""
