"""Families that no small experiment runs, through the whole pipeline: ranges, compensation, integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from models.random_variables import random_images, random_variables

from jaxlab.models import Llama, MobileNetV2, Swin
from jaxlab.quantizers import integer_network, percentile_ptq, repq
from jaxlab.quantizers.compensation import compensate
from jaxlab.quantizers.networks.rules import edge_rules

IMAGES = random_images((16, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (16, 8)).astype(np.int32)
DECODER = {'width': 16, 'depth': 2, 'num_heads': 2, 'vocab_size': 11, 'max_length': 8}
FAMILIES = {
  'swin': (
    Swin(2, 16, 4, 8, (1, 1), (2, 2), num_classes=3),
    IMAGES, repq, r'(layers_\d/)?blocks_\d+',
  ),
  'mobilenet': (
    MobileNetV2(
      stage_sizes=(2,), widths=(8,), strides=(2,), stem_width=8, head_width=16, num_classes=3
    ),
    IMAGES, percentile_ptq, None,
  ),
  'llama': (Llama(**DECODER, hidden=24), TOKENS, repq, None),
}  # fmt: skip


@pytest.mark.parametrize('name', tables.few(FAMILIES, 'mobilenet'))
def test_a_network_is_quantized_compensated_and_run_in_integers(name):
  model, inputs, ptq, blocks = FAMILIES[name]
  variables = random_variables(model, inputs)
  edges = None if name == 'llama' else r'patch_embed/proj|conv_stem|classifier|head.*'
  quantized = ptq(model, variables, inputs, edge_rules(8, 8, edges=edges))
  batches = list(inputs.reshape(2, 8, *inputs.shape[1:]))
  found = compensate(quantized, batches, blocks=blocks, dtype=jnp.float32)
  assert len(found.report.paths) >= 2
  assert np.all(found.report.error_after <= found.report.error_before * (1 + 1e-5))
  network = integer_network(found)
  assert not network.skipped
  run = jax.jit(lambda network: network(inputs))
  exact, fake, real = jax.jit(model.apply)(variables, inputs), run(found), run(network)
  assert np.mean((fake - exact) ** 2) < 0.01 * np.var(exact)
  assert np.mean((real - exact) ** 2) < 0.01 * np.var(exact)
