"""Text generation: one compiled loop over a decoder's cache."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.intercept import Hook, apply

Array = jax.Array
PyTree = Any


def sample_token(
  key: Array,
  logits: Array,
  temperature: float | Array = 1.0,
  top_k: int | None = None,
  top_p: float | Array | None = None,
) -> Array:
  """Draws tokens from `softmax(logits / temperature)`, cut to its `top_k` and then to its nucleus `top_p`.

  The nucleus is the smallest set of most probable tokens whose probabilities (after the other two) sum to at
  least `top_p` (Holtzman et al. 2020, arXiv 1904.09751). Tokens that tie with the last one kept are kept.

  Args:
    key: a typed key.
    logits: `[..., vocab]`.
    temperature: positive.
    top_k: number of tokens, static; None: all.
    top_p: in (0, 1]; None: 1.

  Returns:
    int32 `[...]`.

  >>> sample_token(jax.random.key(0), jnp.array([[0.0, 1.0, 3.0]]), top_k=1).tolist()
  [2]
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
  if top_k is not None and top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  if top_p is not None:
    ordered = -jnp.sort(-logits, axis=-1)
    chances = jax.nn.softmax(ordered)
    before = jnp.cumsum(chances, axis=-1) - chances
    kept = (before < top_p).at[..., 0].set(True)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def generate(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  prompt: Array,
  *,
  max_new_tokens: int,
  mask: Array | None = None,
  key: Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  eos: int | None = None,
  hooks: Sequence[Hook] = (),
) -> Array:
  """Returns the tokens with which a decoder continues each prompt.

  Each token is the most probable one (`temperature=0`) or drawn by `sample_token`, given all before it. One
  program, compiled once a shape: the prompt fills the cache, a loop adds a token a round, and stops early
  where all sequences have ended.

  Prompts of unequal length are padded to one, on the left or on the right, and `mask` tells the padding:
  the continuation is that of the prompt alone.

  Args:
    model: `GPT2`, `Llama` or a module like them: `model(tokens, mask=...)`, `init_cache`, a collection
      `'cache'`.
    variables: its variables, without a cache.
    prompt: integers `[batch, time]`.
    max_new_tokens: at least 1; static.
    mask: `[batch, time]`, false or 0 for padding; each row holds a token.
    key: a typed key, where tokens are drawn; round i uses `fold_in(key, i)`.
    temperature: 0 or positive.
    top_k: see `sample_token`.
    top_p: see `sample_token`.
    eos: the token that ends a sequence; what follows it is `eos` again. None: none does.
    hooks: as in `apply`; the same objects again find the compiled program again.

  Returns:
    int32 `[batch, max_new_tokens]`, without the prompt.

  Raises:
    ValueError: for an option out of range, a missing key, an empty prompt, or (where they are concrete)
      tokens outside of the vocabulary and prompts without a token.
  """
  prompt = jnp.asarray(prompt)
  mask = jnp.ones(prompt.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
  _check_options(max_new_tokens, key, temperature, top_k, top_p)
  _check_prompt(prompt, mask, model.vocab_size)
  return _generate(
    model,
    dict(variables),
    prompt,
    mask,
    jax.random.key(0) if key is None else key,
    temperature or 1.0,
    1.0 if top_p is None else top_p,
    max_new_tokens=max_new_tokens,
    greedy=not temperature,
    top_k=top_k,
    nucleus=top_p is not None,
    eos=eos,
    hooks=tuple(hooks),
  )


@functools.partial(
  jax.jit,
  static_argnames=('model', 'max_new_tokens', 'greedy', 'top_k', 'nucleus', 'eos', 'hooks'),
)
def _generate(
  model, variables, prompt, mask, key, temperature, top_p, *,
  max_new_tokens, greedy, top_k, nucleus, eos, hooks,
):  # fmt: skip
  batch, time = prompt.shape

  def run(tokens, mask, cache):
    logits, state = apply(
      model, {**variables, 'cache': cache}, tokens, mask=mask, hooks=hooks, mutable=['cache']
    )
    return logits, state['cache']

  def choose(logits, index):
    if greedy:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step_key = jax.random.fold_in(key, index)
    return sample_token(step_key, logits, temperature, top_k, top_p if nucleus else None)

  def unfinished(carry):
    index, _, _, ended = carry
    return (index < max_new_tokens) & ~jnp.all(ended)

  def step(carry):
    index, tokens, cache, ended = carry
    last = jax.lax.dynamic_slice_in_dim(tokens, index - 1, 1, axis=1)
    logits, cache = run(last, None, cache)
    token = choose(logits[:, 0], index)
    if eos is not None:
      token = jnp.where(ended, eos, token)
      ended = ended | (token == eos)
    return index + 1, tokens.at[:, index].set(token), cache, ended

  # The last new token is not read again, so it needs no slot.
  logits, cache = run(prompt, mask, model.init_cache(batch, time + max_new_tokens - 1))
  end = time - 1 - jnp.argmax(mask[:, ::-1], axis=1)
  token = choose(jnp.take_along_axis(logits, end[:, None, None], axis=1)[:, 0], 0)
  tokens = jnp.full((batch, max_new_tokens), 0 if eos is None else eos, jnp.int32)
  ended = jnp.zeros(batch, bool) if eos is None else token == eos
  carry = (jnp.asarray(1), tokens.at[:, 0].set(token), cache, ended)
  return jax.lax.while_loop(unfinished, step, carry)[1]


def _check_options(max_new_tokens, key, temperature, top_k, top_p) -> None:
  if max_new_tokens < 1:
    raise ValueError(f'generate: max_new_tokens={max_new_tokens}, expected at least 1.')
  if not 0 <= temperature < np.inf:
    raise ValueError(f'generate: temperature={temperature}; 0 is greedy, otherwise positive.')
  if temperature and key is None:
    raise ValueError(
      f'generate: temperature={temperature} draws tokens: give a key, e.g. jax.random.key(0).'
    )
  if not temperature and (top_k is not None or top_p is not None):
    raise ValueError('generate: top_k and top_p choose among drawn tokens: give a temperature > 0.')
  if top_k is not None and top_k < 1:
    raise ValueError(f'generate: top_k={top_k}, expected at least 1.')
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f'generate: top_p={top_p} is not in (0, 1].')


def _check_prompt(prompt: Array, mask: Array, vocab_size: int) -> None:
  if prompt.ndim != 2 or 0 in prompt.shape or not jnp.issubdtype(prompt.dtype, jnp.integer):
    raise ValueError(
      f'generate: prompt must be integers [batch, time], not empty; got {prompt.dtype} {prompt.shape}.'
    )
  if mask.shape != prompt.shape:
    raise ValueError(f'generate: mask {mask.shape} must have the shape of prompt, {prompt.shape}.')
  if any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in (prompt, mask)):
    return
  tokens, real = np.asarray(prompt), np.asarray(mask)
  if not real.any(axis=1).all():
    raise ValueError(
      f'generate: the mask leaves prompt {np.argmin(real.any(axis=1))} without a token.'
    )
  if tokens.min() < 0 or tokens.max() >= vocab_size:
    raise ValueError(
      f'generate: prompt must be in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}.'
    )
