"""One module a paper: each composes the library's functions into the paper's experiment."""

import os
import pathlib

# A step that was compiled once is not compiled again when a run is resumed or repeated with another seed.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path.home() / '.cache' / 'jaxlab' / 'compiled')
)
