"""Which tests are slow beside those that say so: what keeps `make test` within its time."""

from __future__ import annotations

import pytest

# From `--durations`, where others cover nearly the same; by file and name.
LONG = {
    "capture/test_fold.py": {
        "test_folded_zoo_is_the_whole_capture[moe_index]",
    },
    "capture/test_sequence.py": {
        "test_folded_with_symbolic_sequence[gpt]",
        "test_symbolic_sequence_equals_eager_and_fits_other_lengths[hf_bert]",
    },
    "e2e/test_bad_input.py": {
        "test_an_op_without_a_rule_is_named_once_with_its_cost",
        "test_every_rank_says_what_is_wrong",
        "test_run_shows_the_ranks_error_once",
    },
    "e2e/test_compressed.py": {
        "test_near_one_device[data-1]",
    },
    "e2e/test_equivalence.py": {
        "test_a_dead_rank_is_a_failure_and_the_pool_goes_on",
        "test_float64_equals_one_device[gpt_attention_dropout-data+tensor]",
        "test_float64_equals_one_device[gpt_attention_dropout-zero]",
        "test_float64_equals_one_device[hf_gpt2-zero]",
        "test_float64_equals_one_device[resnet-data+tensor]",
    },
    "e2e/test_given_plans.py": {
        "test_plans_and_hints_of_the_user",
    },
    "e2e/test_large_models.py": {
        "test_pieces_are_those_of_one_device",
    },
    "e2e/test_micro_batches.py": {
        "test_loop_is_unchanged[dropout-zero]",
        "test_loop_is_unchanged[hooked-data+tensor]",
    },
    "e2e/test_piped_statistics.py": {
        "test_every_stage_hands_back_its_statistics[2-tensor-zero_bubble]",
        "test_every_stage_hands_back_its_statistics[4-data-1f1b]",
    },
    "e2e/test_pipelines.py": {
        "test_a_loss_outside_of_the_module_is_refused",
        "test_loop_is_unchanged[overflowing-1f1b]",
        "test_models_of_the_zoo_equal_one_device[llama-pipeline+tensor/zero_bubble]",
    },
    "e2e/test_planned.py": {
        "test_data_and_sequence[gpt_attention_dropout]",
        "test_data_and_sequence[llama]",
        "test_recomputed[gpt_attention_dropout-data-2-0]",
        "test_recomputed[gpt_attention_dropout-zero-1-1]",
        "test_recomputed[llama-tensor-0-2]",
    },
    "e2e/test_routed.py": {
        "test_routed[moe_mask]",
        "test_routed[moe_scatter]",
    },
    "e2e/test_training_loop.py": {
        "test_loop_is_unchanged[adamw-tensor]",
        "test_loop_is_unchanged[batch_sizes-data]",
        "test_loop_is_unchanged[batch_sizes-zero]",
        "test_loop_is_unchanged[checkpointed-tensor]",
        "test_loop_is_unchanged[copied-tensor]",
        "test_loop_is_unchanged[frozen-tensor]",
        "test_loop_is_unchanged[recurrent-zero]",
        "test_torchrun_ends_cleanly_after_a_user_error",
        "test_torchrun_trains_and_ends_cleanly",
    },
    "e2e/test_two_hosts.py": {
        "test_the_same_script_under_autopar_run_and_torchrun",
        "test_two_hosts_equal_one_device[moe-zero]",
    },
    "e2e/test_wide_sums.py": {
        "test_sums_are_rounded_once[1f1b]",
    },
    "kernels/e2e/test_zoo.py": {
        "test_float64_equals_one_device[gpt_attention_dropout-zero]",
    },
    "passes/test_blocks.py": {
        "test_representatives_are_alike[hf_t5]",
    },
    "passes/test_grouped.py": {
        "test_mixtral_as_hugging_face_runs_it",
    },
    "passes/test_hints.py": {
        "test_a_hint_in_forward_is_captured_folded_and_not_and_with_any_sequence",
    },
    "passes/test_propose.py": {
        "test_nothing_is_better_than_the_best[('2x4xH100', 0.5, {'micro_batches': (1, 2)})]",
        "test_nothing_is_better_than_the_best[('8xH100', 0.6, {'modes': ('none', 'full')})]",
        "test_nothing_is_better_than_the_best[('cpu:8', 0.5, {'micro_batches': (1, 2)})]",
    },
    "passes/test_routed_plans.py": {
        "test_tokens_travel_and_experts_stay[MaskDispatch-8xH100-64-1024-64]",
        "test_tokens_travel_and_experts_stay[ScatterDispatch-8xH100-64-1024-64]",
    },
    "passes/test_search.py": {
        "test_the_memory_limit_is_kept",
    },
    "passes/test_sequence_split.py": {
        "test_zoo_with_a_split_sequence[hf_llama-sp=2]",
    },
    "passes/test_share_recompute.py": {
        "test_real_blocks_from_tight_to_loose[llama-8xH100]",
    },
    "passes/test_short_program.py": {
        "test_as_in_the_whole_model[llama-data+tensor]",
        "test_recomputed_copies_are_of_their_own_kind",
    },
    "passes/test_simulated_zoo.py": {
        "test_odd_sizes[llama]",
        "test_odd_sizes[vit]",
        "test_zoo[gpt_outside]",
        "test_zoo[hf_bert]",
        "test_zoo[hf_gpt2]",
        "test_zoo[hf_llama]",
        "test_zoo[hf_mixtral]",
        "test_zoo[hf_t5]",
    },
    "passes/test_unflatten_tokens.py": {
        "test_a_long_sequence_is_split_through_the_loss[2-1x4xH100-2]",
    },
    "passes/test_work_of_search.py": {
        "test_work_does_not_grow_with_depth",
    },
    "runtime/test_compressed.py": {
        "test_real_processes[aabb]",
    },
    "runtime/test_group_gloo.py": {
        "test_four_processes[four hosts]",
        "test_four_processes[two hosts]",
    },
    "runtime/test_on_stage.py": {
        "test_pieces_of_several_runs[stages and tensor]",
    },
    "runtime/test_pipeline_engine.py": {
        "test_schedules_have_the_gradients_of_one_device[gpipe-1]",
    },
    "runtime/test_recompute.py": {
        "test_bytes_of_every_mode",
    },
    "runtime/test_regather.py": {
        "test_peak_of_gathered_parameters[0-0-dp=2 x fsdp=2]",
    },
    "test_capture.py": {
        "test_zoo_equals_eager_and_fits_other_batches[hf_t5]",
    },
    "test_cli_kernels.py": {
        "test_sources_are_printed_and_amd_has_no_inductor",
    },
    "test_loss_outside.py": {
        "test_a_loop_that_asks_for_stages",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long ones."""
    for item in items:
        file, name = item.nodeid.removeprefix("tests/").split("::", 1)
        if name in LONG.get(file, ()):
            item.add_marker(pytest.mark.slow)
