import os
import subprocess
import sys

import pytest

from anymixer.errors import UserError
from anymixer.training import OptimizerConfig, SchedulerConfig, TrainerConfig
from anymixer.training.times import for_composer, parse_time, scheduler_unit


def test_the_defaults_are_valid():
    TrainerConfig().validate()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer": OptimizerConfig(lr=0.0)}, "optimizer.lr"),
        ({"optimizer": OptimizerConfig(betas=[0.9, 1.0])}, "optimizer.betas"),
        ({"optimizer": OptimizerConfig(eps=0.0)}, "optimizer.eps"),
        ({"optimizer": OptimizerConfig(weight_decay=-1.0)}, "optimizer.weight_decay"),
        ({"scheduler": SchedulerConfig(t_warmup="soon")}, "scheduler.t_warmup"),
        ({"scheduler": SchedulerConfig(t_warmup="500ba")}, "scheduler.t_warmup"),
        ({"scheduler": SchedulerConfig(alpha_f=-0.1)}, "scheduler.alpha_f"),
        ({"scheduler": SchedulerConfig(decay="cubic")}, "scheduler.decay: 'cubic' is none of linear, sqrt"),
        (
            {"scheduler": SchedulerConfig(name="warmup_stable_decay", t_warmup="0.9dur", t_decay="0.5dur")},
            r"scheduler.t_decay: t_warmup \(0.9dur\) and t_decay \(0.5dur\) together are longer than the schedule",
        ),
        ({"scheduler": SchedulerConfig(name="warmup_stable_decay", t_warmup="0.95dur")}, "scheduler.t_decay"),
        (
            {"max_duration": "9ba", "scheduler": SchedulerConfig(name="warmup_stable_decay", t_warmup="9ba")},
            "scheduler.t_decay",
        ),
        ({"scheduler": SchedulerConfig(t_max="0.5dur")}, "scheduler.t_max: 0.5dur ends before the training"),
        ({"max_duration": "1dur"}, "max_duration"),
        ({"max_duration": "0ba"}, "max_duration: 0ba would train nothing"),
        ({"max_duration": "1.5ba"}, "max_duration"),
        ({"global_train_batch_size": 0}, "global_train_batch_size"),
        ({"device_train_microbatch_size": "Auto"}, "device_train_microbatch_size"),
        ({"device_train_microbatch_size": True}, "device_train_microbatch_size"),
        ({"device_train_microbatch_size": 0.5}, "device_train_microbatch_size"),
        ({"train_subset_num_batches": 0}, "train_subset_num_batches"),
        ({"precision": "amp_b16"}, "precision: 'amp_b16' is none of .*did you mean 'amp_bf16'"),
        ({"device": "cuda"}, "device"),
        ({"python_log_level": "loud"}, "python_log_level"),
        ({"eval_interval": "2 batches"}, "eval_interval"),
        ({"save_interval": "0ba"}, "save_interval"),
        ({"console_log_interval": "5sp"}, "console_log_interval"),
        ({"console_log_interval": "0ba"}, "console_log_interval: 0 would never log"),
        ({"autoresume": True}, "autoresume: needs save_folder"),
        ({"load_weights_only": True}, "load_weights_only"),
        ({"save_num_checkpoints_to_keep": 0}, "save_num_checkpoints_to_keep"),
        ({"parallelism_config": {"fsdp2": {}}}, "parallelism_config.fsdp2"),
        ({"parallelism_config": {"fsdp": {}}}, "device_train_microbatch_size: .*FSDP2"),
        ({"seed": -1}, "seed"),
        ({"dist_timeout": 0.0}, "dist_timeout"),
        ({"rank_timeout": 2.0}, "rank_timeout"),
        ({"rank_timeout": -1.0}, "rank_timeout"),
    ],
)
def test_a_bad_value_names_its_key(changes, key):
    with pytest.raises(UserError, match=f"^{key}"):
        TrainerConfig(**changes).validate()


def test_warm_up_and_decay_may_fill_the_whole_schedule():
    for duration, warmup in (("10ba", "9ba"), ("3ep", "0.9dur"), ("3ep", "2ep"), ("7ba", "0.9dur")):
        SchedulerConfig(name="warmup_stable_decay", t_warmup=warmup, t_decay="0.1dur").validate(duration)
    SchedulerConfig(name="warmup_stable_decay", t_warmup="5ba", t_max="0.8dur").validate("100ba")


@pytest.mark.parametrize("text", ["500ba", "1ep", "3", "0.06dur", "2.867e8sp"])
def test_times_that_composer_reads_are_read(text):
    from composer.core import Time

    value, unit = parse_time(text, "key")
    time = Time.from_timestring(for_composer(text))
    assert (time.value, time.unit.value) == (value, unit)


def test_a_share_is_counted_in_the_unit_of_the_training():
    assert scheduler_unit("0.1dur", "1000sp", "key") == "sp"
    assert scheduler_unit("0.1dur", "2ep", "key") == "ba"
    assert scheduler_unit("1ep", "1000ba", "key") == "ba"


def test_the_configuration_needs_neither_composer_nor_torch():
    code = "import sys, anymixer.training; print({'composer', 'torch', 'omegaconf'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "set()"
