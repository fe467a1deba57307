"""Where tests take their processes from: a server that has imported everything, so that one costs a fork.

A Python that starts anew spends five seconds of a processor on torch, transformers and peft. There is one server for
all tests, as `multiprocessing` has it, so what it imports is said here and nowhere else. It never computes: no thread
pool is lost in a fork.
"""

from __future__ import annotations

import multiprocessing

import hypothesis  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import gircse.cli
import gircse.ops
import gircse.train  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
