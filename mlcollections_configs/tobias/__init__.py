"""Settings of Tobias (Cao & Wu, AAAI 2022)."""
