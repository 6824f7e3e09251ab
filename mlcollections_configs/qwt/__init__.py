"""Settings of QwT (Fu et al., CVPR 2025)."""
