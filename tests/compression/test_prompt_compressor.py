import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from models.random_variables import random_variables
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from jaxlab import compression
from jaxlab.models import Bert, train_tokenizer

TEXT = (
  'The color of the lamp is red. The owner of the chair is Anna.\n'
  'Nothing else (as a rule) happens here, in the old house.'
)
TOKENIZER = train_tokenizer([TEXT] * 3, 400)  # all words are single tokens


class Table(nn.Module):
  """A model that knows each token's logit, and adds one where the instruction holds the token."""

  vocab_size: int = 400
  num_classes: int = 2

  @nn.compact
  def __call__(self, tokens, mask, segments):
    table = self.param('table', nn.initializers.zeros, (self.vocab_size,))
    asked = jax.nn.one_hot(tokens, self.vocab_size) * ((segments == 0) & mask)[..., None]
    found = jax.numpy.take_along_axis(asked.max(1), tokens, 1) * (segments == 1)
    logits = table[tokens] + 8.0 * found
    return jax.numpy.stack([-logits / 2, *[logits / 2] * (self.num_classes - 1)], -1)


def logits_of(tokenizer, known, other=-3.0):
  table = np.full(400, other, np.float32)
  for word, value in known.items():
    table[tokenizer.token_to_id(word)] = value
  return {'params': {'table': table}}


KNOWN = {'▁lamp': 2.0, '▁red': 1.0, '▁Anna': 1.5, '▁house': 0.5, '▁chair': -1.0, '▁owner': -2.0}
GIVEN = {
  'model': Table(),
  'variables': logits_of(TOKENIZER, KNOWN),
  'tokenizer': TOKENIZER,
  'max_length': 48,
}


def test_the_most_probable_words_stay_as_the_text_has_them():
  found = compression.compress_prompt(TEXT, **GIVEN, rate=0.2)
  words = [TEXT[start:stop] for start, stop in found.spans[0]]
  assert words[:8] == ['The', 'color', 'of', 'the', 'lamp', 'is', 'red', '.']
  assert '(as' in words and words[-1] == '.' and words[words.index('rule') + 1] == ')'
  values = dict(zip(words, found.probabilities[0]))
  assert values['lamp'] == pytest.approx(1 / (1 + np.exp(-2.0)), rel=1e-6)
  threshold = np.percentile(found.probabilities[0], 81)
  np.testing.assert_array_equal(found.keep[0], found.probabilities[0] > threshold)
  assert found.text == 'lamp red owner chair Anna house'
  assert len(words) == 30  # one of two tokens
  assert (found.original_tokens, found.compressed_tokens, found.rate) == (31, 6, 0.2)
  assert found.kept_share == 6 / 31
  assert compression.compress_prompt(TEXT, **GIVEN, rate=1).text == TEXT


def test_an_instruction_changes_what_stays():
  asked = 'the owner of the chair'
  found = compression.compress_prompt(TEXT, asked, **GIVEN, rate=0.2)
  assert 'owner' in found.text and 'chair' in found.text and 'house' not in found.text


def test_a_budget_is_kept_and_counted_by_the_target_model():
  found = compression.compress_prompt(TEXT, **GIVEN, budget=6)
  assert found.rate == 6 / found.original_tokens and 4 <= found.compressed_tokens <= 6
  assert compression.compress_prompt(TEXT, **GIVEN, budget=1000).text == TEXT
  by_letters = compression.compress_prompt(TEXT, **GIVEN, budget=12, count_tokens=len)
  assert by_letters.original_tokens == len(TEXT)
  assert (by_letters.text, by_letters.compressed_tokens) == ('lamp Anna', 9)


