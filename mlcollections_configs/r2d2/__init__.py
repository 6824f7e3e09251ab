"""Settings of R2-D2."""
