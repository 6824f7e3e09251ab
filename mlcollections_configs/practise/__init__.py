"""Settings of PRACTISE (Wang & Wu, CVPR 2023)."""
