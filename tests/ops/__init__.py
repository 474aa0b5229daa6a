"""Operators of PyTorch's own OpInfo database, compiled and compared with eager."""
