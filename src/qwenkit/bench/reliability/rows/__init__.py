"""One row of the board a file, each with a constant `ROW`."""
