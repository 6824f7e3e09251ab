"""Settings of GPLQ (Liang et al., NeurIPS 2025)."""
