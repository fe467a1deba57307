"""The parts of `bench/gpu_suite.py`.

| file | what |
|---|---|
| `session.py` | records that are written at once, the time that is left, what went wrong |
| `attempts.py` | the suite again, without the case in which it hung or lost the device |
| `precompile.py` | the kernels that will be timed, compiled beforehand by many processes |
| `tests.py` | `tests/gpu` in many processes |
| `ops.py`, `models.py`, `plan.py` | what is timed: both ops, encoding and training, the plan |
| `steps.py` | one captured decode step, beside its floor |
| `attention.py` | the attention of a decode step, for many shapes |
| `model_cases.py` | the encodings and training steps, and what they are held to |
| `profile.py` | where the time of a step goes, as text |
| `candidates.py` | alternatives of a kernel against the table's choice |
| `summary.py` | the table at the end |
"""
