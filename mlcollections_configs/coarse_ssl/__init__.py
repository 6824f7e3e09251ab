"""Settings of coarse crops (Zhu et al. 2023)."""
