"""Settings of EFPC (Cao et al., 2025)."""
