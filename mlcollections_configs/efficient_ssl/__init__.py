"""Settings of Efficient SSL."""
