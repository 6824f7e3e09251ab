"""Settings of MLS."""
