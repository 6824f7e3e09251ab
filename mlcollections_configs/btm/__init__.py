"""Settings of BTM (Yu et al. 2024)."""
