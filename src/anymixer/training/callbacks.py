"""The callbacks a YAML file may name: Composer's own, under MosaicBERT's names."""

from anymixer.training.named_table import NamedTable

CALLBACKS = NamedTable(
    section="callbacks",
    factories={
        "activation_monitor": "composer.callbacks:ActivationMonitor",
        "early_stopper": "composer.callbacks:EarlyStopper",
        "free_outputs": "composer.callbacks:FreeOutputs",
        "lr_monitor": "composer.callbacks:LRMonitor",
        "memory_monitor": "composer.callbacks:MemoryMonitor",
        "memory_snapshot": "composer.callbacks:MemorySnapshot",
        "nan_monitor": "composer.callbacks:NaNMonitor",
        "oom_observer": "composer.callbacks:OOMObserver",
        "optimizer_monitor": "composer.callbacks:OptimizerMonitor",
        "runtime_estimator": "composer.callbacks:RuntimeEstimator",
        "speed_monitor": "composer.callbacks:SpeedMonitor",
        "system_metrics_monitor": "composer.callbacks:SystemMetricsMonitor",
        "threshold_stopper": "composer.callbacks:ThresholdStopper",
    },
    refused={
        "checkpoint_saver": "set save_folder, save_interval and save_num_checkpoints_to_keep instead",
        "health_checker": "Composer no longer has it; nan_monitor stops a run whose loss is NaN",
        "mlperf": "this is no MLPerf submission; speed_monitor records the speed",
    },
)
