"""`torchrun -m gircse.train ...`: the command `gircse train` as a module that a launcher can start."""

import sys

from gircse.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
