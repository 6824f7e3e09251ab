"""Settings of NBC (Sun and Wu 2026)."""
