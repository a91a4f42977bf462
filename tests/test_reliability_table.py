"""docs/reliability.md names a test for every fault that can be provoked, and every test it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", TEXT[TEXT.index("## Faults") :], re.MULTILINE)
NAMES = {name for row in ROWS for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", row[3])}

# Tests of parts that are not in this tree yet; to be emptied as they come.
AWAITED = {
    "tests/cluster/test_slurm_processes.py::test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint",
    "tests/cluster/test_slurm_processes.py::test_starts_that_bring_no_new_checkpoint_end_with_76",
    "tests/cluster/test_slurm_processes.py::test_the_warning_before_the_time_limit_saves_and_requeues",
    "tests/distributed/test_network.py::test_a_host_with_nothing_but_loopback_uses_it",
    "tests/distributed/test_network.py::test_an_address_that_does_not_resolve_is_named_with_what_to_do",
    "tests/distributed/test_network.py::test_tasks_of_each_node",
    "tests/distributed/test_watchdog.py::test_a_failure_of_one_rank_is_that_of_all",
    "tests/distributed/test_watchdog.py::test_a_single_rank_that_holds_the_interpreters_lock_is_ended_and_shows_where",
    "tests/distributed/test_watchdog.py::test_a_slow_rank_is_named_and_goes_on",
    "tests/distributed/test_watchdog.py::test_a_stuck_rank_is_named_and_all_leave",
    "tests/distributed/test_world.py::test_a_singleton_of_mpi_is_an_error",
    "tests/end_to_end/test_numbers.py::test_a_loss_that_breaks_on_one_rank_stops_before_the_step",
    "tests/end_to_end/test_numbers.py::test_a_rank_without_memory_says_what_did_not_fit_and_the_others_do_not_hang",
    "tests/end_to_end/test_numbers.py::test_a_rollback_equals_a_run_that_never_had_these_steps_however_it_is_interrupted",
    "tests/end_to_end/test_resuming.py::test_a_run_goes_on_with_fewer_ranks_and_with_more",
    "tests/end_to_end/test_resuming.py::test_a_run_that_dies_at_its_end_ends_the_same_once_more",
    "tests/end_to_end/test_resuming.py::test_metrics_of_a_rewound_run_are_those_of_one_run",
    "tests/end_to_end/test_safety.py::test_a_pickle_in_any_other_file_does_not_run",
    "tests/end_to_end/test_safety.py::test_a_training_that_hangs_names_the_rank_and_leaves",
    "tests/end_to_end/test_safety.py::test_code_that_comes_with_a_model_is_refused_aloud_and_recorded_where_it_runs",
    "tests/end_to_end/test_safety.py::test_names_that_lead_out_of_a_folder_are_refused",
    "tests/end_to_end/test_safety.py::test_no_secret_is_in_any_file_of_a_run_or_in_what_it_says",
    "tests/end_to_end/test_safety.py::test_nothing_behind_a_symbolic_link_is_deleted",
    "tests/launcher/test_commands.py::test_a_hostfile_without_hosts_or_that_is_not_there_is_an_error",
    "tests/launcher/test_commands.py::test_a_parcel_arrives_as_it_was_sent",
    "tests/launcher/test_commands.py::test_deepspeed_over_hosts_carries_environment_and_arguments_in_one_word",
    "tests/launcher/test_commands.py::test_every_wrong_line_of_a_hostfile_is_told",
    "tests/launcher/test_commands.py::test_secrets_and_facts_of_one_host_are_not_forwarded",
    "tests/launcher/test_slurm.py::test_a_container_is_entered_for_every_command_of_sft_dist",
    "tests/model/test_resharding.py::test_a_checkpoint_of_other_parameters_or_groups_is_refused_by_name",
    "tests/model/test_resharding.py::test_the_steps_after_a_change_of_ranks_are_those_of_the_undisturbed_run",
    "tests/model/test_snapshot.py::test_a_full_disk_is_an_error_of_the_operating_system",
    "tests/train/test_contract.py::test_an_edited_file_is_named",
    "tests/train/test_contract.py::test_another_model_is_named_by_the_entry_of_its_config",
    "tests/train/test_contract.py::test_another_precision_is_named",
    "tests/train/test_contract.py::test_another_template_is_named_by_its_first_other_line",
    "tests/train/test_contract.py::test_another_tokenizer_is_named_by_its_part",
    "tests/train/test_contract.py::test_another_value_of_a_fixed_key_is_named",
    "tests/train/test_contract.py::test_files_in_another_order_are_another_order_of_samples",
    "tests/train/test_contract.py::test_other_base_weights_are_said_since_they_are_not_read_again",
    "tests/train/test_contract.py::test_other_versions_are_said_and_those_that_only_mend_are_not",
    "tests/train/test_contract.py::test_what_may_change_is_listed_and_everything_else_is_fixed",
    "tests/train/test_deadline.py::test_one_more_step_and_its_saving_fit_in_whenever_the_run_goes_on",
    "tests/train/test_lock.py::test_a_heart_that_has_stopped_is_taken_over_after_listening",
    "tests/train/test_lock.py::test_a_killed_holder_blocks_nobody",
    "tests/train/test_lock.py::test_the_second_of_two_is_refused_by_the_name_of_the_first",
    "tests/train/test_out_of_memory.py::test_a_limit_of_the_address_space_is_run_into_and_named",
    "tests/train/test_retention.py::test_what_cannot_be_removed_is_told_and_ends_nothing",
    "tests/train/test_retention.py::test_what_stays",
    "tests/train/test_saving.py::test_a_disk_that_refuses_bytes_is_told_with_its_own_words",
    "tests/train/test_saving.py::test_a_failure_of_one_rank_ends_all_with_74_and_costs_no_checkpoint",
    "tests/train/test_saving.py::test_a_rank_that_hangs_in_writing_does_not_stop_the_others_for_ever",
    "tests/train/test_saving.py::test_killed_at_any_point_of_a_save_it_goes_on_from_a_whole_checkpoint",
    "tests/train/test_saving.py::test_ranks_agree_on_what_is_damaged_and_take_the_one_before",
    "tests/train/test_saving.py::test_training_goes_on_while_a_slow_rank_writes",
    "tests/train/test_saving.py::test_what_will_not_fit_is_told_before_the_first_step",
}


def is_there(name: str) -> bool:
    path, _, function = name.partition("::")
    if not (ROOT / path).exists():
        return False
    tree = ast.parse((ROOT / path).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_rows_are_numbered_and_every_one_has_a_test_or_a_reason() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 93))
    assert all(test.strip() for *_, test in ROWS)
    assert sum("`tests/" in test for *_, test in ROWS) >= 80


def test_every_test_that_is_named_exists() -> None:
    assert sorted(name for name in NAMES - AWAITED if not is_there(name)) == []


def test_every_path_of_the_document_exists() -> None:
    for path in re.findall(r"`((?:tests|benchmarks|docs)/[\w/.]+\.(?:py|md))(?:::\w+)?`", TEXT):
        assert (ROOT / path).exists() or any(name.startswith(path) for name in AWAITED), path
