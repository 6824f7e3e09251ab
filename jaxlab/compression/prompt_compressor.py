"""The whole of a prompt's compression: a text and an instruction in, the words that stay out.

EFPC (Cao et al. 2025, arXiv 2503.07956) on top of LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968), by the
functions of `prompt_inputs` and `prompts`. A compressor's folder is a checkpoint of Hugging Face's
transformers, of a classifier of tokens, so that published ones are read as well.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.compression.prompt_inputs import (
  ClassifierInput,
  PromptChunk,
  TokenLayout,
  prompt_chunks,
  token_layout,
)
from jaxlab.compression.prompts import budget_rate, merge_words, select_contexts, select_words
from jaxlab.models.checkpoint_names import HF_BERT, HF_ROBERTA
from jaxlab.models.checkpoints import from_torch, read_state_dict, to_torch
from jaxlab.models.configurations import from_config, to_config
from jaxlab.models.tokenizers import read_tokenizer

Array = jax.Array
PyTree = Any

_LIMITS = 'compressor.json'  # lengths, which a checkpoint of transformers does not tell


class PromptCompressor(NamedTuple):
  """A classifier of tokens with what it reads: the arguments of `compress_prompt` that stay the same.

  Attributes:
    model: tokens, mask and segments in, logits of {discard, preserve} out, such as `models.Bert`.
    variables: of the model.
    tokenizer: of the library tokenizers.
    max_length: tokens of a chunk, instruction and special ones included.
    max_instruction: tokens of an instruction.
  """

  model: nn.Module
  variables: PyTree
  tokenizer: Any
  max_length: int = 512
  max_instruction: int = 64


class CompressedPrompt(NamedTuple):
  """A shortened prompt, and what became of each word.

  Attributes:
    text: the words that stay.
    original_tokens: of the prompt, those of the target model.
    compressed_tokens: of what stays.
    rate: tau, which words were selected at.
    contexts: bool `[contexts]`, which documents stay.
    spans: of each document `[words, 2]`, where its words begin and end, in characters.
    keep: of each document bool `[words]`.
    probabilities: of each document float64 `[words]`, of being preserved.
  """

  text: str
  original_tokens: int
  compressed_tokens: int
  rate: float
  contexts: np.ndarray
  spans: tuple[np.ndarray, ...]
  keep: tuple[np.ndarray, ...]
  probabilities: tuple[np.ndarray, ...]

  @property
  def kept_share(self) -> float:
    """Tokens that stay / tokens of the prompt; 1 for an empty prompt."""
    return self.compressed_tokens / self.original_tokens if self.original_tokens else 1.0


class _Words(NamedTuple):
  """A chunk's words: merged ones, their places in the text, the target's tokens of each."""

  merged: Any
  spans: np.ndarray
  counts: np.ndarray


def compress_prompt(
  text: str | Sequence[str],
  instruction: str = '',
  *,
  model: nn.Module,
  variables: PyTree,
  tokenizer: Any,
  rate: float | None = None,
  budget: int | None = None,
  force_tokens: Collection[str] = (),
  reserve_digits: bool = False,
  drop_consecutive: bool = False,
  reduce: str = 'mean',
  at_least_one: bool = False,
  filter_contexts: bool = False,
  count_tokens: Callable[[str], int] | None = None,
  max_length: int = 512,
  max_instruction: int = 64,
  layout: TokenLayout | None = None,
  batch_size: int = 8,
) -> CompressedPrompt:
  """Returns a prompt without its least important words: for an instruction, or without one for any use.

  The text is cut behind '.' and line breaks into chunks that fit behind the instruction; a classifier of
  tokens says how probably each is to be preserved; in each chunk the words above the percentile that belongs
  to the rate stay. Words are written as the text has them, with the space or line break before them.

  Args:
    text: the prompt, or several documents; those that stay are joined by a blank line.
    instruction: what the prompt is for, such as a question; '' for none.
    model: see `PromptCompressor`, as `variables`, `tokenizer`, `max_length` and `max_instruction`.
    variables: see there.
    tokenizer: see there; with a layout anything that has its `encode`.
    rate: tau, tokens that stay / tokens, in (0, 1]; or
    budget: tokens that stay. What stays is a little below, unless forced tokens need more.
    force_tokens: words that stay, as the text has them, see `merge_words`; a line break among them keeps
      those between words that stay, with `drop_consecutive` one of several.
    reserve_digits: see `merge_words`.
    drop_consecutive: see `select_words`, as `at_least_one`.
    reduce: see `merge_words`.
    at_least_one: see `select_words`.
    filter_contexts: leave out whole documents first, see `select_contexts`. A budget's rate is then that of
      the documents that stay (inferred).
    count_tokens: tokens of the target model in a text; None: those of `tokenizer`.
    max_length: see `PromptCompressor`.
    max_instruction: see there; a longer instruction is cut, with a warning.
    layout: of the tokenizer; None: `token_layout`.
    batch_size: chunks in one call of the model.

  Returns:
    The shortened prompt; at rate 1 the text as it is. An empty text gives an empty one.

  Raises:
    ValueError: unless one of rate and budget is given and in range, for a forced token that is not one word
      to the tokenizer, if no text fits behind the instruction, or for a model of other than two classes.

  Source: EFPC, on LLMLingua-2's code. Unlike that, what the tokenizer does not know is a word like others:
  the text has it, though its tokens do not.
  """
  if (rate is None) == (budget is None):
    raise ValueError(
      f'compress_prompt: rate={rate}, budget={budget}; expected one of the two, not both.'
    )
  if rate is not None and not 0 < rate <= 1:
    raise ValueError(f'compress_prompt: rate={rate} is not in (0, 1].')
  if budget is not None and budget < 1:
    raise ValueError(f'compress_prompt: budget={budget}, expected at least 1 token.')
  if batch_size < 1:
    raise ValueError(f'compress_prompt: batch_size={batch_size}, expected at least 1.')
  texts = [text] if isinstance(text, str) else list(text)
  layout = token_layout(tokenizer) if layout is None else layout
  counted = count_tokens or (lambda own: len(tokenizer.encode(own, add_special_tokens=False).ids))
  totals = [counted(own) for own in texts]
  lengths = {'max_length': max_length, 'max_instruction': max_instruction}
  chunks = [prompt_chunks(own, instruction, tokenizer, layout, **lengths) for own in texts]
  flat = [own for of_text in chunks for own in of_text]
  found = iter(_probabilities(model, variables, flat, batch_size))
  merging = {'force_tokens': force_tokens, 'reserve_digits': reserve_digits, 'reduce': reduce}
  merging |= {'special_tokens': (), 'continuation': layout.continuation}
  _require_words(tokenizer, merging)
  words = [
    [_words(own, chunk, next(found), count_tokens, merging) for chunk in of_text]
    for own, of_text in zip(texts, chunks)
  ]
  probabilities = tuple(_joined([own.merged.probabilities for own in each], (0,)) for each in words)
  spans = tuple(_joined([own.spans for own in each], (0, 2)) for each in words)

  def tau(count: int) -> float:
    return rate if budget is None else budget_rate(budget, max(count, 1))

  contexts = np.ones(len(texts), bool)
  if filter_contexts and texts:
    contexts = select_contexts(probabilities, tau(sum(totals)))
  own_rate = tau(sum(own for own, stays in zip(totals, contexts) if stays))
  options = {
    'force_tokens': force_tokens,
    'drop_consecutive': drop_consecutive,
    'at_least_one': at_least_one,
  }
  keep = tuple(
    _joined([_kept(own, own_rate, **options) for own in each], (0,)) & stays
    for each, stays in zip(words, contexts)
  )
  if own_rate == 1:
    written = [own for own, stays in zip(texts, contexts) if stays]
  else:
    most = (1 if drop_consecutive else None) if '\n' in force_tokens else 0
    written = [_written(*own, most) for own in zip(texts, spans, keep)]
    written = [own for own in written if own]
  short = '\n\n'.join(written)
  return CompressedPrompt(
    short, sum(totals), counted(short), own_rate, contexts, spans, keep, probabilities
  )


@functools.partial(jax.jit, static_argnames='model')
def preserve_probabilities(
  model: nn.Module, variables: PyTree, tokens: Array, mask: Array, segments: Array
) -> Array:
  """Returns how probably each token is to be preserved, `softmax(logits)_1`, float32 `[batch, time]`.

  Args:
    model: of two classes, {discard, preserve}.
    variables: of the model.
    tokens: integers `[batch, time]`.
    mask: bool `[batch, time]`, false for padding, whose probabilities mean nothing.
    segments: integers `[batch, time]`, see `ClassifierInput`.

  Raises:
    ValueError: for a model of another number of classes.
  """
  logits = model.apply(variables, tokens, mask=mask, segments=segments)
  if logits.shape != (*tokens.shape, 2):
    raise ValueError(
      f'preserve_probabilities: the model returns {logits.shape} for tokens {tokens.shape}, expected logits '
      'of two classes, discard and preserve, for each.'
    )
  return jax.nn.softmax(logits.astype(jnp.float32))[..., 1]


def _probabilities(model, variables, chunks: Sequence[PromptChunk], batch_size) -> list[np.ndarray]:
  """Returns the probabilities of each chunk's text tokens."""
  found = []
  for start in range(0, len(chunks), batch_size):
    own = [chunk.inputs for chunk in chunks[start : start + batch_size]]
    # Batches of few sizes, for few compilations.
    size = min(1 << (len(own) - 1).bit_length(), batch_size)
    rows = own + own[-1:] * (size - len(own))
    fields = [np.stack([getattr(row, name) for row in rows]) for name in ClassifierInput._fields]
    values = np.asarray(preserve_probabilities(model, variables, *fields[:3]), np.float64)
    found += [value[row.is_text] for value, row in zip(values, own)]
  return found


