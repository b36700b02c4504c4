import pytest

from anymixer.errors import UserError
from anymixer.training import OptimizerConfig, SchedulerConfig, TrainerConfig, check_tables
from anymixer.training.algorithms import ALGORITHMS
from anymixer.training.callbacks import CALLBACKS
from anymixer.training.loggers import LOGGERS, file_logger
from anymixer.training.named_table import NamedTable
from anymixer.training.optimizers import OPTIMIZERS
from anymixer.training.parallelism import PARALLELISM, build_parallelism
from anymixer.training.schedulers import SCHEDULERS

TABLES = [ALGORITHMS, CALLBACKS, LOGGERS, OPTIMIZERS, PARALLELISM, SCHEDULERS]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.section)
def test_every_name_stands_for_something(table):
    for name in table.factories:
        unguarded = NamedTable(table.section, table.factories, one_name=table.one_name)
        assert callable(unguarded.factory(name))
    assert not set(table.factories) & set(table.refused)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"callbacks": {"sped_monitor": {}}},
            "^callbacks.sped_monitor: unknown name; did you mean 'speed_monitor'",
        ),
        (
            {"callbacks": {"speed_monitor": {"windw_size": 3}}},
            "^callbacks.speed_monitor.windw_size: unknown key; did you mean 'window_size'",
        ),
        ({"callbacks": {"early_stopper": {}}}, "^callbacks.early_stopper.monitor: missing"),
        ({"callbacks": {"lr_monitor": 3}}, "^callbacks.lr_monitor: 3 must be a mapping"),
        ({"callbacks": {"health_checker": {}}}, "^callbacks.health_checker: Composer no longer has it"),
        ({"algorithms": {"fused_layernorm": {}}}, "^algorithms.fused_layernorm: .*low_precision_layernorm"),
        ({"algorithms": {"alibi": {}}}, "^algorithms.alibi: .*model.mixer"),
        ({"algorithms": {"gated_linear_units": {}}}, "^algorithms.gated_linear_units: .*channel_mixer"),
        (
            {"algorithms": {"gradient_clipping": {"norm": 1}}},
            "^algorithms.gradient_clipping.norm: unknown key",
        ),
        ({"loggers": {"tensorbord": {}}}, "^loggers.tensorbord: unknown name; did you mean 'tensorboard'"),
        (
            {"optimizer": OptimizerConfig(name="adam")},
            "^optimizer.name: 'adam': unknown name; did you mean 'adamw'",
        ),
        ({"optimizer": OptimizerConfig(options={"amsgrd": True})}, "^optimizer.options.amsgrd: unknown key"),
        ({"optimizer": OptimizerConfig(options={"lr": 1.0})}, "^optimizer.options.lr: unknown key"),
        ({"scheduler": SchedulerConfig(name="linear")}, "^scheduler.name: 'linear': unknown name"),
        ({"scheduler": SchedulerConfig(t_decay="0.1dur")}, "^scheduler.t_decay: unknown key"),
        ({"parallelism_config": {"fsdp": {"shard": 1}}}, "^parallelism_config.fsdp.shard: unknown key"),
    ],
)
def test_a_bad_name_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_tables(TrainerConfig(**changes))
    assert "\n" not in str(error.value)


def test_a_good_configuration_passes():
    check_tables(
        TrainerConfig(
            optimizer=OptimizerConfig(name="stableadamw", options={"decouple_lr": True}),
            scheduler=SchedulerConfig(name="warmup_stable_decay", t_decay="0.2dur", decay="linear"),
            algorithms={"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
            callbacks={"speed_monitor": {"window_size": 5}, "lr_monitor": {}, "runtime_estimator": None},
            loggers={"tensorboard": {"log_dir": "x"}, "in_memory": {}},
            parallelism_config={"fsdp": {"reshard_after_forward": False}},
        )
    )


def test_a_missing_package_names_the_extra():
    table = NamedTable("loggers", {"x": "no_such_package:Logger"}, packages={"x": "no_such_package"}, extra="loggers")
    with pytest.raises(UserError, match=r"^loggers.x: needs the package no_such_package.*\[loggers\]"):
        table.check({"x": {}})


def test_a_value_that_the_constructor_refuses_names_its_section():
    with pytest.raises(UserError, match=r"^callbacks.speed_monitor: Invalid time_unit: fortnights"):
        CALLBACKS.build({"speed_monitor": {"time_unit": "fortnights"}})


def test_fsdp_saves_whole_files_and_rounds_no_weights_unless_told_otherwise():
    assert build_parallelism(None) is None
    assert build_parallelism({"fsdp": None})["fsdp"].state_dict_type == "full"
    assert build_parallelism({"fsdp": None})["fsdp"].mixed_precision == "FULL"
    assert build_parallelism({"fsdp": {"mixed_precision": "PURE"}})["fsdp"].mixed_precision == "PURE"
    assert build_parallelism({"fsdp": {"state_dict_type": "sharded"}})["fsdp"].state_dict_type == "sharded"


def test_a_log_file_never_replaces_an_earlier_one(tmp_path):
    logger = file_logger(str(tmp_path / "log.txt"), capture_stdout=False, capture_stderr=False)
    assert logger.filename_format.startswith(str(tmp_path / "log-20"))
    assert logger.filename_format.endswith(".txt")
