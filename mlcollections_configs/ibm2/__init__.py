"""Settings of IbM2 (Fu et al., CVPR 2024)."""
