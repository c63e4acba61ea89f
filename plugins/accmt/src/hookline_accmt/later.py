"""Names of other versions of ACCMT than the one that is followed, each with what to write instead."""

from __future__ import annotations

ARGUMENTS = {
    "additional_metrics": "metrics=[…] with an object of a subclass of Metric for each",
    "batch_sampler": "get_train_dataloader() of the module",
    "callback": "a plugin of hookline, in the YAML that to_yaml() returns",
    "callbacks": "a plugin of hookline, in the YAML that to_yaml() returns",
    "cleanup_cache_every_n_steps": "nothing, as no cache is emptied",
    "collate_fn_train": "collate_fn, or get_train_dataloader() of the module",
    "collate_fn_val": "collate_fn, or get_validation_dataloader() of the module",
    "compile_kwargs": "the options of the plugin compile, in the YAML that to_yaml() returns",
    "dataloader_drop_last": "get_train_dataloader() of the module",
    "disable_collate_fn_on_evaluation": "get_validation_dataloader() of the module",
    "disable_model_saving": "model_saving=None",
    "enable_checkpointing": "checkpoint_every=None",
    "gradient_checkpointing": "self.model.gradient_checkpointing_enable() in the module, or the plugin "
    "activation_checkpoint in the YAML that to_yaml() returns",
    "multiple_checkpoints": "nothing, as the last three checkpoints stay",
    "patience": "the plugin early_stop, in the YAML that to_yaml() returns",
    "sampler_train": "sampler",
    "sampler_val": "get_validation_dataloader() of the module",
}
"""Arguments of `Trainer`."""

METHODS = {
    "get_optimiser": "name it get_optimizer",
    "get_optimizers": "name it get_optimizer, and return one",
    "get_schedulers": "name it get_scheduler, and return one",
    "get_training_dataloader": "name it get_train_dataloader",
    "get_val_dataloader": "name it get_validation_dataloader",
    "get_valid_dataloader": "name it get_validation_dataloader",
    "after_eval": "do it at the end of validation_step",
    "before_eval": "do it at the beginning of validation_step",
    "collate_fn_train": "write collate_fn, or get_train_dataloader with one of its own",
    "collate_fn_val": "write collate_fn, or get_validation_dataloader with one of its own",
}
"""Methods of a module that look as if they were called: of later versions, or slips of a name."""

COLLATOR = "is not here: take the one of transformers, `from transformers import {}`"
EXPORTS = {
    "DataCollatorForLanguageModeling": COLLATOR,
    "DataCollatorForLongestSequence": "is not here: take transformers' DataCollatorWithPadding",
    "DataCollatorForSeq2Seq": COLLATOR,
    "DataCollatorWithPadding": COLLATOR,
    "DistributedWeightedRandomSampler": "is not here: torch's WeightedRandomSampler is shared between ranks",
    "Evaluator": "is not here: `trainer.core.validate()` evaluates after fit",
    "ExtendedAcceleratorModule": "is not here: write a `hookline.ModuleInterface`, and a plugin that performs `update`",
    "HyperParameterSearch": "is not here: `hookline sweep` searches, over the YAML that to_yaml() returns",
    "TemperatureSampler": "is not here: the plugin sampling draws by temperature",
    "allow_tf32": "is not here: the plugin backend does it, or torch.set_float32_matmul_precision",
}
"""Names to import."""
