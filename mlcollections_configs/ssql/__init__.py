"""Settings of SSQL (Cao et al., ECCV 2022)."""
