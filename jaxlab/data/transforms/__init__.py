"""Decoding on the host, and augmentation on the device."""