def _require_words(tokenizer: Any, merging: dict[str, Any]) -> None:
  """Raises ValueError for a forced token that is never a word, since the tokenizer cuts it into several."""
  for token in merging['force_tokens']:
    pieces = tokenizer.encode(token, add_special_tokens=False).tokens if token.strip() else []
    words = [word for word in merge_words(pieces, [0] * len(pieces), **merging).words if word]
    if token != '\n' and len(words) != 1:
      raise ValueError(
        f'compress_prompt: force_tokens holds {token!r}, to the tokenizer {len(words)} words; expected '
        "single words, or '\\n'."
      )


def _words(text: str, chunk: PromptChunk, values, count_tokens, merging) -> _Words:
  """Returns the words of a text's chunk."""
  merged = merge_words(chunk.tokens, values, **merging)
  starts = chunk.offsets[merged.pieces[:, 0], 0]
  stops = chunk.offsets[merged.pieces[:, 1] - 1, 1]
  # Pieces may be lower-cased or unknown: what is forced is looked for in the text as well.
  own, force = [text[start:stop] for start, stop in zip(starts, stops)], merging['force_tokens']
  words = tuple(seen if seen in force else word for seen, word in zip(own, merged.words))
  forced = np.array([word in force for word in words], bool)
  merged = merged._replace(words=words, probabilities=np.where(forced, 1.0, merged.probabilities))
  if count_tokens is None:
    counts = merged.pieces[:, 1] - merged.pieces[:, 0]
  else:
    counts = np.array([count_tokens(word) for word in merged.words], np.int64)
  return _Words(merged, np.stack([starts, stops], 1), counts)


