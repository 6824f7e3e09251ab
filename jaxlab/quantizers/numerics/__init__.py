"""One tensor: rounding, ranges, affine, logarithmic and learned quantizers, GPTQ, integers."""
