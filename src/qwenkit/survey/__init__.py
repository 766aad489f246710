"""Room 5: what a checkpoint and a machine are, before anything runs."""
