"""Settings of QFD (Zhu, He & Wu, AAAI 2023)."""
