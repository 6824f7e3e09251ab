"""Settings of feature mimicking (LSHFM)."""
