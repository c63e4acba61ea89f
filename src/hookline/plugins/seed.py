"""The seed's events: methods of `CallbackInterface` that need no mark when overridden."""

SEED = {  # the number of fixed arguments, and the argument of collated outputs
    "on_begin_train_epoch": (2, None),
    "on_end_backward": (2, None),
    "on_end_train_step": (1, "train_step_collated_outputs"),
    "on_end_val_epoch": (1, "val_step_collated_outputs"),
    "on_end_train_epoch": (1, "train_step_collated_outputs"),
    "on_end_train": (1, None),
}
COLLECTING = {hook: outputs for hook, (_, outputs) in SEED.items() if outputs} | {
    "on_end_test_epoch": "test_step_collated_outputs"
}
BRIDGES = ("_call_on_", "_spread_on_")  # methods of CallbackInterface that call an override by position
