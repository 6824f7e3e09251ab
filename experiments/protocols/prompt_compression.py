"""How compressors of prompts are trained and judged: annotated texts, a classifier of tokens, metrics."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import networks, runs, sources, supervised
from experiments.harness.data import check_size
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, free
from experiments.harness.supervised import Seen
from experiments.harness.tasks import Batch, is_correct
from jaxlab import compression, data, losses, models
from jaxlab.compression import PromptCompressor
from jaxlab.data import PromptRecord
from jaxlab.data.sources.sentences import sentences
from jaxlab.data.sources.text import python_reference
from jaxlab.training import map_batches

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TokenLabelTask:
  """A label for every token that counts.

  Records: `tokens`, `segments`, `labels` int `[length]`, `valid` (False at padding) and `counted` bool
  `[length]`, `index`. The model reads the keywords `tokens`, `mask` and `segments`.
  """

  length: int

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {'train': True}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    kinds = {'tokens': jnp.int32, 'segments': jnp.int32, 'labels': jnp.int32}
    kinds |= {'valid': jnp.bool_, 'counted': jnp.bool_}
    shapes = {name: jax.ShapeDtypeStruct((size, self.length), kind) for name, kind in kinds.items()}
    return {**shapes, 'index': jax.ShapeDtypeStruct((size,), jnp.int32)}

  def inputs(self, batch: Batch) -> Batch:
    """Returns the model's keywords."""
    return {
      'tokens': batch['tokens'], 'mask': batch['valid'], 'segments': batch['segments']
    }  # fmt: skip

  def augmented(self, keys: Array, batch: Batch) -> Batch:
    """Returns the model's keywords."""
    del keys
    return self.inputs(batch)

  def targets(self, batch: Batch) -> Batch:
    """Returns labels, and which count."""
    return {name: batch[name] for name in ('labels', 'counted')}

  def score(self, outputs: Array, targets: Batch) -> dict[str, Array]:
    """Returns `correct`, the mean over the tokens of each record that count."""
    hits = jnp.where(targets['counted'], is_correct(outputs, targets['labels']), 0)
    return {'correct': jnp.sum(hits, -1) / jnp.maximum(jnp.sum(targets['counted'], -1), 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Annotated texts, and how they become sequences of tokens.

  Attributes:
    name: 'facts', documents with an oracle (`jaxlab.data.fact_documents`); or 'files', JSON lines
      (`jaxlab.data.read_prompts`): `plain`, `instructed` and `test`, which holds both kinds.
    plain: file of texts that were shortened for nothing in particular.
    instructed: file of texts that were shortened for an instruction.
    test: file.
    count: documents of 'facts' of each kind.
    test_count: likewise.
    train_size: sequences of the plain texts, for which the schedule is made.
    tokenizer: a `tokenizer.json`, see `sources.file`; '': one is trained on plain texts, instructions and the
      prose that comes with Python.
    vocab_size: of that.
    length: tokens of a sequence.
    instruction_length: most tokens of an instruction.
    window: of the annotation.
    percentile: of the filter of texts that were annotated badly; None: all texts.
    num_threads: that read records; they are in memory.
    num_workers: processes that do.
  """

  name: Literal['facts', 'files']
  plain: str = ''
  instructed: str = ''
  test: str = ''
  count: int = 2000
  test_count: int = 200
  train_size: int
  tokenizer: str = ''
  vocab_size: int = 2048
  length: int = 512
  instruction_length: int = 64
  window: int = 150
  percentile: float | None = None
  num_threads: int = free(0)
  num_workers: int = free(0)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('count', 'test_count', 'train_size', 'vocab_size', 'instruction_length', 'window'):
      if getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected at least 1.'
    if self.length < self.instruction_length + 5:
      yield (
        f'length={self.length}: expected at least 5 more than instruction_length='
        f'{self.instruction_length}.'
      )
    files = {name: getattr(self, name) for name in ('plain', 'instructed', 'test')}
    if (self.name == 'files') != all(files.values()) or (
      self.name == 'facts' and any(files.values())
    ):
      yield f"name={self.name!r} with {files}: expected all three of 'files', none of 'facts'."
    if self.percentile is not None and not 0 < self.percentile <= 100:
      yield f'percentile={self.percentile}: expected one in (0, 100], or none.'

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    package = sources.installed_by(self.tokenizer)
    own = f'; {self.tokenizer}: a tokenizer' + (f' ({package})' if package else '')
    own = own if self.tokenizer else ''
    if self.name == 'facts':
      return f'nothing: documents of prose that comes with Python{own}'
    return (
      f'{self.plain}, {self.instructed}, {self.test}: JSON lines, objects with text, compressed, instruction '
      f'and answers, see jaxlab.data.read_prompts{own}'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of compressors of prompts.

  Attributes:
    data: the texts.
    model: name and fields of `jaxlab.models.create`, of an encoder whose tokens are classified.
    pretrained: name of public weights that its training starts from; empty: it is drawn.
    weights: file with them.
    fan_in_scaled: patterns of kernels, see `networks.fan_in_scaled`.
    recipe: of the training; all trainings have as many steps as its epochs of the plain sequences.
    validation: share of the training sequences that is kept back; the recipe's `eval_every` then says when
      it is looked at, and the best variables are taken.
    official_quirks: train as the code of LLMLingua-2 does: `jaxlab.data.prompt_examples`, and a loss over
      all positions.
    rates: which prompts are compressed at.
  """

  data: Prompts
  model: Mapping[str, Any]
  pretrained: str = ''
  weights: str = free('')
  fan_in_scaled: tuple[str, ...] = ()
  recipe: Recipe
  validation: float = 0.0
  official_quirks: bool = False
  rates: tuple[float, ...] = (0.25,)

  @property
  def network(self) -> nn.Module:
    """The classifier."""
    return networks.create(self.model, num_classes=2)

  @property
  def num_steps(self) -> int:
    """Steps of each training."""
    kept = self.data.train_size - round(self.validation * self.data.train_size)
    return self.recipe.epochs * (kept // self.recipe.batch_size)


class Loaded(NamedTuple):
  """What trainings and their comparison read.

  Attributes:
    tokenizer: of the library tokenizers.
    plain: sequences without instruction, arrays by name, see `jaxlab.data.prompt_examples`.
    instructed: sequences with one.
    test: texts of both kinds.
  """

  tokenizer: Any
  plain: dict[str, np.ndarray]
  instructed: dict[str, np.ndarray]
  test: list[PromptRecord]


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  own, recipe = config.data, config.recipe
  problems = list(found_by('model', lambda: config.network))
  yield from problems
  if not problems:
    model = config.network
    if not isinstance(model, models.Bert):
      yield f'model: {type(model).__name__}; expected an encoder, a Bert.'
    elif own.length > model.max_length - model.first_position:
      yield (
        f'data.length={own.length}: the model has {model.max_length - model.first_position} positions.'
      )
    elif not own.tokenizer and own.vocab_size > model.vocab_size:
      yield f'data.vocab_size={own.vocab_size}: the model has {model.vocab_size} tokens.'
  if config.pretrained and config.pretrained.partition('.')[0] != config.model.get('name'):
    yield f'pretrained={config.pretrained!r} are weights of another network than the model.'
  if config.weights and not config.pretrained:
    yield f'weights={config.weights!r}: give the name of the weights, pretrained, too.'
  if not 0 <= config.validation < 1:
    yield f'validation={config.validation}: expected a share in [0, 1).'
  elif bool(config.validation) != bool(recipe.eval_every):
    yield (
      f'validation={config.validation} and recipe.eval_every={recipe.eval_every}: expected both, or none.'
    )
  elif config.num_steps < 1:
    yield f'recipe.batch_size={recipe.batch_size} exceeds the training sequences.'
  yield from check_batch(config.mesh, recipe.batch_size, 'recipe.batch_size')
  if not config.rates or not all(0 < rate <= 1 for rate in config.rates):
    yield f'rates={config.rates}: expected rates in (0, 1].'


def load(config: Settings) -> Loaded:
  """Returns tokenizer, sequences and test texts.

  Raises:
    FileNotFoundError: for a file that is not there.
    ValueError: for files of another form, or another number of sequences than the settings say.
  """
  own = config.data
  tokenizer = models.read_tokenizer(sources.file(own.tokenizer)) if own.tokenizer else None
  if own.name == 'facts':
    plain, instructed = (
      data.fact_documents('train', own.count, instructed=asked, seed=config.seed)
      for asked in (False, True)
    )
    test = [
      record
      for asked in (False, True)
      for record in data.fact_documents('test', own.test_count, instructed=asked, seed=config.seed)
    ]
  else:
    plain, instructed, test = map(data.read_prompts, (own.plain, own.instructed, own.test))
    check_kind(own.plain, plain, False)
    check_kind(own.instructed, instructed, True)
    if not any(item.compressed or (item.instruction and item.answers) for item in test):
      raise ValueError(
        f'{own.test}: no record can be judged; expected some with compressed, or instruction and answers.'
      )
  if tokenizer is None:
    texts = [f'{record.text} {record.instruction}' for record in (*plain, *instructed)]
    tokenizer = models.train_tokenizer([*texts, *sentences(python_reference())], own.vocab_size)
  if tokenizer.get_vocab_size() > config.network.vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.network.vocab_size}: set '
      'model.vocab_size.'
    )
  options = {
    'max_length': own.length,
    'max_instruction': own.instruction_length,
    'window': own.window,
    'percentile': own.percentile,
    'official_quirks': config.official_quirks,
  }
  found = [data.prompt_examples(each, tokenizer, **options) for each in (plain, instructed)]
  check_size('data.train_size', own.train_size, found[0]['tokens'])
  return Loaded(tokenizer, *found, test)


def check_kind(path: str, records: Sequence[PromptRecord], instructed: bool) -> None:
  """Raises ValueError unless all records have an instruction, or none has."""
  for index, record in enumerate(records):
    if bool(record.instruction) != instructed or not record.compressed:
      wanted = 'an instruction' if instructed else 'no instruction'
      raise ValueError(f'{path}: record {index} must have {wanted}, and a compressed text.')


def require_instructed(loaded: Loaded, rate: float) -> None:
  """Raises ValueError unless there are enough instructed sequences for `rate` times the plain ones."""
  plain, there = len(loaded.plain['tokens']), len(loaded.instructed['tokens'])
  wanted = round(rate * plain)
  if wanted > there:
    raise ValueError(
      f'{rate:g} for each of {plain} plain sequences are {wanted} instructed ones, got {there}: give more of '
      'these texts.'
    )


def training(config: Settings, title: str, decides: Mapping[str, Any]) -> Run:
  """Returns the training of a compressor; `decides` says which sequences it sees."""
  recipe = config.recipe
  mode = 'all_positions' if config.official_quirks else 'text_only'

  def loss(logits: Array, targets: Batch, seen: Seen) -> Array:
    del seen
    return losses.token_classifier_loss(logits, targets['labels'], targets['counted'], mode)

  task, steps = TokenLabelTask(config.data.length), config.num_steps // recipe.epochs
  prepare = functools.partial(networks.fan_in_scaled, config.fan_in_scaled)
  program = supervised.program(config.network, task, recipe, steps, loss=loss, prepare=prepare)
  names = ('model', 'pretrained', 'fan_in_scaled', 'validation', 'official_quirks')
  own = {name: getattr(config, name) for name in names}
  return Run(config, config.data, recipe, program, config.num_steps, {**own, **decides}, title)


def train(config: Settings, run: Run, loaded: Loaded, rate: float, folder: Any) -> Variables:
  """Returns a classifier's variables, trained on the plain sequences and `rate` times as many instructed.

  Args:
    config: the experiment.
    run: its training.
    loaded: the sequences.
    rate: instructed sequences for one plain sequence, see `jaxlab.data.mix_instructed`.
    folder: of the run.
  """
  sizes = len(loaded.plain['tokens']), len(loaded.instructed['tokens'])
  order = data.mix_instructed(np.random.default_rng([config.seed, 1]), *sizes, rate)
  arrays = {
    name: np.concatenate([loaded.plain[name], loaded.instructed[name]])[order]
    for name in loaded.plain
  }
  cut = round(config.validation * len(order))
  options: dict[str, Any] = {}
  if cut:
    held = data.InMemory({name: array[:cut] for name, array in arrays.items()}, 2)
    options['evaluate'] = functools.partial(accuracy, config, held)
  if config.pretrained:
    _, start = networks.public(config, num_classes=None)
    options |= {'start': start, 'fresh': ['classifier/.*']}
  source = data.InMemory({name: array[cut:] for name, array in arrays.items()}, 2)
  return runs.train(run, source, folder, **options).variables


def accuracy(config: Settings, source: data.Source, variables: Variables) -> dict[str, float]:
  """Returns the accuracy of the tokens of validation sequences."""
  fn = functools.partial(_correct, variables, model=config.network, length=config.data.length)
  hits = map_batches(
    fn, source, batch_size=config.eval_batch_size, mesh=config.mesh.make(), num_threads=0
  )
  return {'accuracy': float(hits.mean())}


@functools.partial(jax.jit, static_argnames=('model', 'length'))
def _correct(variables: Variables, batch: Batch, *, model: nn.Module, length: int) -> Array:
  task = TokenLabelTask(length)
  outputs = model.apply(variables, **task.inputs(batch))
  return task.score(outputs, task.targets(batch))['correct']


def compressor(config: Settings, loaded: Loaded, variables: Variables) -> PromptCompressor:
  """Returns what compresses."""
  lengths = config.data.length, config.data.instruction_length
  return PromptCompressor(config.network, variables, loaded.tokenizer, *lengths)


def judge(
  config: Settings, made: PromptCompressor, test: Sequence[PromptRecord]
) -> dict[str, float]:
  """Returns how good a compressor is at each of `config.rates`, in percent.

  `retention_<1/rate>x`: compressed for their instruction, texts still hold an answer; `f1_...`: F1 of the
  words that are kept against those that the teacher keeps. `agnostic_retention_...`: likewise compressed
  without their instruction; `agnostic_f1_...`: texts that the teacher shortened without one.
  """
  values: dict[str, list[float]] = {}

  def add(kind: str, own: float, rate: float) -> None:
    values.setdefault(f'{kind}_{1 / rate:g}x', []).append(100 * own)

  for rate in config.rates:
    for record in test:
      asked = record.instruction
      found = compression.compress_prompt(record.text, asked, **made._asdict(), rate=rate)
      prefix = '' if asked else 'agnostic_'
      if record.compressed:
        add(f'{prefix}f1', word_f1(record, found.spans[0][found.keep[0]], config.data.window), rate)
      if record.answers and asked:
        add('retention', holds(found.text, record.answers), rate)
        plain = compression.compress_prompt(record.text, **made._asdict(), rate=rate)
        add('agnostic_retention', holds(plain.text, record.answers), rate)
  return {name: float(np.mean(own)) for name, own in values.items()}


def holds(text: str, answers: Sequence[str]) -> bool:
  """Returns whether the words of an answer stand in a text, one behind the other, in any case."""
  words = f' {" ".join(_words(text))} '
  return any(f' {" ".join(_words(answer))} ' in words for answer in answers)


def _words(text: str) -> list[str]:
  return [word.lower() for word in data.split_words(text)[0]]


def word_f1(record: PromptRecord, kept: np.ndarray, window: int = 150) -> float:
  """Returns the F1 of kept words against those that the teacher keeps; 1 if neither keeps any.

  Args:
    record: a text and what the teacher shortened it to.
    kept: `[words, 2]`, where the words stand that are kept.
    window: of the annotation.
  """
  annotation, spans = data.annotate_text(record.text, record.compressed, window=window)
  there = np.zeros(len(record.text) + 1, np.int64)
  for start, stop in kept.tolist():
    there[start:stop] = 1
  before = np.concatenate([[0], np.cumsum(there)])
  own = before[spans[:, 1]] > before[spans[:, 0]]
  both, total = (own & annotation.labels).sum(), own.sum() + annotation.labels.sum()
  return float(2 * both / total) if total else 1.0
