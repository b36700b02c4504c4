"""A GLUE run from start to end: plan the jobs, run what is missing, report what is there."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from anymixer.config import GlueConfig, dump_config
from anymixer.errors import UserError
from anymixer.files import check_folder, write_text_atomic
from anymixer.glue.facts import check_start, gather, notes
from anymixer.glue.graph import Facts, Graph, Node, build_graph, count_jobs
from anymixer.glue.report import missing_from_submission, remarks, terminal_table, write_report
from anymixer.glue.results import Plan, PlannedJob, Store
from anymixer.glue.runner import JOB_COMMAND, Runner, Slot, find_slots
from anymixer.glue.summary import summarize

CONFIG_NAME = "config.yaml"


def finetune(config: GlueConfig, *, command: Sequence[str] = JOB_COMMAND) -> None:
    """Run every job that has no result yet, then write the report.

    command: what starts a job when SPEC.json and FOLDER are added to it.
    Raises UserError for mistakes before any job starts, and, after the report, where jobs have failed.
    """
    _refuse_launcher()
    check_folder(_folder(config), "save_finetune_checkpoint_folder")
    store = Store(_folder(config))
    facts = gather(config)
    runner = Runner(store, _slots(config), command=command, time_limit=config.job_time_limit)
    graph = build_graph(config, facts, _scores(config, facts, store))
    before = [node for node in graph.nodes if store.result(node.job_id) is not None]
    if len(before) < len(graph.nodes):
        _check_jobs(config, facts, graph, runner.slots[0].device)
    write_text_atomic(store.folder / CONFIG_NAME, dump_config(config))
    for name, reason in facts.left_out.items():
        print(f"{name}: left out: {reason}")
    total = count_jobs(config, set(facts.left_out))
    slots = ", ".join(slot.name for slot in runner.slots)
    print(f"{config.base_run_name}: {total} jobs, {len(before)} finished before; on {slots}; results in {store.folder}")
    _run_all(config, facts, graph, store, runner, total)
    report(config)
    failed = runner.outcome.failed
    if failed:
        raise UserError(
            f"{len(failed)} of {total} jobs failed: {', '.join(failed)}; the same command runs only these again"
        )


def report(config: GlueConfig) -> None:
    """Print and write the report of what is on disk. Raises UserError where there is nothing."""
    from anymixer.report.learning_curves import write_learning_curves

    store = Store(_folder(config))
    summary = summarize(store.plan(), store)
    Console().print(terminal_table(summary))
    for line in remarks(summary):
        print(line)
    paths = write_report(summary, store)
    curves = write_learning_curves(summary, store.folder)
    for path in [*paths, *([curves] if curves else [])]:
        print(path)
    missing = missing_from_submission(summary)
    if missing and len(paths) > 3:
        print(f"{paths[-1]} lacks what GLUE's server wants too: {', '.join(missing)}")


def print_graph(config: GlueConfig) -> None:
    """Print the jobs, what each starts from, and which have finished; runs nothing."""
    check_folder(_folder(config), "save_finetune_checkpoint_folder")
    store, facts = Store(_folder(config)), gather(config)
    graph = build_graph(config, facts, _scores(config, facts, store))
    print(f"{config.base_run_name}: jobs, in {store.folder}")
    rows = [("job", "starts from", "lr", "weight decay", "batch", "duration", "state")]
    rows += [_row(node, store) for node in graph.nodes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for line in [*graph.waiting, *(f"{name}: left out: {reason}" for name, reason in facts.left_out.items())]:
        print(line)
    for line in notes(config, facts, graph):
        print(line)
    slots = _slots(config)
    total = count_jobs(config, set(facts.left_out))
    print(f"{total} jobs, {len(slots)} at a time ({', '.join(slot.name for slot in slots)})")


def _run_all(config: GlueConfig, facts: Facts, graph: Graph, store: Store, runner: Runner, total: int) -> None:
    """Run the graph, and what it grows by where a grid's results decide what comes next."""

    def grow(scores: Mapping[str, float | None]) -> Sequence[Node]:
        grown = build_graph(config, facts, scores)
        store.write_plan(_plan(config, facts, grown))
        return grown.nodes

    try:
        store.write_plan(_plan(config, facts, graph))
        runner.run(graph.nodes, total, grow)
    except (KeyboardInterrupt, SystemExit):
        done = len(runner.outcome.finished)
        print(f"\ninterrupted: {done} of {total} jobs have finished; start the same command again to run the rest")
        raise


def _plan(config: GlueConfig, facts: Facts, graph: Graph) -> Plan:
    jobs = [
        PlannedJob(job_id=n.job_id, task=n.spec.task, seed=n.spec.seed, point=n.point, needs=n.needs)
        for n in graph.nodes
    ]
    return Plan(
        name=str(config.base_run_name),
        select=config.select,
        jobs=jobs,
        chosen=dict(graph.chosen),
        left_out=dict(facts.left_out),
        notes=notes(config, facts, graph),
    )


def _scores(config: GlueConfig, facts: Facts, store: Store) -> dict[str, float | None]:
    """Scores of the finished jobs on disk, found graph by graph: each choice of a grid reveals further jobs."""
    scores: dict[str, float | None] = {}
    while True:
        nodes = build_graph(config, facts, scores).nodes
        results = {node.job_id: store.result(node.job_id) for node in nodes if node.job_id not in scores}
        found = {job_id: result.score for job_id, result in results.items() if result is not None}
        if not found:
            return scores
        scores |= found


def _check_jobs(config: GlueConfig, facts: Facts, graph: Graph, device: str) -> None:
    """Raise UserError for keys that a job would refuse on this machine, and a checkpoint that would not fit."""
    from anymixer.glue.job_config import trainer_config
    from anymixer.training import check_tables

    trainers = [trainer_config(node.spec, device) for node in graph.nodes]
    check_tables(trainers[0])
    # Composer takes seconds to import, and is by now.
    from anymixer.training.launch import plan_launch

    for trainer in trainers:
        plan_launch(trainer)
    check_start(config, facts, graph)


def _row(node: Node, store: Store) -> tuple[str, ...]:
    """A job's line of the graph: its name, where it starts, what it trains with, and how far it is."""
    spec, result = node.spec, store.result(node.job_id)
    start = node.needs or spec.starting_point or "random weights"
    if result is not None:
        state = f"finished, {100 * result.score:.2f}"
    else:
        state = "to run" if store.failure(node.job_id) is None else "failed before, to run again"
    figures = (f"{spec.lr:g}", f"{spec.weight_decay:g}", str(spec.batch_size), spec.max_duration)
    return (node.job_id, start, *figures, state)


def _slots(config: GlueConfig) -> list[Slot]:
    return find_slots(config.device, config.jobs_at_once if config.parallel else 1, count_jobs(config, set()))


def _folder(config: GlueConfig) -> Path:
    return Path(str(config.save_finetune_checkpoint_folder))


def _refuse_launcher() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("glue.py: start it with python, not with composer: it uses every GPU by itself, a job on each")
