"""What is left of a pruned network is an ordinary one: it goes through quantization as any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from models.random_variables import random_images, random_variables

from jaxlab import compression, quantizers
from jaxlab.models import ResNet, ViT
from jaxlab.quantizers.compensation import QwT, compensate
from jaxlab.quantizers.networks.execution import integer_network

X = random_images((8, 8, 8, 3))
NETWORKS = {
  'resnet': (
    ResNet((1, 2), width=4, strides=(1, 2), stem='cifar', num_classes=5),
    {'layer1': [0, 1, 3], 'layer2_0/conv1': range(5)},
    ['layer2_1'],
  ),
  'vit': (
    ViT(4, 8, 12, 2, num_heads=2, num_classes=5),
    {
      'blocks_0/attention/qkv': [0, 2, 4, 6, 8, 10],
      'blocks_1/mlp/fc1': range(30),
      'neck': range(10),
    },
    ['blocks_1/attention'],
  ),
}


@pytest.mark.parametrize('name', tables.first(NETWORKS))
def test_a_pruned_network_is_quantized_compensated_and_runs_in_integers(name):
  model, keep, drop = NETWORKS[name]
  variables = random_variables(model, X)
  plan = compression.plan(model, keep, drop)
  small, own = compression.slice_network(model, variables, plan)
  x = jnp.asarray(X)
  expected = np.asarray(jax.jit(small.apply)(own, x))
  # As many kernels are found as the network has, and none stays in float.
  rules = quantizers.edge_rules(8, 8)
  quantized = jax.jit(lambda v, x: quantizers.percentile_ptq(small, v, x, rules))(own, x)
  assert not quantized.skipped
  run = jax.jit(lambda network, x: network(x))

  def error(network):
    return np.linalg.norm(run(network, x) - expected) / np.linalg.norm(expected)

  assert 0 < error(quantized) < 0.1
  assert 0 < error(integer_network(quantized)) < 0.1
  assert 0 < error(compensate(quantized, [x], QwT())) < 0.1
