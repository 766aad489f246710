"""The shapes of what clients send and get: what is taken, and what the published schema says.

Requests are read into these models. Answers are written by hand, token by token; the models of
answers are there for the schema, and tests hold the two together.
"""
