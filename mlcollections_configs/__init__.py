"""Configurations: one folder a paper, one file a setting."""
