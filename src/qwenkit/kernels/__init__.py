"""Room 1: the arithmetic. Ops with a schema, a torch reference and cases; backends that replace the
reference on a device. Knows no layer and no model.
"""