def test_chunks_end_with_sentences_and_fit_behind_the_instruction(monkeypatch):
  seen = []

  def probabilities(model, variables, tokens, mask, segments):
    seen.extend(zip(np.asarray(tokens), np.asarray(segments)))
    return np.full(tokens.shape, 0.5)

  monkeypatch.setattr('jaxlab.compression.prompt_compressor.preserve_probabilities', probabilities)
  compression.compress_prompt(TEXT, 'the lamp', **{**GIVEN, 'max_length': 17}, rate=0.5)
  texts = [TOKENIZER.decode(tokens[segments == 1].tolist()) for tokens, segments in seen]
  assert texts[:2] == ['The color of the lamp is red.', 'The owner of the chair is Anna.']
  assert all(len(tokens) == 17 for tokens, _ in seen)
  heads = [TOKENIZER.decode(tokens[segments == 0].tolist()) for tokens, segments in seen]
  assert {head.replace('[PAD]', '').strip() for head in heads} == {'the lamp'}
  # A line break ends a chunk, too, where the text has no '.'.
  seen.clear()
  text = 'the lamp is red\nthe house is old and the chair is old'.replace('and ', '')
  compression.compress_prompt(text, **{**GIVEN, 'max_length': 8}, rate=0.5)
  pieces = [TOKENIZER.decode(tokens[1 : tokens.tolist().index(3)].tolist()) for tokens, _ in seen]
  assert pieces[0] == 'the lamp is red' and ''.join(pieces).count('the') == 3


def test_words_are_those_of_one_chunk_however_many_a_batch_holds():
  options = {**GIVEN, 'max_length': 9}
  found = [
    compression.compress_prompt(TEXT, **options, rate=0.5, batch_size=size) for size in (1, 3, 8)
  ]
  assert found[0].text == found[1].text == found[2].text
  np.testing.assert_array_equal(found[0].probabilities[0], found[2].probabilities[0])


def test_forced_words_and_line_breaks_stay():
  forced = compression.compress_prompt(TEXT, **GIVEN, rate=0.2, force_tokens=['.', '\n', 'rule'])
  assert 'rule' in forced.text and forced.text.count('.') == 3
  assert forced.text.splitlines()[0].endswith('.') and len(forced.text.splitlines()) == 2
  once = compression.compress_prompt(
    'lamp. house. . red', **GIVEN, rate=0.9, force_tokens=['.'], drop_consecutive=True
  )
  assert once.text == 'lamp. house. red'


def test_forced_words_of_several_pieces_and_of_any_case_stay():
  text = 'the lamp is red. Quill is the owner of the chair. the house is Anna'
  plain = compression.compress_prompt(text, **GIVEN, rate=0.2)
  forced = compression.compress_prompt(text, **GIVEN, rate=0.2, force_tokens=['Quill'])
  assert len(TOKENIZER.encode('Quill').tokens) > 1  # several pieces, of which some are unknown
  assert 'Quill' not in plain.text and 'Quill' in forced.text
  known = Tokenizer(
    models.WordPiece(
      {
        piece: index
        for index, piece in enumerate(
          ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'paris', 'is', 'red', 'now', 'wi', '##de']
        )
      }
    )
  )
  known.normalizer = normalizers.BertNormalizer(lowercase=True)
  known.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  given = {**GIVEN, 'tokenizer': known, 'variables': logits_of(known, {'red': 2.0, 'now': 1.0})}
  text = 'Paris is red now is wide is paris'
  found = [
    compression.compress_prompt(text, **given, rate=0.4, force_tokens=words).text
    for words in ((), ('Paris',), ('wide',))
  ]
  assert found == ['red now', 'Paris red now', 'red now wide']
  merged = compression.merge_words(['wi', '##de'], [0, 0], force_tokens=['wide'], continuation='##')
  assert merged.probabilities.tolist() == [
    0
  ]  # it is forced as a word of the text, not by its pieces
  whole = compression.compress_prompt('Wide is red', **given, rate=0.9, force_tokens=['wide'])
  assert whole.probabilities[0][0] == 1


