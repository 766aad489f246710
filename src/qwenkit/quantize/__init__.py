"""Room 5: chooses the numbers of a quantized model, layer by layer, and judges what came out."""
