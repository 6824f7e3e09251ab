"""Settings of CSRA."""
