"""Settings of SfN (Shao & Wu 2025)."""
