"""A whole network: rules by path, calibration, post-training and learned quantization, execution, storage."""
