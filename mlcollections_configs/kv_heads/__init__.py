"""Settings of KV heads (Yu et al. 2024)."""
