"""Room 3: one storage format a file. A new one is found by scanning this folder."""
