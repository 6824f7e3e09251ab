"""Settings of S3L."""
