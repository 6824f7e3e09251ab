"""Settings of PENCIL."""
