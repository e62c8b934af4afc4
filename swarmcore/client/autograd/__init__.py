"""Batches forward and backward through remote blocks, as part of PyTorch's autograd."""
