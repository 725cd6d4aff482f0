"""Everything a trainer imports, imported: the warm parent loads this once and forks trainers that have it already.

Imports only. One multi-threaded torch operation here would leave a thread pool that the forked child waits for for ever.
"""

import safetensors.torch  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import gemini_gnn.training.job  # noqa: F401
