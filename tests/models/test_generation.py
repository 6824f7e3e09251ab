import functools

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.random_variables import random_variables

from jaxlab.models.generation import generate, sample_token
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.intercept import Hook
from jaxlab.models.llama import Llama
from jaxlab.parallel import batch_sharding, make_mesh

SIZE = {'vocab_size': 19, 'width': 16, 'depth': 1, 'num_heads': 4, 'max_length': 16}
TINY_GPT2 = GPT2(**SIZE)
TINY_LLAMA = Llama(**SIZE, num_kv_heads=2, hidden=24)
PROMPT = np.random.default_rng(0).integers(0, 19, (2, 4), np.int32)


@functools.cache
def variables_of(model):
  # Large weights: the continuations then wander over the vocabulary.
  return jax.tree.map(lambda a: 3 * a, random_variables(model, PROMPT))


def reference(model, variables, prompt, steps):
  """The argmax of the whole forward pass, a token at a time, without a cache."""
  length = prompt.shape[1] + steps
  run = jax.jit(model.apply)
  tokens = np.zeros((len(prompt), length), np.int32)
  tokens[:, : prompt.shape[1]] = prompt
  for end in range(prompt.shape[1], length):
    tokens[:, end] = np.argmax(run(variables, tokens)[:, end - 1], axis=-1)
  return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize('model', [TINY_GPT2, TINY_LLAMA], ids=['gpt2', 'llama'])
def test_greedy_generation_is_the_argmax_of_the_full_forward(model):
  variables = variables_of(model)
  tokens = generate(model, variables, PROMPT, max_new_tokens=12)
  assert tokens.dtype == jnp.int32 and tokens.shape == (2, 12)
  expected = reference(model, variables, PROMPT, 12)
  np.testing.assert_array_equal(tokens, expected)
  assert len(np.unique(expected)) > 3  # not a loop of one token, which would prove little


@pytest.mark.exhaustive
def test_padded_prompts_are_continued_as_they_are_alone():
  model, variables = TINY_GPT2, variables_of(TINY_GPT2)
  alone = np.concatenate(
    [
      generate(model, variables, PROMPT[:1], max_new_tokens=5),
      generate(model, variables, PROMPT[1:, :2], max_new_tokens=5),
    ]
  )
  for left in (True, False):
    prompt, mask = np.full((2, 6), 7, np.int32), np.zeros((2, 6), bool)
    for row, length in enumerate((4, 2)):
      real = slice(6 - length, None) if left else slice(length)
      prompt[row, real], mask[row, real] = PROMPT[row, :length], True
    tokens = generate(model, variables, prompt, mask=mask, max_new_tokens=5)
    np.testing.assert_array_equal(tokens, alone)


def test_a_sequence_ends_at_eos():
  variables = variables_of(TINY_GPT2)
  free = np.asarray(generate(TINY_GPT2, variables, PROMPT, max_new_tokens=6))
  eos = int(free[0, 2])
  tokens = np.asarray(generate(TINY_GPT2, variables, PROMPT, max_new_tokens=6, eos=eos))
  for row in range(2):
    ends = np.flatnonzero(free[row] == eos)
    end = ends[0] if len(ends) else 6
    np.testing.assert_array_equal(tokens[row, :end], free[row, :end])
    assert (tokens[row, end:] == eos).all()


def test_draws_follow_the_key_and_a_cold_one_is_greedy():
  variables = variables_of(TINY_LLAMA)
  draw = functools.partial(
    generate, TINY_LLAMA, variables, PROMPT, max_new_tokens=6, top_k=15, top_p=0.95
  )
  hot = draw(key=jax.random.key(1), temperature=3.0)
  np.testing.assert_array_equal(hot, draw(key=jax.random.key(1), temperature=3.0))
  assert (hot != draw(key=jax.random.key(2), temperature=3.0)).any()
  greedy = generate(TINY_LLAMA, variables, PROMPT, max_new_tokens=6)
  np.testing.assert_array_equal(draw(key=jax.random.key(1), temperature=1e-4), greedy)


