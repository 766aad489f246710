"""Room 3: LoRA adapters (arXiv 2106.09685) in PEFT's layout: what their files say, one at a model
that trains, many at a model that serves. Knows no files, formats or architectures: a layer is
adapted by what it is, a `Linear`, and found by its published path.
"""
