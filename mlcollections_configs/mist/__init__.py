"""Settings of MIST (Tang et al. 2025)."""
