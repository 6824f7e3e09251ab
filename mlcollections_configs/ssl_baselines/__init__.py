"""Settings of the self-supervised baselines."""
