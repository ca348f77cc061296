"""Tables as text: columns that line up, numbers a reader can compare."""

from mlfs.report.table import compared_with_whole, results_table, table


def test_columns_line_up_under_their_names():
    text = table([{"name": "a", "value": 1}, {"name": "longer", "value": 22}])
    assert text.splitlines() == ["name    value", "-------------", "a       1", "longer  22"]


def test_numbers_are_shown_with_their_units():
    row = {"parameters": 22_713_986, "bytes": 90_855_944, "latency": 0.01234, "accuracy": 0.879587, "steps": 12}
    header, _, line = table([row]).splitlines()
    assert header.split("  ") == ["parameters", "size on disk", "latency", "accuracy", "steps"]
    assert line.split() == ["22.71", "M", "90.9", "MB", "12.3", "ms", "0.8796", "12"]


def test_a_value_that_a_row_lacks_leaves_its_cell_empty():
    text = table([{"name": "a", "x": 1}, {"name": "b", "y": 2}])
    assert text.splitlines() == ["name  x  y", "----------", "a     1", "b        2"]


def test_results_show_what_identifies_a_size_first_and_leave_out_what_the_trainer_times():
    row = {"accuracy": 0.5, "latency": 0.01, "subnet": "8/4/16/2", "runtime": 3.0, "sizes": {}, "name": "max"}
    row |= {"samples_per_second": 1.0, "steps_per_second": 1.0, "bytes": 4e6, "parameters": 1e6}
    header = results_table([row]).splitlines()[0]
    assert header.split() == ["name", "subnet", "parameters", "size", "on", "disk", "latency", "accuracy"]


def test_the_layers_that_each_depth_keeps_are_named_below():
    kept = {"a": [0, 1, 2], "b": [0, 2], "c": [0, 2], "d": [1]}
    rows = [{"name": name, "subnet": "8", "sizes": {"layers": layers}} for name, layers in kept.items()]
    assert results_table(rows).splitlines()[-2:] == ["2 layers: 0, 2", "1 layer: 1"]


def test_sizes_that_cannot_be_saved_are_named_below():
    rows = [{"name": name, "subnet": "8", "exportable": name != "b"} for name in "abc"]
    assert results_table(rows).splitlines()[-1] == "in place only, since no configuration states such sizes: b"
    assert results_table(rows[:1]).splitlines()[-1].split() == ["a", "8"]


def test_what_a_size_has_lost_and_gained_is_said_in_a_line():
    rows = [{"name": "max", "accuracy": 0.8, "latency": 0.3}, {"name": "half", "accuracy": 0.77, "latency": 0.1}]
    rows.append({"name": "odd", "accuracy": 0.805, "latency": 0.15})
    assert compared_with_whole(rows, "accuracy", [1.0, 0.5, 0.25]).splitlines() == [
        "against the whole model (80.0 %):",
        "  half keeps 50% of the layers' weights, is 3.0 times as fast, and scores 3.0 points less",
        "  odd keeps 25% of the layers' weights, is 2.0 times as fast, and scores 0.5 points more",
    ]
