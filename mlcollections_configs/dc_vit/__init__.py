"""Settings of DC-ViT (Zhang, Zhou, Wang & Wu, CVPR 2024)."""
