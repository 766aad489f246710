"""Room 0: plain data that every other room speaks. Standard library only, no torch."""
