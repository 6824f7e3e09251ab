"""Settings of US3L."""
