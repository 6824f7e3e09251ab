"""Settings of mWh."""
