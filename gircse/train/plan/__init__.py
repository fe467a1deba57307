"""What a training run will need (`gircse train --plan`): memory of each rank and the least time of a step.

| file | |
|---|---|
| `predict` | `plan`, which adds everything up, and its result |
| `meta_step` | the memory of a step, counted on the meta device |
| `extrapolate` | from a few layers and rows to all of them |
| `gpus` | the GPUs that can be planned for |

It imports `train.config`, `train.lora`, `roofline`, `lm` and `ops`.
"""
