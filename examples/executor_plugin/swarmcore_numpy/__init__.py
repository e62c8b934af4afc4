"""A swarmcore executor in NumPy, for models of the Llama family."""

from swarmcore_numpy.executor import NumpyExecutor
from swarmcore_numpy.loader import NumpyLoader

__all__ = ["NumpyExecutor", "NumpyLoader"]
