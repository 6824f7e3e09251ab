"""Settings of QwT-v2 (Tang et al. 2025)."""
