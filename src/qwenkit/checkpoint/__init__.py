"""Room 3: the only readers and writers of model files. Hands out raw tensors with a storage tag;
knows no model.
"""
