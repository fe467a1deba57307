"""`TrainConfig` under its public name; it is defined in `gircse.train.config`."""

from gircse.train.config import TrainConfig as TrainConfig
