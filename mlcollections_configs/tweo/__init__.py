"""Settings of TWEO (Liang et al. 2026)."""
