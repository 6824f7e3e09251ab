"""Settings of GML (Du & Wu, CVPR 2023)."""
