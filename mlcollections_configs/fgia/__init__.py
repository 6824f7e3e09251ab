"""Settings of fine-grained image analysis."""
