"""Settings of NRS (Cao et al., Pattern Recognition 2021)."""
