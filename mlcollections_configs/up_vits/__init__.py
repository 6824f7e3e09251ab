"""Settings of UP-ViTs (Yu & Wu, Science China Information Sciences 2023)."""
