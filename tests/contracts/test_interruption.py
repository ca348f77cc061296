"""The contract with who interrupts a run, damages it, or names the wrong folder: a row for each, held by a test."""

import re
from pathlib import Path

import pytest

from tests.contracts import page

ROOT = Path(__file__).parents[2]
SOAK = "tests/soak/test_interruption.py"
RESUMING = "tests/training/test_resuming.py"
RUNS = "tests/training/test_runs.py"
LIST = "tests/training/test_file_list.py"
FOLDERS = "tests/supernet/test_folders.py"
COMMANDS = "tests/commands/test_run_folder.py"
HEADS = ("what happens", "what mlfs does", "why", "held by")
Row = tuple[str, str, str, str]  # what happens, what mlfs does, why, the test that holds it

CUT_OFF: list[Row] = [
    (
        "`kill -9` at any operation on a file of the run, then `--resume_from_checkpoint true`",
        "ends as a run that was left alone, bit for bit on a CPU: weights, optimizer, logs, results; "
        "times and `train_loss` apart",
        "each file is written under another name and renamed; a checkpoint's list of files comes last. `train_loss`, "
        "and the mean losses of a log whose steps lie on both sides of the checkpoint, are transformers' over the "
        "steps of one process",
        f"{SOAK}::test_a_run_killed_at_any_of_its_file_operations_resumes_bit_for_bit",
    ),
    (
        "killed again and again while it resumes",
        "the same",
        "resuming writes by the same rules",
        f"{SOAK}::test_a_run_killed_again_while_it_resumes_still_ends_the_same",
    ),
    (
        "killed between the last checkpoint of a stage and its end",
        "the stage ends there; an evaluation or a log that was due at the end of the epoch is not made up for",
        "transformers would take a step before it asks whether that was the last one",
        f"{RESUMING}::test_a_stage_that_was_cut_off_at_its_end_takes_no_further_step",
    ),
    (
        "killed there after a callback (early stopping) had ended the stage",
        "the stage ends there",
        "what the callback decided is in the checkpoint",
        f"{RESUMING}::test_a_stage_that_a_callback_ended_and_that_was_cut_off_then_takes_no_further_step",
    ),
    (
        "killed between saving the last stage and the run folder",
        "resuming has the run folder hold the last stage",
        "table, results, `mlfs eval RUN` and `mlfs export RUN` describe one model",
        f"{RESUMING}::test_a_finished_run_that_is_resumed_holds_its_last_stage_everywhere",
    ),
    (
        "the power fails",
        "a checkpoint that has its list is whole",
        "every file is on the disk (`fsync`) before the list gets its name",
        f"{LIST}::test_every_file_is_on_the_disk_before_the_list_has_its_name",
    ),
    (
        "the disk is full while a checkpoint is saved",
        "one line names the last whole checkpoint; the run can be resumed",
        "the half-written one is removed",
        "tests/training/test_trainer.py::test_a_full_disk_while_saving_leaves_the_previous_checkpoint",
    ),
    (
        "killed with `save_total_limit`",
        "a whole checkpoint is there at any time",
        "older ones are deleted once the next has its list",
        f"{RUNS}::test_an_older_checkpoint_is_deleted_only_once_the_next_is_whole",
    ),
    (
        "an export cannot be put in place",
        "the export before is still there",
        "it moves aside, and back",
        f"{COMMANDS}::test_an_export_that_cannot_be_put_in_place_leaves_the_one_before",
    ),
]
DAMAGED: list[Row] = [
    (
        "any file of the newest checkpoint is changed, cut or deleted",
        "resuming goes on from the one before, and says so",
        "`files.json` has a SHA-256 of every file",
        f"{RUNS}::test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so",
    ),
    (
        "... of a checkpoint that is named",
        "refused: resume from the run folder",
        "whoever names one wants that one",
        f"{RUNS}::test_a_damaged_checkpoint_that_is_named_is_refused",
    ),
    (
        "a file that resuming reads is put into a checkpoint",
        "the checkpoint counts as damaged; files of yours beside it do not matter",
        "it is not on the list",
        f"{LIST}::test_what_resuming_would_read_and_was_not_saved_is_found",
    ),
    (
        "a checkpoint holds pickled code, and a list that fits",
        "refused; the code does not run",
        "transformers loads tensors and plain values alone (`weights_only`)",
        f"{RUNS}::test_code_in_a_checkpoint_does_not_run",
    ),
    (
        "a file of a finished stage is changed",
        "the stage trains on from its last whole checkpoint, and says so",
        "stages have lists too",
        f"{RESUMING}::test_a_damaged_stage_falls_back_to_its_last_checkpoint_and_says_so",
    ),
    (
        "folders of earlier stages are deleted",
        "the run goes on; their logs are missing, which is said",
        "a stage holds what those before it learned",
        f"{RESUMING}::test_a_run_goes_on_in_a_stage_whose_predecessors_are_gone",
    ),
    (
        "`data.json` is changed by hand, or is another run's",
        "refused where data is read",
        "swapped labels would give other scores without a word; the file has a checksum, and its labels are the "
        "model's",
        f"{COMMANDS}::test_a_record_of_the_data_that_is_not_this_runs_is_refused",
    ),
    (
        "`results.json` is damaged",
        "read only for a name of the palette other than max and min, and then refused",
        "nothing else needs it",
        f"{COMMANDS}::test_damaged_results_are_read_only_for_a_name_that_they_hold",
    ),
    (
        "a file of the run's tokenizer is damaged",
        "`eval` and `export` refuse",
        "other tokens would give other scores without a word",
        f"{COMMANDS}::test_a_damaged_tokenizer_is_refused_in_one_line",
    ),
]
ASKED: list[Row] = [
    (
        "training into a folder that holds a run",
        "refused, and nothing in it changes; `overwrite_run` deletes the run first",
        "work would be lost",
        f"{RESUMING}::test_a_finished_run_is_not_trained_over_unless_asked",
    ),
    (
        "`mlfs train` into a folder that holds a run, with other data",
        "refused, and `data.json` is as it was",
        "it is written once training begins",
        f"{COMMANDS}::test_training_that_is_refused_records_nothing",
    ),
    (
        "resuming from a folder without a whole stage or checkpoint",
        "refused",
        "training would begin anew, over what is in output_dir",
        f"{RESUMING}::test_a_place_without_anything_to_resume_from_is_refused",
    ),
    (
        "`--resume_from_checkpoint true` where nothing was saved yet",
        "starts from the beginning",
        "a run may have been killed before its first checkpoint",
        f"{SOAK}::test_a_run_killed_at_some_of_its_file_operations_resumes_bit_for_bit",
    ),
    (
        "resuming from a checkpoint after which there are whole ones, or stages",
        "refused; `overwrite_run` deletes what comes after it, and later stages train anew",
        "later stages were trained on what the checkpoint led to",
        f"{RESUMING}::test_later_checkpoints_are_not_trained_over_unless_asked",
    ),
    (
        "resuming a stage with more steps than it began with",
        "takes the further steps",
        "as in transformers",
        f"{RESUMING}::test_a_stage_may_go_on_for_more_steps_than_it_began_with",
    ),
    (
        "resuming with data of other labels",
        "refused",
        "the head has learned the labels of the run",
        f"{COMMANDS}::test_training_that_is_refused_records_nothing",
    ),
    (
        "two processes in one output_dir",
        "the second is refused; the first goes on",
        "one result would be gone",
        f"{FOLDERS}::test_a_second_process_is_refused_in_one_line_and_the_first_goes_on",
    ),
    (
        "a lock that a killed process left, also one whose workers are alive",
        "does not block",
        "the system holds the lock, not the file",
        f"{FOLDERS}::test_a_lock_that_a_killed_process_left_does_not_block",
    ),
    (
        "`mlfs export` to what is, contains or lies in a run, by any path or link",
        "refused, with and without `--overwrite`",
        "the run would be deleted",
        f"{COMMANDS}::test_a_target_that_is_contains_or_lies_in_a_run_is_refused",
    ),
    (
        "`mlfs export --overwrite` to a folder that holds anything but an earlier export",
        "refused",
        "files of yours would be deleted",
        f"{COMMANDS}::test_only_an_earlier_export_is_replaced",
    ),
    (
        "`mlfs demo` into a run",
        "refused, unless the run is an earlier demo",
        "the run would be deleted",
        f"{COMMANDS}::test_the_demo_does_not_replace_a_run",
    ),
    (
        "an output_dir that is a file, cannot be written, or has too long a name",
        "refused before data and model are loaded",
        "minutes would be lost",
        f"{COMMANDS}::test_options_are_refused_in_one_line_before_data_and_model_are_loaded",
    ),
]
SECTIONS = (("A run is cut off", CUT_OFF), ("Files are damaged", DAMAGED), ("Something else is asked", ASKED))
INTRODUCTION = """# What an interrupted run leaves, and what is never lost

What was saved is never lost without being asked for, and what was trained is the same however often it was cut off.
Where something cannot be done, it is refused in one line that says what to do. `make soak` kills a run at each of some
500 operations on its files and resumes it; `make test` takes twelve of them.
"""


def text() -> str:
    sections = []
    for title, rows in SECTIONS:
        shown = [(*row[:3], f"`{row[3].partition('::')[2]}`") for row in rows]
        sections.append((title, HEADS, shown))
    return page.page(INTRODUCTION, sections, "tests.contracts.test_interruption")


def test_the_page_has_these_rows() -> None:
    page.check("interruption", text())


@pytest.mark.parametrize("test", sorted({row[3] for _, rows in SECTIONS for row in rows}))
def test_the_test_that_holds_a_row_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


if __name__ == "__main__":
    page.write("interruption", text())
