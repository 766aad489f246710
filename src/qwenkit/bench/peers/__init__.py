"""The engines that are measured, one a file, each run in a process and an environment of its own.

A file here imports its engine only when the engine is made, and nothing of qwenkit but its
neighbours: an engine's environment has no qwenkit installed.
"""
