"""Settings of DTL (Fu, Zhu & Wu, AAAI 2024)."""