def _kept(own: _Words, rate: float, **options: Any) -> np.ndarray:
  """Returns which words of a chunk stay; none where they are no token of the target model."""
  if rate < 1 and not own.counts.any():
    return np.zeros(len(own.counts), bool)
  return select_words(own.merged, own.counts, rate, **options)


def _joined(arrays: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
  """Returns the arrays of a text's chunks behind one another; of none an empty one."""
  return np.concatenate(arrays) if arrays else np.zeros(empty, bool if empty == (0,) else np.int64)


def _written(text: str, spans: np.ndarray, keep: np.ndarray, breaks: int | None) -> str:
  """Returns the words that stay as the text has them, with at most `breaks` line breaks between two."""
  parts, previous = [], 0
  for start, stop in spans[keep].tolist():
    if start == stop:  # a marker by itself
      continue
    between = text[previous:start]
    apart = any(map(str.isspace, between))
    if breaks != 0 and parts and '\n' in between:
      parts.append(('\n' * between.count('\n'))[:breaks])
    # Punctuation stays close to whatever is left of it; two words do not become one.
    elif between[-1:].isspace() or (apart and text[start].isalnum()):
      parts.append(' ')
    parts.append(text[start:stop])
    previous = stop
  return ''.join(parts).strip()


def save_compressor(folder: str | os.PathLike, compressor: PromptCompressor) -> None:
  """Writes a compressor into a folder, as a checkpoint of transformers; each file at once or not at all.

  `config.json` and `model.safetensors` under transformers' names, `tokenizer.json`, and `compressor.json`
  with the lengths.

  Raises:
    ValueError: for a model other than `models.Bert` with two classes.
  """
  from etils import epath
  from safetensors import numpy as safetensors_numpy

  model, folder = compressor.model, epath.Path(folder)
  layout = token_layout(compressor.tokenizer)
  config = to_config(model, layout.pad)
  if model.num_classes != 2:
    raise ValueError(f'save_compressor: num_classes={model.num_classes} of the model, expected 2.')
  config |= {'id2label': {'0': 'discard', '1': 'preserve'}}
  renames = HF_ROBERTA if model.first_position else HF_BERT
  weights = to_torch(jax.device_get(compressor.variables), renames=renames)
  weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
  limits = {name: getattr(compressor, name) for name in ('max_length', 'max_instruction')}
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in (
    ('tokenizer.json', compressor.tokenizer.to_str().encode()),
    ('model.safetensors', safetensors_numpy.save(weights, {'format': 'pt'})),
    ('config.json', json.dumps(config, indent=2).encode()),
    (_LIMITS, json.dumps(limits).encode()),
  ):
    partial = folder / f'{name}.{os.getpid()}.partial'
    partial.write_bytes(content)
    partial.replace(folder / name)


def load_compressor(folder: str | os.PathLike) -> PromptCompressor:
  """Returns the compressor of a folder, one of `save_compressor` or a checkpoint of transformers.

  Published ones, such as LLMLingua-2's, hold no `compressor.json`: their chunks are of 512 tokens at most.

  Raises:
    FileNotFoundError: if a file is missing; all are named.
    ValueError: for files that are no classifier of tokens with two classes, or do not fit each other.
    ModuleNotFoundError: without the library tokenizers; says how to install it.

  >>> compressor = load_compressor('runs/compressor')  # doctest: +SKIP
  >>> compress_prompt(text, 'Who?', **compressor._asdict(), rate=0.25).text  # doctest: +SKIP
  """
  folder = pathlib.Path(folder)
  names = ('config.json', 'model.safetensors', 'tokenizer.json')
  if missing := [name for name in names if not (folder / name).is_file()]:
    raise FileNotFoundError(
      f'{folder} is no prompt compressor: it lacks {", ".join(missing)} of {", ".join(names)}.'
    )
  try:
    config = _entries(folder / 'config.json')
    model = from_config(config)
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(f'{folder} holds no prompt compressor: {error}') from error
  if getattr(model, 'num_classes', None) != 2:
    own = config.get('architectures') or type(model).__name__
    raise ValueError(f'{folder} holds {own}, expected a classifier of tokens with two classes.')
  variables = from_torch(model, read_state_dict(folder / 'model.safetensors'))
  tokenizer = read_tokenizer(folder / 'tokenizer.json')
  if tokenizer.get_vocab_size() > model.vocab_size:
    raise ValueError(
      f'{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.vocab_size}.'
    )
  limits = _limits(folder / _LIMITS, model.max_length - model.first_position)
  return PromptCompressor(model, variables, tokenizer, **limits)


def _entries(file: pathlib.Path) -> dict[str, Any]:
  """Returns the object that a file of JSON holds."""
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{file} is no JSON: {error}.') from error
  if not isinstance(found, dict):
    raise ValueError(f'{file}: expected an object, got {type(found).__name__}.')
  return found


def _limits(file: pathlib.Path, positions: int) -> dict[str, int]:
  """Returns the lengths that a file tells, or, where it is not there, those of published compressors."""
  found = _entries(file) if file.is_file() else {}
  known = ('max_length', 'max_instruction')
  if unknown := sorted(found.keys() - set(known)):
    raise ValueError(f'{file}: unknown entries {unknown}; expected {", ".join(known)}.')
  for name, value in found.items():
    if type(value) is not int or value < 1:
      raise ValueError(f'{file}: {name}={value!r}, expected a whole number of at least 1.')
  found.setdefault('max_length', min(512, positions))
  if found['max_length'] > positions:
    raise ValueError(
      f'{file}: max_length={found["max_length"]}, but the model of config.json has {positions} positions.'
    )
  return found
