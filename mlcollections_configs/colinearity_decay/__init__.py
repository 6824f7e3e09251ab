"""Settings of Colinearity Decay (Tong et al. 2026)."""
