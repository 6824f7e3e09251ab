"""Programs around the experiments: reports, compilation for pods, measurements of speed, comparisons."""
