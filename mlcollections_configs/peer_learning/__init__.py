"""Settings of Peer-learning."""
