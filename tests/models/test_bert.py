import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from models.random_variables import random_variables, run_capture
from rule_weights import rule_tensor
from scipy.special import erf, softmax

from jaxlab.losses import token_classifier_loss
from jaxlab.models import (
  GPT2,
  Bert,
  capture,
  from_config,
  from_torch,
  mean_embedding,
  to_config,
  to_torch,
)
from jaxlab.models.bert import BertBlock
from jaxlab.models.checkpoint_names import HF_BERT, HF_BERT_BARE, HF_ROBERTA

SIZE = {'vocab_size': 19, 'max_length': 16, 'width': 16, 'depth': 2, 'num_heads': 4, 'hidden': 24}
TINY = Bert(**SIZE)


def some_tokens(shape=(2, 7)):
  return np.random.default_rng(1).integers(0, 19, shape).astype(np.int32)


@jax.jit
def tiny(variables, tokens, **options):
  return TINY.apply(variables, tokens, **options)


@golden('models', 'hf_xlm_roberta')
def test_token_classifier_agrees_with_transformers(vectors):
  names = vectors['checkpoint_names'].tolist()
  shapes = [tuple(json.loads(shape)) for shape in vectors['checkpoint_shapes'].tolist()]
  state_dict = {name: rule_tensor(name, shape) for name, shape in zip(names, shapes, strict=True)}
  config = json.loads(vectors['config_json'].item())
  architectures = ['XLMRobertaForTokenClassification']
  model = from_config({**config, 'model_type': 'xlm-roberta', 'architectures': architectures})
  variables = from_torch(model, state_dict)
  tokens, mask = vectors['in_input_ids'].astype(np.int32), vectors['in_attention_mask']
  patterns = ['embeddings', *(f'layer_{index}' for index in range(model.depth))]
  logits, captured = jax.jit(lambda v: capture(model, v, patterns, tokens, mask=mask))(variables)
  hidden = [(captured[name], vectors[f'out_hidden_{i}']) for i, name in enumerate(patterns)]
  assert f'out_hidden_{len(hidden)}' not in vectors
  for actual, expected in ((logits, vectors['out_logits']), *hidden):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4 * max(1, np.abs(expected).max())  # padding, too


@golden('efpc', 'token_classifier')
def test_preserve_or_discard_classifier_agrees_with_transformers(vectors):
  """LLMLingua-2's classifier, whose own loss also counts padding."""
  table = 'param_roberta_embeddings_{}_embeddings_weight'
  vocab_size, width = vectors[table.format('word')].shape
  layers = {
    name.split('_')[4] for name in vectors if name.startswith('param_roberta_encoder_layer')
  }
  first = vectors.param('pad_token_id') + 1
  model = Bert(
    vocab_size=vocab_size,
    max_length=len(vectors[table.format('position')]),
    token_types=len(vectors[table.format('token_type')]),
    first_position=first,
    width=width,
    depth=len(layers),
    num_heads=vectors.param('num_heads'),
    hidden=len(vectors['param_roberta_encoder_layer_0_intermediate_dense_bias']),
    num_classes=len(vectors['param_classifier_bias']),
    epsilon=vectors.param('layer_norm_eps'),
  )
  tokens, mask = vectors['in_input_ids'].astype(np.int32), vectors['in_attention_mask']
  labels = vectors['in_labels'].astype(np.int32)
  names = to_torch(random_variables(model, tokens), renames=HF_ROBERTA)
  parameters = {name: vectors['param_' + name.replace('.', '_')] for name in names}
  variables = from_torch(model, parameters, renames=HF_ROBERTA)
  patterns = ['embeddings', *(f'layer_{index}' for index in range(model.depth))]
  logits, captured = jax.jit(lambda v: capture(model, v, patterns, tokens, mask=mask))(variables)
  for index, name in enumerate(patterns):
    assert_close(captured[name], vectors[f'out_hidden_{index}'])
  assert_close(logits, vectors['out_logits'])
  assert_close(jax.nn.softmax(logits)[..., 1], vectors['out_preserve_probs'])
  loss = token_classifier_loss(logits, labels, mask == 1)
  assert_close(loss, vectors['out_loss_mean_over_real_tokens'])

  @jax.value_and_grad
  def official(variables):
    logits = model.apply(variables, tokens, mask=mask)
    return token_classifier_loss(logits, labels, mask == 1, mode='all_positions')

  loss, gradient = jax.jit(official)(variables)
  assert_close(loss, vectors['out_loss_mean_over_all_positions'])
  expected = vectors['grad_classifier_weight']
  assert_close(gradient['params']['classifier']['kernel'].T, expected)


