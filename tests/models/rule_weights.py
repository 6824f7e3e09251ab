"""Weights by rule: the reference outputs of full-size networks belong to them, and none are stored."""

import zlib

import numpy as np


def rule_tensor(name, shape):
  """The float32 checkpoint entry `name` (PyTorch layout), a function of name and shape."""
  noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.endswith('running_var'):
    value = 1.0 + 0.1 * np.abs(noise)
  elif name.endswith(('bias', 'running_mean')):
    value = 0.1 * noise
  elif name.endswith('weight') and len(shape) <= 1:
    value = 1.0 + 0.1 * noise
  elif name.endswith('weight'):
    value = noise / np.sqrt(np.prod(shape[1:]))
  else:
    value = 0.1 * noise
  return value.astype(np.float32)