def test_hooks_act_and_the_same_call_compiles_once():
  variables = variables_of(TINY_GPT2)
  hooks = [Hook('ln_f', output=lambda site, y: jnp.zeros_like(y) + site.read('shift'))]
  shift = np.array(variables['params']['wte']['embedding'][11])  # the head then prefers one token
  hooked = {**variables, 'hooks': {'ln_f': {'shift': 100 * shift}}}
  with compilations.counted() as count:
    tokens = generate(TINY_GPT2, hooked, PROMPT, max_new_tokens=3, hooks=hooks)
    assert (tokens == np.argmax(variables['params']['wte']['embedding'] @ shift)).all()
    generate(TINY_GPT2, hooked, PROMPT + 1, max_new_tokens=3, hooks=hooks)
  assert count['_generate'] == 1


@pytest.mark.exhaustive
def test_eight_devices_generate_what_one_does():
  prompt = np.random.default_rng(1).integers(0, 19, (8, 4), np.int32)
  variables = variables_of(TINY_LLAMA)
  sharded = jax.device_put(prompt, batch_sharding(make_mesh()))
  tokens = generate(TINY_LLAMA, variables, sharded, max_new_tokens=5)
  np.testing.assert_array_equal(tokens, generate(TINY_LLAMA, variables, prompt, max_new_tokens=5))


def test_sampling_frequencies_are_those_of_the_cut_softmax():
  logits = np.array([2.0, 1.0, 0.5, 0.0, -4.0])
  keys = jax.random.split(jax.random.key(0), 10000)

  def frequencies(**options):
    draw = jax.jit(jax.vmap(lambda key: sample_token(key, jnp.asarray(logits), **options)))
    return np.bincount(draw(keys), minlength=5) / len(keys)

  def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()

  full = softmax(logits)
  cut = np.where([True, True, False, False, False], full, 0)
  np.testing.assert_allclose(frequencies(), full, atol=0.02)
  np.testing.assert_allclose(frequencies(temperature=2.0), softmax(logits / 2), atol=0.02)
  np.testing.assert_allclose(frequencies(top_k=2), cut / cut.sum(), atol=0.02)
  np.testing.assert_allclose(frequencies(top_k=9, top_p=1.0), full, atol=0.02)
  # The most probable token holds 0.58 by itself, the two together 0.79.
  assert full[0] < 0.6 < full[:2].sum()
  np.testing.assert_allclose(frequencies(top_p=0.6), cut / cut.sum(), atol=0.02)
  assert frequencies(top_p=1e-6)[0] == 1
  # The nucleus is that of the distribution which top_k leaves.
  assert frequencies(top_k=2, top_p=0.7)[0] == 1


@pytest.mark.parametrize(
  'options, message',
  [
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'temperature': -1.0}, 'temperature=-1.0; 0 is greedy'),
    ({'temperature': 1.0}, 'give a key'),
    ({'top_k': 3}, 'give a temperature > 0'),
    ({'temperature': 1.0, 'key': jax.random.key(0), 'top_k': 0}, 'top_k=0, expected at least 1'),
    ({'temperature': 1.0, 'key': jax.random.key(0), 'top_p': 0.0}, r'top_p=0.0 is not in \(0, 1\]'),
    ({'prompt': np.zeros((1, 0), np.int32)}, r'not empty; got int32 \(1, 0\)'),
    ({'prompt': np.zeros((1, 2))}, 'must be integers'),
    ({'prompt': np.array([[1, 19]])}, r'in \[0, 19\), got 1 to 19'),
    ({'mask': np.ones((2, 3))}, r'mask \(2, 3\) must have the shape of prompt'),
    ({'mask': np.array([[1] * 4, [0] * 4])}, 'the mask leaves prompt 1 without a token'),
    ({'max_new_tokens': 14}, 'a cache of 17 tokens exceeds max_length=16'),
  ],
)
def test_wrong_options_raise(options, message):
  options = {'prompt': PROMPT, 'max_new_tokens': 2, **options}
  with pytest.raises(ValueError, match=message):
    generate(TINY_GPT2, variables_of(TINY_GPT2), **options)