def reference(params, tokens, mask, segments):
  """BERT in float64, one sequence after the other without its padding (right of it)."""

  def dense(x, p):
    return x @ np.float64(p['kernel']) + p['bias']

  def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * np.float64(p['scale']) + p['bias']

  results = []
  for own, real, segment in zip(tokens, mask, segments):
    own, segment = own[real], segment[real]
    x = np.float64(params['word_embeddings']['embedding'])[own]
    x = x + params['position_embeddings']['embedding'][: len(own)]
    x = norm(x + params['token_type_embeddings']['embedding'][segment], params['norm'])
    for index in range(2):
      p = params[f'layer_{index}']
      attention = p['attention']
      heads = [
        dense(x, attention[f'{n}_proj']).reshape(len(own), 4, 4).swapaxes(0, 1) for n in 'qkv'
      ]
      weights = softmax(heads[0] @ heads[1].swapaxes(1, 2) / 2, axis=-1)
      y = (weights @ heads[2]).swapaxes(0, 1).reshape(len(own), 16)
      x = norm(x + dense(y, attention['proj']), p['norm1'])
      y = dense(x, p['mlp']['fc1'])
      y = y / 2 * (1 + erf(y / np.sqrt(2)))
      x = norm(x + dense(y, p['mlp']['fc2']), p['norm2'])
    results.append(x)
  return results


def test_vectors_and_embeddings_are_those_of_float64_without_padding():
  tokens, segments = some_tokens(), some_tokens() % 2
  mask = np.array([[1] * 5 + [0] * 2, [1] * 7])
  variables = random_variables(TINY, tokens)
  expected = reference(variables['params'], tokens, mask == 1, segments)
  vectors = tiny(variables, tokens, mask=mask, segments=segments)
  for actual, own, real in zip(vectors, expected, mask):
    assert_close(actual[real == 1], own, 1e-5)
  means = np.stack([own.mean(0) for own in expected])
  assert_close(mean_embedding(vectors, mask, normalize=False), means, 1e-5)
  means = means / np.linalg.norm(means, axis=-1, keepdims=True)
  assert_close(mean_embedding(vectors, mask), means, 1e-5)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_on_either_side_changes_no_real_token(side):
  tokens = some_tokens((2, 5))
  variables = random_variables(TINY, tokens)
  padded, mask = np.full((2, 8), 3, np.int32), np.zeros((2, 8), bool)
  real = slice(3, None) if side == 'left' else slice(5)
  padded[:, real], mask[:, real] = tokens, True
  vectors = tiny(variables, padded, mask=mask)
  assert_close(vectors[:, real], tiny(variables, tokens), 1e-5)
  changed = tiny(variables, np.where(mask, padded, 7), mask=mask)
  np.testing.assert_array_equal(vectors[:, real], changed[:, real])
  assert np.isfinite(tiny(variables, padded, mask=np.zeros_like(mask))).all()


@pytest.mark.exhaustive
def test_means_hold_nothing_of_padding():
  vectors = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
  mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
  vectors[0, 2], vectors[0, 3] = np.nan, np.inf
  means = mean_embedding(vectors, mask, normalize=False)
  assert_close(means[0], vectors[0, :2].mean(0), 1e-6)
  np.testing.assert_array_equal(means[1], 0)
  gradient = jax.grad(lambda v: jnp.sum(mean_embedding(v, mask)[:, 0]))(vectors)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[0, 2:], 0)
  assert_close(mean_embedding(vectors[2:]), mean_embedding(vectors[2:], mask[2:]))
  with pytest.raises(ValueError, match=r'mask \(3, 3\) must be \[batch, time\]'):
    mean_embedding(vectors, mask[:, :3])


def test_operands_have_paths():
  tokens = some_tokens()
  variables = random_variables(TINY, tokens)
  points = [f'layer_1/attention/{name}' for name in ('query', 'key', 'value', 'softmax')]
  _, captured = run_capture(TINY, variables, [*points, 'layer_0', 'layer_1'], tokens)
  query, key, _, weights = (captured[point] for point in points)
  scores = np.einsum('bqhd,bkhd->bhqk', query, key) / 2
  assert_close(weights, softmax(scores, axis=-1), 1e-5)
  block = BertBlock(4, 24)
  out = jax.jit(block.apply)({'params': variables['params']['layer_1']}, captured['layer_0'])
  assert_close(out, captured['layer_1'], 1e-5)


def test_dropout_is_random_in_training_alone():
  tokens = some_tokens()
  variables = random_variables(TINY, tokens)
  model = TINY.clone(dropout=0.5)

  @jax.jit
  def train(seed):
    return model.apply(variables, tokens, True, rngs={'dropout': jax.random.key(seed)})

  np.testing.assert_array_equal(jax.jit(model.apply)(variables, tokens), tiny(variables, tokens))
  assert (train(1) != train(2)).any()


@pytest.mark.exhaustive
def test_bfloat16_and_remat_agree_with_plain_float32():
  tokens = some_tokens()
  variables = random_variables(TINY, tokens)
  half = jax.jit(TINY.clone(dtype=jnp.bfloat16).apply)(variables, tokens)
  assert half.dtype == jnp.bfloat16
  assert_close(half, tiny(variables, tokens), 0.05)

  def gradient(model):
    return jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(3 * model.apply(v, tokens)))))(variables)

  plain, remat = gradient(TINY), gradient(TINY.clone(remat=True))
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-5), remat, plain)


