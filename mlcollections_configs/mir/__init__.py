"""Settings of MiR (Wang et al., CVPR 2022)."""
