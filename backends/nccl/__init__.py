"""Collectives: `dist` ops to calls of torch's functional collectives, on the process groups of a DeviceMesh."""

from .lower import collective_order, lower_collectives

__all__ = ["collective_order", "lower_collectives"]