def test_line_breaks_are_kept_by_their_number():
  text = 'lamp\n\nred\nAnna the the the the the the the the the'
  for drop, expected in ((False, 'lamp\n\nred\nAnna'), (True, 'lamp\nred\nAnna')):
    found = compression.compress_prompt(
      text, **GIVEN, rate=0.3, force_tokens=['\n'], drop_consecutive=drop
    )
    assert found.text == expected


def test_a_tokenizer_of_bytes_is_refused():
  pieces = ['<s>', '</s>', '<pad>', *sorted(pre_tokenizers.ByteLevel.alphabet())]
  own = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
  own.pre_tokenizer = pre_tokenizers.ByteLevel()
  with pytest.raises(ValueError, match='its words are not told apart'):
    compression.token_layout(own)


def test_documents_are_left_out_first_and_joined_by_a_blank_line():
  texts = ['The lamp is red.', 'as a rule', 'The chair is Anna.', '']
  found = compression.compress_prompt(texts, **GIVEN, rate=0.5)
  assert found.contexts.all() and found.text == 'lamp red\n\nchair Anna'
  few = compression.compress_prompt(texts, **GIVEN, rate=0.5, filter_contexts=True)
  assert few.contexts.tolist() == [True, True, True, False]
  one = compression.compress_prompt(texts, **GIVEN, budget=2, filter_contexts=True)
  assert one.contexts.tolist() == [True, False, True, False] and one.rate == 2 / 10
  whole = compression.compress_prompt(texts[:2], **GIVEN, rate=1)
  assert whole.text == 'The lamp is red.\n\nas a rule'


def test_edges():
  assert compression.compress_prompt('', **GIVEN, rate=0.5).text == ''
  assert compression.compress_prompt([], **GIVEN, budget=5).text == ''
  assert compression.compress_prompt(' \n', **GIVEN, rate=0.5).text == ''
  nothing = compression.compress_prompt(' ', **GIVEN, rate=0.5, count_tokens=lambda own: 0)
  assert nothing.text == '' and not nothing.keep[0].any()
  same = compression.compress_prompt('house house house', **GIVEN, rate=0.5)
  assert same.text == '' and same.compressed_tokens == 0 and same.kept_share == 0
  kept = compression.compress_prompt('house house', **GIVEN, rate=0.5, at_least_one=True)
  assert kept.text == 'house'
  given = {**GIVEN, 'variables': logits_of(TOKENIZER, {'[UNK]': 9.0, '▁': 9.0})}
  unknown = compression.compress_prompt('lamp é, red lamp', **given, rate=0.5)
  assert unknown.text == 'é'  # the text has it, though no token is it
  with pytest.warns(UserWarning, match='2 tokens is cut to max_instruction=1'):
    compression.compress_prompt(TEXT, 'the lamp', **GIVEN, max_instruction=1, rate=0.5)


def word_pieces():
  vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'lamp', '##s', 'are', 'red', '.', "'"]
  made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token='[UNK]'))
  made.normalizer = normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return made


def test_word_pieces_are_merged_and_written_in_the_case_of_the_text():
  tokenizer = word_pieces()
  assert compression.token_layout(tokenizer) == (2, 3, 0, 1, '##')
  merged = compression.merge_words(
    ['[CLS]', 'lamp', '##s', 'are', 'red', '##s', '.'], [0.9, 0.5, 0.7, 0.1, 0.2, 0.4, 0.3],
    force_tokens=['s'], continuation='##',
  )  # fmt: skip
  assert merged.words == ('lamp', 's', 'are', 'red', 's', '.')
  np.testing.assert_allclose(merged.probabilities, [0.5, 1, 0.1, 0.2, 1, 0.3])
  assert merged.pieces.tolist() == [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]
  variables = logits_of(tokenizer, {'lamp': 3.0, '##s': 1.0, 'red': 1.5})
  given = {**GIVEN, 'tokenizer': tokenizer, 'variables': variables}
  found = compression.compress_prompt("Lamps are 'Red'.", **given, rate=0.5)
  assert found.text == 'Lamps Red'
  both = [1 / (1 + np.exp(-value)) for value in (3.0, 1.0)]
  assert found.probabilities[0][0] == pytest.approx(np.mean(both), rel=1e-6)


