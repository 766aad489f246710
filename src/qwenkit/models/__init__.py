"""Room 3: one architecture a file. A new one is found by scanning this folder."""
