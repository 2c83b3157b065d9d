"""The names of parameters that OpenAI's client and vLLM have, for the table of parameters."""

from __future__ import annotations


def _names(*texts: str) -> frozenset[str]:
    return frozenset(name for text in texts for name in text.split())


_COMMON = """
    frequency_penalty logit_bias max_tokens model n presence_penalty seed stop stream stream_options temperature
    top_p user
"""
OPENAI = {
    "chat": _names(
        _COMMON,
        """
            audio function_call functions logprobs max_completion_tokens messages metadata modalities moderation
            parallel_tool_calls prediction prompt_cache_key prompt_cache_options prompt_cache_retention
            reasoning_effort response_format safety_identifier service_tier store tool_choice tools top_logprobs
            verbosity web_search_options
        """,
    ),
    "text": _names(_COMMON, "best_of echo logprobs prompt suffix"),
    "responses": _names("""
        access_programs background background_options context_management conversation image include input
        instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls
        previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning
        safety_identifier service_tier store stream stream_options temperature text tool_choice tools
        top_logprobs top_p truncation user
    """),
}
"""That OpenAI's client sends, by endpoint; a test compares them with the client's own types."""

_VLLM_COMMON = """
    add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo ignore_eos
    include_stop_str_in_output kv_transfer_params length_penalty logits_processors logprob_token_ids logprobs
    min_p min_tokens mm_processor_kwargs priority prompt_logprobs repetition_detection repetition_penalty
    request_id response_format return_mm_kwargs return_token_ids return_token_offsets return_tokens_as_token_ids
    routed_experts_prompt_start session_id skip_special_tokens spaces_between_special_tokens stop_token_ids
    stream_interval structured_outputs thinking_token_budget top_k truncate_prompt_tokens truncation_side
    use_beam_search vllm_xargs
"""
VLLM = {
    "chat": _names(
        _COMMON,
        _VLLM_COMMON,
        """
            add_generation_prompt chat_template chat_template_kwargs continue_final_message documents
            include_reasoning max_completion_tokens media_io_kwargs messages parallel_tool_calls
            reasoning_effort return_prompt_text tool_choice tools top_logprobs
        """,
    ),
    "text": _names(_COMMON, _VLLM_COMMON, "prompt prompt_embeds suffix"),
    "responses": _names("""
        background cache_salt enable_response_messages ignore_eos include include_stop_str_in_output input
        instructions logit_bias max_output_tokens max_tool_calls metadata mm_processor_kwargs model
        parallel_tool_calls previous_input_messages previous_response previous_response_id priority prompt
        prompt_cache_key reasoning repetition_penalty request_id seed service_tier skip_special_tokens stop
        store stream structured_outputs temperature text tool_choice tools top_k top_logprobs top_p truncation
        user vllm_xargs
    """),
}
"""vLLM's, by endpoint, as of November 2026; `logits_processors` is of earlier versions."""
