"""The checkpoint formats of the field, each read into this package's config and tensor names. Knows configs and names of tensors; reads no
weights and no network.
"""
