import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.models import ResNet, blockwise
from jaxlab.parallel import batch_sharding, fsdp_shardings, make_mesh
from jaxlab.quantizers import Rule, uniform_rules
from jaxlab.quantizers.compensation.driver import compensate
from jaxlab.quantizers.networks.execution import integer_network
from jaxlab.quantizers.networks.gptq import gptq_array, gptq_ptq
from jaxlab.quantizers.networks.storage import load_quantized, save_quantized, size_in_bytes
from jaxlab.quantizers.numerics.gptq import (
  GPTQKernel,
  gptq_kernel,
)
from jaxlab.quantizers.numerics.hessians import accumulate_hessian, init_hessian

LLAMA = {
  'width': 16, 'depth': 2, 'num_heads': 4, 'num_kv_heads': 2, 'hidden': 24, 'vocab_size': 11
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, (16, 12)).astype(np.int32)
BATCHES = list(TOKENS.reshape(2, 8, 12))
WEIGHTS = uniform_rules(3, path='layers_.*')
PROGRAMS = blockwise.Programs()


@functools.cache
def llama():
  model = models.create('llama', **LLAMA)
  variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
  return model, variables


@functools.cache
def quantized_llama(group_size=None):
  model, variables = llama()
  options = {'group_size': group_size}
  return gptq_ptq(model, variables, BATCHES, WEIGHTS, options=options, programs=PROGRAMS)


def test_the_first_block_sees_float_inputs_and_the_second_those_of_the_quantized_first():
  model, variables = llama()
  found = quantized_llama(8)
  mixed = {'params': dict(variables['params'], layers_0=found.variables['params']['layers_0'])}
  for block, network in (('layers_0', variables), ('layers_1', mixed)):
    state = init_hessian(16)
    norm = f'{block}/post_attention_layernorm'
    read = jax.jit(lambda v, x, norm=norm: models.capture(model, v, [norm], x)[1][norm])
    for batch in BATCHES:
      state = accumulate_hessian(state, read(network, batch))
    kernel = variables['params'][block]['mlp']['gate_proj']['kernel']
    alone = gptq_kernel(kernel, state.hessian, 3, group_size=8)
    kernel = found.variables['params'][block]['mlp']['gate_proj']['kernel']
    assert np.mean(np.abs(kernel - alone.kernel) > 1e-6) < 0.02  # a tie may fall to either side


@pytest.mark.exhaustive
def test_logits_are_closer_than_with_kernels_rounded_to_nearest():
  model, variables = llama()
  found = quantized_llama()
  kernels = traverse_util.flatten_dict(variables['params'], sep='/')
  for path, kernel in kernels.items():
    if path.startswith('layers') and path.endswith('kernel'):
      kernels[path] = gptq_kernel(kernel, jnp.eye(len(kernel)), 3).kernel
  nearest = {'params': traverse_util.unflatten_dict(kernels, sep='/')}
  run = jax.jit(model.apply)
  errors = [
    np.mean((run(other, TOKENS) - run(variables, TOKENS)) ** 2)
    for other in ({'params': found.variables['params']}, nearest)
  ]
  assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize('group_size', [None, 8])
def test_stored_codes_give_the_kernels_back_bit_for_bit(group_size, tmp_path):
  found = quantized_llama(group_size)
  kernel = found.variables['params']['layers_1']['self_attn']['q_proj']['kernel']
  constants = found.variables['quantization']['layers_1']['self_attn']['q_proj']['kernel']
  scale, zero_point = (jnp.atleast_2d(constants[name]) for name in ('scale', 'zero_point'))
  group = constants.get('group', jnp.zeros(16, jnp.int32))
  codes = jnp.round(kernel / scale[group] + zero_point[group]).astype(jnp.int32)
  stored = gptq_array(GPTQKernel(kernel, codes, scale, zero_point, group), 3)
  assert stored.codes.nbytes == kernel.size // 2
  save_quantized(tmp_path / 'kernel.safetensors', {'kernel': stored})
  loaded = load_quantized(tmp_path / 'kernel.safetensors')['kernel']
  assert np.array_equal(loaded.dequantize(), kernel)
  assert size_in_bytes(loaded) == size_in_bytes(stored)


@pytest.mark.exhaustive
def test_inputs_are_quantized_where_rules_say_so_and_then_layers_run_in_integers():
  model, variables = llama()
  rules = [Rule('layers_.*', 'kernel', 4), Rule('.*/mlp/.*', 'input', 8)]
  found = gptq_ptq(model, variables, BATCHES, rules, programs=PROGRAMS)
  network = integer_network(found)
  assert {'layers_0/mlp/up_proj', 'layers_1/mlp/down_proj'}.isdisjoint(network.skipped)
  assert 'layers_0/self_attn/q_proj' in network.skipped
  run = jax.jit(lambda network: network(TOKENS))
  fake, real = run(found), run(network)
  np.testing.assert_allclose(real, fake, atol=0.02 * float(jnp.abs(fake).max()))