def test_layouts_are_told_by_the_special_tokens():
  roberta = Tokenizer(models.WordLevel({'<s>': 0, '<pad>': 1, '</s>': 2, '▁a': 3}, unk_token='▁a'))
  assert compression.token_layout(roberta) == (0, 2, 1, 2, '')
  with pytest.raises(ValueError, match='give a layout'):
    compression.token_layout(Tokenizer(models.WordLevel({'a': 0}, unk_token='a')))


@pytest.mark.parametrize('rates, kept', [((0.3, 0.1, 0.2), 2), ((0.3, 0.3, 0.3), 3)])
def test_documents_are_selected_by_their_mean(rates, kept):
  # Rate 0.2: r = 0.6, level 40 of three means: between the first and the second.
  found = compression.select_contexts([[rate] * 3 for rate in rates], 0.2)
  assert found.sum() == kept and found[0]


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_a_folder_holds_all_of_a_compressor_under_the_names_of_transformers(family, tmp_path):
  first = 2 if family == 'roberta' else 0
  tokenizer = TOKENIZER
  if first:
    vocabulary = {own: i for i, own in enumerate(['<s>', '<pad>', '</s>', '<unk>', '▁lamp', '▁a'])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  model = Bert(
    vocab_size=400,
    max_length=32,
    width=8,
    depth=1,
    num_heads=2,
    num_classes=2,
    first_position=first,
  )
  tokens = np.zeros((1, 4), np.int32)
  made = compression.PromptCompressor(model, random_variables(model, tokens), tokenizer, 24, 5)
  compression.save_compressor(tmp_path, made)
  assert sorted(own.name for own in tmp_path.iterdir()) == [
    'compressor.json', 'config.json', 'model.safetensors', 'tokenizer.json',
  ]  # fmt: skip
  names = load_file(tmp_path / 'model.safetensors')
  assert f'{family}.encoder.layer.0.attention.self.query.weight' in names
  read = compression.load_compressor(tmp_path)
  assert read.model == model.clone(hidden=32) and read[3:] == (24, 5)
  jax.tree.map(np.testing.assert_array_equal, read.variables, dict(made.variables))
  ours, theirs = (
    compression.compress_prompt('lamp a lamp', 'a', **own._asdict(), rate=0.6)
    for own in (made, read)
  )
  assert ours.text == theirs.text
  np.testing.assert_array_equal(ours.probabilities[0], theirs.probabilities[0])
  (tmp_path / 'compressor.json').unlink()  # as published checkpoints are
  assert compression.load_compressor(tmp_path)[3:] == (32 - first, 64)


def test_folders_of_something_else_are_refused(tmp_path):
  model = Bert(vocab_size=400, max_length=32, width=8, depth=1, num_heads=2, num_classes=2)
  variables = random_variables(model, np.zeros((1, 4), np.int32))
  made = compression.PromptCompressor(model, variables, TOKENIZER)
  with pytest.raises(FileNotFoundError, match=r'lacks config\.json, model\.safetensors, tokenizer'):
    compression.load_compressor(tmp_path)
  compression.save_compressor(tmp_path, made)
  config = tmp_path / 'config.json'
  entries = json.loads(config.read_text())
  for change, message in (
    ({'num_labels': 3}, 'expected a classifier of tokens with two classes'),
    ({'architectures': ['BertModel']}, "holds .'BertModel'., expected a classifier"),
    ({'model_type': 't5'}, "got 't5'"),
    ({'vocab_size': 20}, 'does not fit the model'),
    ({'hidden_size': '8'}, 'holds no prompt compressor'),
    ({'model_type': 'xlm-roberta', 'pad_token_id': 31}, 'first_position=32 is not in'),
  ):
    config.write_text(json.dumps({**entries, **change}))
    with pytest.raises(ValueError, match=message):
      compression.load_compressor(tmp_path)
  for text, message in (
    ('no json', 'holds no prompt compressor'),
    ('[1]', r'config\.json: expected an object, got list'),
    ('{"model_type": "gpt2"}', 'holds GPT2, expected a classifier'),
  ):
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
      compression.load_compressor(tmp_path)
  config.write_text(json.dumps(entries))
  data = (tmp_path / 'model.safetensors').read_bytes()
  (tmp_path / 'model.safetensors').write_bytes(data[:-9])
  with pytest.raises(ValueError, match='no whole safetensors file'):
    compression.load_compressor(tmp_path)
  small = {name: value[:20] if name.endswith('word_embeddings.weight') else value
           for name, value in load_whole(data, tmp_path).items()}  # fmt: skip
  save_file(small, tmp_path / 'model.safetensors')
  config.write_text(json.dumps({**entries, 'vocab_size': 20}))
  with pytest.raises(ValueError, match=r'the tokenizer has \d+ tokens, the model 20'):
    compression.load_compressor(tmp_path)
  with pytest.raises(ValueError, match='num_classes=3 of the model'):
    compression.save_compressor(tmp_path, made._replace(model=model.clone(num_classes=3)))


@pytest.mark.parametrize(
  'text, message',
  [
    ('no json', r'compressor\.json is no JSON'),
    ('[24]', r'compressor\.json: expected an object, got list'),
    ('{"length": 24}', r"compressor\.json: unknown entries \['length'\]; expected max_length, max"),
    ('{"max_length": "24"}', r"compressor\.json: max_length='24', expected a whole number"),
    ('{"max_instruction": 0}', r'compressor\.json: max_instruction=0, expected a whole number'),
    ('{"max_length": 33}', r'compressor\.json: max_length=33, but the model .* has 32 positions'),
  ],
)
def test_lengths_that_cannot_be_name_their_file(text, message, tmp_path):
  model = Bert(vocab_size=400, max_length=32, width=8, depth=1, num_heads=2, num_classes=2)
  variables = random_variables(model, np.zeros((1, 4), np.int32))
  compression.save_compressor(
    tmp_path, compression.PromptCompressor(model, variables, TOKENIZER, 32, 5)
  )
  (tmp_path / 'compressor.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    compression.load_compressor(tmp_path)


def load_whole(data, folder):
  (folder / 'whole.safetensors').write_bytes(data)
  return load_file(folder / 'whole.safetensors')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, 'rate=None, budget=None; expected one'),
    ({'rate': 0.5, 'budget': 3}, 'expected one of the two'),
    ({'rate': 0.0}, r'rate=0.0 is not in \(0, 1\]'),
    ({'rate': 1.5}, r'rate=1.5 is not in \(0, 1\]'),
    ({'rate': float('nan')}, 'rate=nan'),
    ({'budget': 0}, 'budget=0'),
    ({'rate': 0.5, 'batch_size': 0}, 'batch_size=0'),
    ({'rate': 0.5, 'max_length': 5}, 'max_length=5 leaves no room for text'),
    ({'rate': 0.5, 'force_tokens': ['']}, 'empty string'),
    ({'rate': 0.5, 'force_tokens': ['red lamp']}, "holds 'red lamp', to the tokenizer 2 words"),
    ({'rate': 0.5, 'force_tokens': [' ']}, "holds ' ', to the tokenizer 0 words"),
    ({'rate': 0.5, 'model': Table(num_classes=3)}, 'of two classes, discard and preserve'),
  ],
)
def test_bad_input_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    compression.compress_prompt(TEXT, 'the lamp', **{**GIVEN, **options})
