"""Settings of ACSR (Fu et al., ECCV 2022)."""
