"""Settings of Friends and Foes."""