def test_kernels_in_groups_stay_in_float_and_the_reason_is_said():
  found = quantized_llama(8)
  constants = traverse_util.flatten_dict(found.variables['quantization'], sep='/')
  for path in [path for path in constants if path.endswith('kernel/low')]:
    for name in ('scale', 'zero_point', 'low', 'high'):
      constants[path.replace('kernel/low', f'input/{name}')] = jnp.float32(1)
  tree = traverse_util.unflatten_dict(constants, sep='/')
  with pytest.raises(ValueError, match='scale a group'):
    integer_network(found.update(quantization=tree))


@pytest.mark.exhaustive
def test_convolutions_and_a_compensation_behind_them():
  model = ResNet(stage_sizes=(1, 1), width=4, strides=(1, 2), stem='cifar', num_classes=3)
  images = random_images((16, 8, 8, 3))
  variables = random_variables(model, images)
  rules = [Rule('fc', 'kernel', 8), Rule('layer.*', 'kernel', 2)]
  batches = list(images.reshape(2, 8, 8, 8, 3))
  found = gptq_ptq(model, variables, batches, rules)
  run = jax.jit(lambda network: network(images))
  float_logits = jax.jit(model.apply)(variables, images)
  alone = float(np.mean((run(found) - float_logits) ** 2))
  result = compensate(found, batches, dtype=jnp.float32, target='global')
  assert np.all(result.report.error_after <= result.report.error_before)
  logits = run(result)
  assert np.mean((logits - float_logits) ** 2) < alone


@pytest.mark.exhaustive
def test_batches_and_weights_split_over_devices_give_the_kernels_of_one_device():
  model, variables = llama()
  mesh = make_mesh(data=4, fsdp=2)
  split = [jax.device_put(batch, batch_sharding(mesh)) for batch in BATCHES]
  shardings = fsdp_shardings(variables, mesh, fsdp_min_size=64)
  eight = gptq_ptq(model, jax.device_put(variables, shardings), split, WEIGHTS)
  one, other = (
    found.variables['params']['layers_0']['mlp']['up_proj']['kernel']
    for found in (quantized_llama(), eight)
  )
  assert other.sharding == NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
  assert np.mean(np.abs(np.asarray(one) - np.asarray(other)) > 1e-5) < 0.02


@pytest.mark.exhaustive
def test_parameters_in_bfloat16_stay_so_and_are_rounded_once_more():
  _, variables = llama()
  halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
  small = models.create('llama', **LLAMA, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  expected = jax.eval_shape(small.init, jax.random.key(0), jnp.asarray(TOKENS))
  found = gptq_ptq(small, halves, BATCHES[:1], WEIGHTS)
  assert jax.tree.map(jnp.dtype, found.variables['params']) == jax.tree.map(
    jnp.dtype, expected['params']
  )
  kernel = found.variables['params']['layers_0']['mlp']['up_proj']['kernel'].astype(jnp.float32)
  own = found.variables['quantization']['layers_0']['mlp']['up_proj']['kernel']
  steps = kernel / own['scale'] + own['zero_point']
  assert kernel.dtype == jnp.float32 and jnp.abs(steps - jnp.round(steps)).max() < 8 / 256


def test_blocks_of_one_shape_share_their_compilation():
  quantized_llama()
  # To the first block; Hessians of a first and of a later batch; the outputs. Nothing a block, a bit-width
  # or a group size.
  assert len(PROGRAMS._by_key) <= 4


@pytest.mark.parametrize(
  ('batches', 'rules', 'options', 'match'),
  [
    ([], WEIGHTS, {}, 'batches is empty'),
    (BATCHES, uniform_rules(4, path='layer1.*'), {}, 'layer1'),
    (BATCHES, WEIGHTS, {'blocks': 'h_.*'}, "'h_.*'"),
    (BATCHES, WEIGHTS, {'anatomy': models.Anatomy(blocks=['h_0', 'layers_0'])}, "pattern 'h_0'"),
    (BATCHES, WEIGHTS, {'options': {'damping': -1}}, 'layers_0/.*damping=-1'),
  ],
)
def test_bad_input_is_named_before_work(batches, rules, options, match):
  model, variables = llama()
  with pytest.raises(ValueError, match=match):
    gptq_ptq(model, variables, batches, rules, **options)


def test_groups_without_a_stored_form_are_refused():
  kernel = jax.random.normal(jax.random.key(0), (6, 3))
  hessian = jnp.diag(jnp.asarray([1.0, 5, 2, 4, 3, 6]))
  for options in ({'group_size': 2, 'act_order': True}, {'group_size': 4}):
    with pytest.raises(ValueError, match='not equal runs'):
      gptq_array(gptq_kernel(kernel, hessian, 4, **options), 4)
