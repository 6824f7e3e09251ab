"""EFPC with XLM-RoBERTa-large on texts that a large language model has shortened, by LLMLingua-2's recipe.

  python -m experiments.efpc --config=xlm_roberta_large --workdir=DIR

The files are JSON lines, objects with `text`, `compressed`, `instruction` and `answers` (`jaxlab.data.read_prompts`):
MeetingBank's training transcripts in chunks of at most 512 tokens, each shortened without an instruction, other
texts shortened for one, and test texts such as LongBench's. `data.train_size` counts sequences of plain texts
behind the filter; another number is answered with the right one. Words are annotated as they are, where the code of
LLMLingua-2 has spaCy's lemmas (`jaxlab.data.prompt_examples` takes a lemmatizer).
"""  # noqa: E501

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='files',
    plain='data/efpc/meetingbank.jsonl',
    instructed='data/efpc/instructed.jsonl',
    test='data/efpc/test.jsonl',
    train_size=40000,
    tokenizer='data/efpc/xlm_roberta_large/tokenizer.json',
    length=512,
    instruction_length=64,  # inferred
    window=400,  # LLMLingua-2's script
    percentile=90.0,
  )
  config.model = dict(name='xlm_roberta_large', remat=True)
  config.pretrained = 'xlm_roberta_large'
  # LLMLingua-2's code; EFPC tells no other.
  config.recipe = dict(
    epochs=10,
    batch_size=10,
    optimizer=dict(name='adam'),
    schedule=dict(name='constant', base=1e-5),
    partition=(
      (r'.*/attention/[qkv]_proj/kernel', (None, 'tensor')),
      (r'.*/attention/proj/kernel', ('tensor', None)),
      (r'.*/mlp/fc1/kernel', (None, 'tensor')),
      (r'.*/mlp/fc2/kernel', ('tensor', None)),
    ),
    eval_every=3200,
    best_metric='accuracy',
  )
  # Ten sequences do not divide over devices: each layer does.
  config.mesh = dict(data=1, tensor=-1)
  config.validation = 0.2
  config.eval_batch_size = 32
  config.added = (0.0, 0.01, 0.1)
  config.rates = (0.25,)
  return config
