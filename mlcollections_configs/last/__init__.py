"""Settings of LAST (Tang et al. 2024)."""
