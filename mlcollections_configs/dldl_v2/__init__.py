"""Settings of DLDL-v2 (Gao et al., IJCAI 2018)."""
