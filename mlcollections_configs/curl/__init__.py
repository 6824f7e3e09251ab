"""Settings of CURL."""
