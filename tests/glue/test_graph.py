"""Which jobs a run has, what they start from, and how a grid's results decide what comes next."""

import dataclasses

from anymixer.glue.facts import notes
from anymixer.glue.graph import build_graph, choose, count_jobs

THREE = {"seeds": [1, 2, 3]}


def by_task(graph):
    found = {}
    for node in graph.nodes:
        found.setdefault(node.spec.task, []).append(node)
    return found


def test_stage_two_starts_from_the_mnli_job_of_the_same_seed(make_settings, facts):
    settings = make_settings({"rte": THREE, "cola": THREE, "mnli": THREE, "wnli": {"seeds": [1]}})
    graph = build_graph(settings, facts, {})
    assert len(graph.nodes) == count_jobs(settings) == 10 and graph.waiting == ()
    tasks = by_task(graph)
    assert next(iter(tasks)) == "mnli"
    mnli = {node.spec.seed: node.job_id for node in tasks["mnli"]}
    assert {node.spec.seed: node.needs for node in tasks["rte"]} == mnli
    assert [node.spec.starting_point for node in tasks["rte"]] == [f"job:{mnli[s]}" for s in (1, 2, 3)]
    assert {node.needs for name in ("cola", "mnli", "wnli") for node in tasks[name]} == {None}
    assert {node.spec.starting_point for node in tasks["cola"]} == {"runs/start"}
    assert {node.spec.starting_digest for node in tasks["cola"]} == {"abc"}
    assert [node.spec.save_checkpoint for node in tasks["mnli"] + tasks["rte"]] == [True] * 3 + [False] * 3


def test_seeds_that_mnli_lacks_start_from_its_first(make_settings, facts):
    settings = make_settings({"mnli": {"seeds": [7, 8]}, "stsb": {"seeds": [7, 9]}})
    graph = build_graph(settings, facts, {})
    tasks = by_task(graph)
    assert [node.needs for node in tasks["stsb"]] == [tasks["mnli"][0].job_id] * 2
    assert notes(settings, facts, graph) == ["stsb: no MNLI job has seed 9; started from that of seed 7"]


def test_starting_points_can_be_chosen(make_settings, facts):
    tasks = {"mnli": {}, "rte": {"starting_point": "pretrained"}, "mrpc": {"starting_point": "/elsewhere"}, "cola": {}}
    tasks["sst2"] = {"starting_point": "mnli"}
    found = by_task(build_graph(make_settings(tasks), facts, {}))
    assert found["rte"][0].spec.starting_point == "runs/start"
    assert found["mrpc"][0].spec.starting_point == "/elsewhere"
    assert found["sst2"][0].needs == found["mnli"][0].job_id
    found = by_task(build_graph(make_settings({"mnli": {}, "rte": {}}, from_mnli=False), facts, {}))
    assert found["rte"][0].needs is None


def test_a_task_left_out_has_no_jobs_and_stage_two_says_so(make_settings, facts):
    settings = make_settings({"mnli": {}, "rte": {}})
    without = dataclasses.replace(facts, left_out={"mnli": "no train split"})
    graph = build_graph(settings, without, {})
    assert [(node.spec.task, node.spec.starting_point) for node in graph.nodes] == [("rte", "runs/start")]
    assert notes(settings, without, graph) == ["rte: from the starting checkpoint, because mnli is left out"]
    assert count_jobs(settings, {"mnli"}) == 1


def test_a_grid_is_tried_on_some_seeds_and_the_rest_follows_its_choice(make_settings, facts):
    settings = make_settings({"cola": THREE}, sweep={"lr": [1e-5, 3e-5], "weight_decay": [0.0, 0.1]}, sweep_seeds=1)
    graph = build_graph(settings, facts, {})
    assert [(n.spec.lr, n.spec.weight_decay, n.spec.seed) for n in graph.nodes] == [
        (1e-5, 0.0, 1),
        (1e-5, 0.1, 1),
        (3e-5, 0.0, 1),
        (3e-5, 0.1, 1),
    ]
    assert graph.chosen == {} and graph.waiting == ("cola: 2 seeds more, at the grid's choice",)
    scores = {node.job_id: score for node, score in zip(graph.nodes, (0.1, 0.2, 0.4, 0.3))}
    assert build_graph(settings, facts, dict(list(scores.items())[:3])).chosen == {}
    grown = build_graph(settings, facts, scores)
    assert grown.chosen == {"cola": {"lr": 3e-5, "weight_decay": 0.0}} and grown.waiting == ()
    assert [node.job_id for node in grown.nodes[:4]] == [node.job_id for node in graph.nodes]
    assert [(n.spec.lr, n.spec.weight_decay, n.spec.seed) for n in grown.nodes[4:]] == [(3e-5, 0.0, 2), (3e-5, 0.0, 3)]
    assert len(grown.nodes) == count_jobs(settings) == 6


def test_stage_two_waits_for_the_choice_of_mnli(make_settings, facts):
    settings = make_settings({"mnli": {"sweep": {"lr": [1e-5, 3e-5]}, "seeds": [1]}, "rte": {"seeds": [1]}})
    graph = build_graph(settings, facts, {})
    assert [node.spec.task for node in graph.nodes] == ["mnli", "mnli"]
    assert graph.waiting == ("rte: until the grid of mnli has a choice",)
    low, high = (node.job_id for node in graph.nodes)
    grown = build_graph(settings, facts, {low: 0.8, high: 0.7})
    assert [node.needs for node in grown.nodes] == [None, None, low]
    assert count_jobs(settings) == 3


def test_the_choice_is_the_best_mean_and_passes_over_failures(make_settings, facts):
    settings = make_settings({"cola": {"seeds": [1, 2]}}, sweep={"lr": [1e-5, 2e-5, 3e-5]})
    nodes = build_graph(settings, facts, {}).nodes

    def chosen(*scores):
        point = choose(nodes, dict(zip((node.job_id for node in nodes), scores)))
        return None if point is None else point["lr"]

    assert chosen(0.5, 0.5, 0.9, 0.3, 0.4, 0.4) == 2e-5
    assert chosen(0.5, 0.5, 0.5, 0.5, 0.5, 0.5) == 1e-5
    assert chosen(0.1, 0.1, 0.9, None, 0.2, 0.2) == 3e-5
    assert chosen(None, None, None, None, None, None) == 1e-5
    assert chosen(0.5, 0.5, 0.9, 0.3, 0.4) is None


def test_what_changes_the_numbers_makes_another_job_and_nothing_else_does(make_settings, facts):
    def job(facts=facts, **changes):
        return build_graph(make_settings({"cola": {"seeds": [1]}}, **changes), facts, {}).nodes[0].job_id

    moved = dataclasses.replace(facts, starting_point="/moved", starting_digests={"/moved": "abc"})
    assert job() == job(jobs_at_once=7) == job(facts=moved)
    others = {job(pooling="mean"), job(max_seq_len=64), job(select="best"), job(sweep={"lr": [1e-4]})}
    others |= {job(facts=dataclasses.replace(facts, starting_digests={"runs/start": "other"}))}
    others |= {job(facts=dataclasses.replace(facts, code_digest="changed"))}
    assert len(others | {job()}) == 7
