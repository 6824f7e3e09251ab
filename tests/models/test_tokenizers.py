import pytest
import tokenizers

from jaxlab.models import read_tokenizer, train_tokenizer

TEXTS = ['the lamp is red, the lamp is old.', 'A (small) lamp is there.'] * 3


def test_words_begin_with_the_marker_and_punctuation_stands_by_itself():
  tokenizer = train_tokenizer(TEXTS, 200)
  text = 'the lamp,\nis (old).'
  found = tokenizer.encode(text)
  assert found.tokens == ['▁the', '▁lamp', ',', '▁is', '▁(', 'old', ')', '.']
  pieces = [text[start:stop].strip() for start, stop in found.offsets]
  assert pieces == ['the', 'lamp', ',', 'is', '(', 'old', ')', '.']
  assert tokenizer.decode(found.ids) == 'the lamp, is (old).'
  assert tokenizer.encode('lamp é').tokens == ['▁lamp', '▁', '[UNK]']
  assert [tokenizer.token_to_id(own) for own in ('[PAD]', '[UNK]', '[CLS]', '[SEP]')] == [
    0,
    1,
    2,
    3,
  ]


def test_equal_texts_give_equal_tokenizers_and_files_give_them_back(tmp_path):
  first, second = train_tokenizer(TEXTS, 60), train_tokenizer(iter(TEXTS), 60)
  assert first.to_str() == second.to_str() and first.get_vocab_size() <= 60
  first.enable_truncation(2)
  first.enable_padding(length=7)
  first.save(str(tmp_path / 'tokenizer.json'))
  read = read_tokenizer(tmp_path / 'tokenizer.json')
  assert read.encode(TEXTS[0]).ids == second.encode(TEXTS[0]).ids  # whole, not padded


def test_what_is_no_tokenizer_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='there is no such file'):
    read_tokenizer(tmp_path / 'tokenizer.json')
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=r'is no tokenizer\.json'):
    read_tokenizer(tmp_path / 'tokenizer.json')
  with pytest.raises(ValueError, match='vocab_size=10 for texts of'):
    train_tokenizer(TEXTS, 10)
  with pytest.raises(ValueError, match='texts of 0 characters'):
    train_tokenizer([' '], 10)


def test_without_the_library_the_answer_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
  with pytest.raises(ModuleNotFoundError, match='pip install tokenizers'):
    train_tokenizer(TEXTS)
  assert tokenizers.__version__
