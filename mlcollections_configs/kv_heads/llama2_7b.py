"""KV heads on LLaMA2-7B: half and a quarter of the cache, LoRA behind it.

  python -m experiments.kv_heads --config=llama2_7b --workdir=DIR \\
    --config.network.data.train_split=c4.npy --config.network.data.test_split=wikitext2.npy

The two files hold tokens of the model's own tokenizer (`jaxlab.data.TokenFile`); `train_size` is the number
of windows of 2048 tokens in the first. Calibration: 128 windows of C4, as in the paper's study of ranks. Its
fine-tuning is not told but for LoRA: rank 16, alpha 32, AdamW at 1e-4 and one epoch are taken, here 500 steps
of 16 windows. The weights (huggingface.co/meta-llama, after its license has been accepted) stay in bfloat16,
split over the chips.

  python -m experiments aot --config=kv_heads/llama2_7b --topology=v5e:4x4 --mesh=data=2,fsdp=1,tensor=8 \\
    --programs=decode,decode_svd_a_2,decode_svd_a_4

compiles decoding with heads and channels of the MLPs split over `tensor`: weights stay where they lie. On the
setting's mesh, where batches are split over the same chips, they are gathered anew for each token.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  model = dict(name='llama2_7b', dtype='bfloat16', param_dtype='bfloat16', remat=True)
  config = pretrained(model, 'llama2_7b.meta-llama/Llama-2-7b-hf', 32000)
  config.decoding.partition = BY_HEADS
  return config


# What makes heads, channels of the MLP and logits is split by these, and what reads heads and channels alike.
OVER = ('fsdp', 'tensor')
BY_HEADS = (
  (r'.*/(q|k|v|gate|up)_proj/kernel', (None, OVER)),
  (r'.*/(o|down)_proj/kernel', (OVER, None)),
  (r'.*/(embed_tokens/embedding|lm_head/kernel)', (None, OVER)),
)


def pretrained(model: dict, weights: str, vocab_size: int) -> ConfigDict:
  """Returns the settings of a decoder with public weights."""
  config = ConfigDict()
  windows = dict(vocab_size=vocab_size, length=2048)
  config.network = dict(
    data=dict(
      name='tokens',
      train_split='c4.npy',
      test_split='wikitext2.npy',
      train_options=windows,
      test_options=windows,
      train_size=8192,
      length=2048,
    ),
    model=model,
    pretrained=weights,
  )
  config.group_sizes = (2, 4)
  config.tuned = ('svd_a', 'svd_w', 'mean')
  config.calibration = dict(count=128, batch_size=16, on_device=True)
  config.tuning = dict(
    steps=500,
    rank=16,
    alpha=32.0,
    recipe=dict(
      epochs=1,
      batch_size=16,
      precision='bfloat16',
      optimizer=dict(name='adamw'),
      schedule=dict(name='cosine', base=1e-4),
    ),
  )
  config.decoding = dict(batch_size=64, length=4096, repeats=0)
  config.eval_batch_size = 16
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  return config
