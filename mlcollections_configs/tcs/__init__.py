"""Settings of TCS."""
