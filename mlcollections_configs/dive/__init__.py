"""Settings of DiVE (He et al., ICCV 2021)."""
