"""Faults of disks and machines: flipped bits, kills, calls that fail, power cuts."""