@pytest.mark.parametrize(
  'model, renames, prefix',
  [
    (TINY, HF_BERT_BARE, ''),
    (TINY.clone(num_classes=3), HF_BERT, 'bert.'),
    (TINY.clone(num_classes=3, first_position=2), HF_ROBERTA, 'roberta.'),
  ],
)
def test_checkpoints_make_the_round_trip_and_lose_the_pretraining_heads(model, renames, prefix):
  variables = random_variables(model, some_tokens())
  state_dict = to_torch(variables, renames=renames)
  assert f'{prefix}encoder.layer.1.attention.self.key.weight' in state_dict
  assert state_dict[f'{prefix}encoder.layer.0.intermediate.dense.weight'].shape == (24, 16)
  assert ('classifier.bias' in state_dict) == (model.num_classes is not None)
  extra = (f'{prefix}pooler.dense.weight', f'{prefix}embeddings.position_ids', 'cls.predictions.x')
  extra += ('lm_head.dense.bias', 'lm_head.bias') if model.first_position else ()
  back = from_torch(model, {**state_dict, **dict.fromkeys(extra, np.zeros(3))})
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_configurations_of_transformers_are_read():
  config = {
    'architectures': ['BertModel'],
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'hidden_size': 384,
    'intermediate_size': 1536,
    'layer_norm_eps': 1e-12,
    'num_attention_heads': 12,
    'num_hidden_layers': 6,
    'pad_token_id': 0,
    'position_embedding_type': 'absolute',
  }
  model = from_config(config)
  assert model == Bert(width=384, depth=6, hidden=1536)
  del config['model_type']
  assert from_config({**config, 'type_vocab_size': 2}) == model
  roberta = from_config({'model_type': 'roberta', 'hidden_act': 'gelu_new'}, num_classes=4)
  assert (roberta.first_position, roberta.vocab_size, roberta.num_classes) == (2, 50265, 4)
  assert roberta.activation == 'gelu_tanh'
  labels = {'architectures': ['BertForTokenClassification'], 'id2label': dict.fromkeys('abc')}
  assert from_config({**labels, 'model_type': 'bert'}).num_classes == 3


@pytest.mark.parametrize(
  'model',
  [TINY, TINY.clone(num_classes=2, first_position=2, token_types=1, activation='gelu_tanh')],
)
def test_configurations_make_the_round_trip(model):
  config = json.loads(json.dumps(to_config(model)))
  assert from_config(config) == model
  assert config['architectures'][0].endswith('Model') == (model.num_classes is None)


def test_networks_that_transformers_cannot_describe_raise():
  for model, options, message in (
    (GPT2(width=8, depth=1, num_heads=1), {}, 'describes a Bert, got GPT2'),
    (TINY.clone(activation='quick_gelu'), {}, "activation='quick_gelu'"),
    (TINY.clone(first_position=2), {'pad': 0}, 'first_position=2 is not behind the padding 0'),
  ):
    with pytest.raises(ValueError, match=message):
      to_config(model, **options)


@pytest.mark.parametrize(
  'config, message',
  [
    ({'position_embedding_type': 'relative_key'}, "='relative_key' is not supported"),
    ({'is_decoder': True}, 'is_decoder=True is not supported'),
    ({'hidden_act': 'relu'}, "hidden_act='relu' is not supported"),
  ],
)
def test_configurations_that_are_not_supported_raise(config, message):
  with pytest.raises(ValueError, match=message):
    from_config({'model_type': 'bert', **config})


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'num_heads': 3}, 'width=16 is not divisible by num_heads=3'),
    ({'activation': 'relu'}, "activation='relu' is none of"),
    ({'dropout': 1.0}, r'dropout=1.0 is not in \[0, 1\)'),
    ({'first_position': 16}, r'first_position=16 is not in \[0, max_length=16\)'),
    ({'num_classes': 0}, 'num_classes=0; give None'),
  ],
)
def test_fields_out_of_range_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    Bert(**{**SIZE, **fields})


def test_wrong_tokens_masks_and_segments_raise():
  model = TINY.clone(first_position=2)
  for tokens, options, message in (
    (np.zeros((2, 3), np.float32), {}, r'reads integer tokens \[batch, time\]; got float32'),
    (np.zeros((1, 15), np.int32), {}, '15 tokens, but max_length=14'),
    (np.zeros((2, 3), np.int32), {'mask': np.ones((2, 4))}, r'mask \(2, 4\) must have'),
    (np.zeros((2, 3), np.int32), {'segments': np.ones(3, int)}, r'segments \(3,\) must have'),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(lambda t, o=options: model.init(jax.random.key(0), t, **o), tokens)
