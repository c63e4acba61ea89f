"""The parts of the loop, each of which owns its state; `hookline.trainer` holds them.

The verbs in `hookline.hookspecs` define a step, a window, an epoch and an evaluation; these parts do the rest. A
part imports only parts below it, and sees the trainer as a `run.Run`.

- `training`: epochs, steps and boundaries.
- `evaluation`: validation in training, and separate evaluations.
- `session`: one call of `train`, `validate`, `test` or `predict`, from `on_begin_run` to `on_end_run`.
- `building`: the model, the optimizers and the length of a run, made from the module.
- `logs`: logged values until their flush; `reductions`: the running means and sums below it.
- `ends`: the end of training, requests to stop or save, and the agreement of ranks on them.
- `window`: the micro-batches of the current optimizer step.
- `idle`: a module that is restored after a pass that does not count.
"""
