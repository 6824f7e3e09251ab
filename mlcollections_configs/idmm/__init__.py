"""Settings of IDMM."""
