"""The board of reliability: what goes wrong in the world, done to this program on purpose.

A row is the file `rows/rNN_<name>.py` with a constant `ROW`; the board finds them by scanning. Each
row injects one kind of fault, counts what kept its promise, and keeps whatever did not as a file
that later runs try again. `spec` has the shapes, `board` what rows are given, `runner` the loop.
"""
