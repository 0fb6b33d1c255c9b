//! The list of request fields: one entry per field and verdict.

use super::Neutral::{EmptyObject, False, List, Number, Text, True};
use super::Route::{
    self, Chat, Completions, Detokenize, Embeddings, Rerank, Responses, Score, Tokenize,
};
use super::Verdict::{Accepted, Honoured, Refused};
use super::{Neutral, RequestField};

/// Routes that generate text.
const TEXT: &[Route] = &[Completions, Chat, Responses];
/// Of these, the routes with `n` and with log probabilities in OpenAI's older form.
const CHOICES: &[Route] = &[Completions, Chat];
/// Routes that take conversations.
const CONVERSATION: &[Route] = &[Chat, Tokenize];
/// Routes that score texts.
const SCORES: &[Route] = &[Rerank, Score];
const NEVER: &[Neutral] = &[];
const OFF: &[Neutral] = &[False];
const NONE: &[Neutral] = &[List(&[])];

const fn honoured(
    name: &'static str,
    routes: &'static [Route],
    note: &'static str,
) -> RequestField {
    RequestField {
        name,
        routes,
        verdict: Honoured,
        note,
    }
}

const fn refused(
    name: &'static str,
    routes: &'static [Route],
    neutral: &'static [Neutral],
    note: &'static str,
) -> RequestField {
    RequestField {
        name,
        routes,
        verdict: Refused(neutral),
        note,
    }
}

const fn accepted(
    name: &'static str,
    routes: &'static [Route],
    note: &'static str,
) -> RequestField {
    RequestField {
        name,
        routes,
        verdict: Accepted,
        note,
    }
}

/// Returns every known request field.
pub fn request_fields() -> &'static [RequestField] {
    FIELDS
}

const FIELDS: &[RequestField] = &[
    honoured("model", &Route::ALL, "404 for a name that is not served"),
    // The text to continue.
    honoured("prompt", &[Completions, Tokenize], ""),
    refused(
        "prompt",
        &[Responses],
        NEVER,
        "there are no stored prompts; send instructions and input",
    ),
    honoured("messages", CONVERSATION, ""),
    honoured("input", &[Responses, Embeddings], ""),
    honoured("instructions", &[Responses], ""),
    honoured("previous_response_id", &[Responses], ""),
    honoured("tokens", &[Detokenize], ""),
    refused(
        "suffix",
        &[Completions],
        &[Text("")],
        "the model continues text and cannot fill in the middle",
    ),
    refused(
        "prompt_embeds",
        CHOICES,
        NONE,
        "prompts are text or token ids",
    ),
    refused("image_data", TEXT, NONE, "this server takes text only"),
    refused("audio", &[Chat], NEVER, "this server returns text only"),
    refused(
        "modalities",
        &[Chat],
        &[List(&["text"])],
        "this server returns text only",
    ),
    refused(
        "mm_processor_kwargs",
        TEXT,
        &[EmptyObject],
        "this server takes text only",
    ),
    refused(
        "media_io_kwargs",
        &[Chat, Responses],
        &[EmptyObject],
        "this server takes text only",
    ),
    refused("messages", &[Responses, Embeddings], NEVER, "send input"),
    refused(
        "content",
        &[Embeddings, Tokenize],
        NEVER,
        "llama.cpp's name for input or prompt",
    ),
    refused(
        "conversation",
        &[Responses],
        NEVER,
        "send previous_response_id",
    ),
    refused("context_management", &[Responses], NONE, ""),
    refused(
        "previous_response",
        &[Responses],
        NEVER,
        "send previous_response_id",
    ),
    refused(
        "previous_input_messages",
        &[Responses],
        NONE,
        "send previous_response_id",
    ),
    // How the prompt is written.
    honoured(
        "add_special_tokens",
        &[Completions, Chat, Embeddings, Tokenize],
        "by default true for text and false for conversations, whose template writes them",
    ),
    honoured("add_generation_prompt", CONVERSATION, ""),
    honoured(
        "continue_final_message",
        CONVERSATION,
        "the answer continues the last message; not with add_generation_prompt: true",
    ),
    honoured(
        "chat_template",
        CONVERSATION,
        "only where the server was started with --trust-request-chat-template",
    ),
    honoured("chat_template_kwargs", &[Chat, Responses, Tokenize], ""),
    honoured(
        "documents",
        CONVERSATION,
        "400 if the model's chat template does not take documents",
    ),
    honoured(
        "reasoning_effort",
        &[Chat],
        "a variable of the chat template",
    ),
    honoured(
        "reasoning.effort",
        &[Responses],
        "a variable of the chat template",
    ),
    accepted(
        "reasoning.summary",
        &[Responses],
        "reasoning is returned in full, never summarised",
    ),
    accepted(
        "reasoning.generate_summary",
        &[Responses],
        "reasoning is returned in full, never summarised",
    ),
    honoured("include_reasoning", &[Chat], ""),
    honoured(
        "truncate_prompt_tokens",
        &[Completions, Chat, Responses, Embeddings],
        "-1 means as many as the context has room for; not with session_id",
    ),
    honoured(
        "truncation_side",
        &[Completions, Chat, Responses, Embeddings],
        "left keeps the end of the prompt, the default",
    ),
    honoured(
        "truncation",
        &[Responses],
        "auto leaves out messages at the beginning until the context has room",
    ),
    refused(
        "return_prompt_text",
        &[Chat],
        OFF,
        "/tokenize and /detokenize show the prompt",
    ),
    // How tokens are chosen.
    honoured("temperature", TEXT, ""),
    honoured("top_p", TEXT, "0 is greedy"),
    honoured("top_k", TEXT, ""),
    honoured("min_p", TEXT, ""),
    honoured("repetition_penalty", TEXT, ""),
    honoured("presence_penalty", TEXT, ""),
    honoured("frequency_penalty", TEXT, ""),
    honoured("logit_bias", TEXT, "an object from token id to bias"),
    honoured("seed", TEXT, ""),
    honoured("bad_words", TEXT, "not with a constrained answer"),
    honoured("allowed_token_ids", TEXT, "not with a constrained answer"),
    refused("logits_processors", TEXT, NONE, ""),
    refused(
        "use_beam_search",
        CHOICES,
        OFF,
        "best_of chooses the likeliest of several answers",
    ),
    refused(
        "length_penalty",
        CHOICES,
        &[Number(1.0)],
        "it belongs to beam search",
    ),
    refused("watermarking", CHOICES, OFF, ""),
    refused("repetition_detection", CHOICES, NEVER, ""),
    refused("thinking_token_budget", CHOICES, &[Number(-1.0)], ""),
    refused("thinking_budget_tokens", CHOICES, &[Number(-1.0)], ""),
    refused("vllm_xargs", TEXT, &[EmptyObject], ""),
    refused(
        "repeat_penalty",
        TEXT,
        &[Number(1.0)],
        "send repetition_penalty, which looks at the whole text",
    ),
    accepted("repeat_last_n", TEXT, "belongs to repeat_penalty"),
    refused("typical_p", TEXT, &[Number(1.0)], ""),
    refused("top_n_sigma", TEXT, &[Number(-1.0), Number(0.0)], ""),
    refused("xtc_probability", TEXT, &[Number(0.0)], ""),
    accepted("xtc_threshold", TEXT, "belongs to xtc_probability"),
    refused("dynatemp_range", TEXT, &[Number(0.0)], ""),
    accepted("dynatemp_exponent", TEXT, "belongs to dynatemp_range"),
    refused("mirostat", TEXT, &[Number(0.0)], ""),
    accepted("mirostat_tau", TEXT, "belongs to mirostat"),
    accepted("mirostat_eta", TEXT, "belongs to mirostat"),
    refused("dry_multiplier", TEXT, &[Number(0.0)], ""),
    accepted("dry_base", TEXT, "belongs to dry_multiplier"),
    accepted("dry_allowed_length", TEXT, "belongs to dry_multiplier"),
    accepted("dry_penalty_last_n", TEXT, "belongs to dry_multiplier"),
    accepted("dry_sequence_breakers", TEXT, "belongs to dry_multiplier"),
    refused("adaptive_target", TEXT, &[Number(-1.0)], ""),
    accepted("adaptive_decay", TEXT, "belongs to adaptive_target"),
    refused("min_keep", TEXT, &[Number(0.0)], ""),
    refused(
        "samplers",
        TEXT,
        NEVER,
        "the order is fixed: penalties, temperature, top_k, top_p, min_p",
    ),
    refused("lora", TEXT, NONE, "no adapters are served"),
    // When the answer ends.
    honoured("max_tokens", CHOICES, ""),
    honoured("max_completion_tokens", &[Chat], "wins over max_tokens"),
    honoured("max_output_tokens", &[Responses], ""),
    refused(
        "max_output_tokens",
        &[Chat],
        NEVER,
        "send max_completion_tokens",
    ),
    refused(
        "max_new_tokens",
        TEXT,
        NEVER,
        "send max_tokens, or max_output_tokens for responses",
    ),
    refused(
        "n_predict",
        TEXT,
        NEVER,
        "send max_tokens, or max_output_tokens for responses",
    ),
    refused("max_tokens", &[Responses], NEVER, "send max_output_tokens"),
    refused(
        "max_completion_tokens",
        &[Responses],
        NEVER,
        "send max_output_tokens",
    ),
    honoured(
        "min_tokens",
        TEXT,
        "end tokens and stop strings have no effect before; a complete form still ends the answer",
    ),
    honoured("stop", TEXT, ""),
    honoured("stop_token_ids", TEXT, ""),
    honoured("include_stop_str_in_output", TEXT, ""),
    honoured("ignore_eos", TEXT, ""),
    refused("stop_regex", TEXT, NEVER, ""),
    refused("t_max_predict_ms", TEXT, &[Number(0.0)], ""),
    refused("t_max_prompt_ms", TEXT, &[Number(0.0), Number(-1.0)], ""),
    refused(
        "n_keep",
        TEXT,
        &[Number(0.0)],
        "the context is never shifted",
    ),
    accepted("n_discard", TEXT, "belongs to n_keep"),
    refused("n_indent", TEXT, &[Number(0.0)], ""),
    accepted(
        "max_tool_calls",
        &[Responses],
        "it limits built-in tools, of which this server has none",
    ),
    // The form of the answer.
    honoured("response_format", CHOICES, ""),
    refused("response_format", &[Responses], NEVER, "send text.format"),
    honoured("text.format", &[Responses], ""),
    honoured(
        "text.verbosity",
        &[Responses],
        "a variable of the chat template",
    ),
    honoured("verbosity", &[Chat], "a variable of the chat template"),
    honoured("structured_outputs", CHOICES, ""),
    honoured("guided_json", CHOICES, ""),
    honoured("guided_regex", CHOICES, ""),
    honoured("guided_choice", CHOICES, ""),
    honoured("guided_grammar", CHOICES, ""),
    refused("structured_outputs.structural_tag", CHOICES, NEVER, ""),
    refused("structured_outputs.whitespace_pattern", CHOICES, NEVER, ""),
    refused(
        "structured_outputs.disable_any_whitespace",
        CHOICES,
        OFF,
        "",
    ),
    refused(
        "structured_outputs.disable_additional_properties",
        CHOICES,
        OFF,
        "",
    ),
    accepted(
        "structured_outputs.disable_fallback",
        CHOICES,
        "there is one implementation",
    ),
    accepted(
        "structured_outputs.backend",
        CHOICES,
        "there is one implementation",
    ),
    refused("guided_whitespace_pattern", CHOICES, NEVER, ""),
    accepted(
        "guided_decoding_backend",
        CHOICES,
        "there is one implementation",
    ),
    refused("structural_tag", CHOICES, NEVER, ""),
    refused(
        "structured_outputs",
        &[Responses],
        NEVER,
        "send text.format",
    ),
    refused("guided_json", &[Responses], NEVER, "send text.format"),
    refused("guided_regex", &[Responses], NEVER, "send text.format"),
    refused("guided_choice", &[Responses], NEVER, "send text.format"),
    refused("guided_grammar", &[Responses], NEVER, "send text.format"),
    refused(
        "grammar",
        TEXT,
        &[Text("")],
        "send structured_outputs.grammar, in Lark's notation",
    ),
    refused("grammar_lazy", TEXT, OFF, ""),
    refused("grammar_triggers", TEXT, NONE, ""),
    refused(
        "json_schema",
        TEXT,
        NEVER,
        "send response_format, or text.format for responses",
    ),
    refused("regex", TEXT, NEVER, "send structured_outputs.regex"),
    refused(
        "ebnf",
        TEXT,
        NEVER,
        "send structured_outputs.grammar, in Lark's notation",
    ),
    accepted(
        "prediction",
        &[Chat],
        "it affects only speed; the answer is the same",
    ),
    // Tools.
    honoured("tools", &[Chat, Responses, Tokenize], ""),
    honoured("tool_choice", &[Chat, Responses, Tokenize], ""),
    honoured("parallel_tool_calls", &[Chat, Responses, Tokenize], ""),
    honoured("functions", CONVERSATION, "the older name of tools"),
    honoured(
        "function_call",
        CONVERSATION,
        "the older name of tool_choice",
    ),
    refused(
        "web_search_options",
        &[Chat],
        NEVER,
        "there are no built-in tools",
    ),
    refused("parse_tool_calls", &[Chat], &[True], ""),
    refused(
        "reasoning_format",
        &[Chat],
        &[Text("auto"), Text("deepseek")],
        "reasoning is returned as reasoning_content and reasoning",
    ),
    refused("thinking_forced_open", &[Chat], OFF, ""),
    refused(
        "separate_reasoning",
        &[Chat],
        &[True],
        "reasoning is returned as reasoning_content and reasoning",
    ),
    refused(
        "tools",
        &[Completions],
        NONE,
        "send messages to /v1/chat/completions",
    ),
    refused(
        "messages",
        &[Completions],
        NEVER,
        "send messages to /v1/chat/completions",
    ),
    // How many answers there are, and what is reported about them.
    honoured("n", CHOICES, ""),
    refused(
        "n",
        &[Responses],
        &[Number(1.0)],
        "a response has exactly one answer",
    ),
    refused("n_cmpl", TEXT, &[Number(1.0)], "send n"),
    honoured(
        "best_of",
        &[Completions],
        "the likeliest n answers by the mean of their tokens' log-probabilities; not in a stream",
    ),
    refused(
        "best_of",
        &[Chat, Responses],
        &[Number(1.0)],
        "only /v1/completions supports it",
    ),
    honoured("echo", &[Completions], ""),
    refused("echo", &[Chat], OFF, ""),
    honoured("logprobs", CHOICES, ""),
    honoured(
        "top_logprobs",
        &[Chat, Responses],
        "for responses, together with include",
    ),
    refused(
        "top_logprobs",
        &[Completions],
        &[Number(0.0)],
        "send logprobs",
    ),
    refused(
        "logprobs",
        &[Responses],
        &[False],
        "send include: [\"message.output_text.logprobs\"]",
    ),
    refused("logprob_token_ids", CHOICES, NONE, ""),
    honoured(
        "include",
        &[Responses],
        "message.output_text.logprobs; the other values concern data that answers here never have",
    ),
    honoured("prompt_logprobs", CHOICES, "not in a stream"),
    refused(
        "prompt_logprobs",
        &[Responses],
        NEVER,
        "completions and chat completions support it",
    ),
    honoured("return_tokens_as_token_ids", CHOICES, ""),
    refused("return_token_ids", CHOICES, OFF, ""),
    refused("return_token_offsets", CHOICES, OFF, ""),
    refused("return_tokens", TEXT, OFF, ""),
    refused("return_progress", TEXT, OFF, ""),
    refused("return_mm_kwargs", CHOICES, &[True, False], ""),
    refused("routed_experts_prompt_start", CHOICES, &[Number(0.0)], ""),
    refused("n_probs", TEXT, &[Number(0.0)], "send logprobs"),
    refused("post_sampling_probs", TEXT, OFF, ""),
    refused("response_fields", TEXT, NONE, ""),
    refused("timings_per_token", TEXT, OFF, "/metrics has the times"),
    refused("enable_response_messages", &[Responses], OFF, ""),
    honoured("skip_special_tokens", TEXT, ""),
    accepted(
        "spaces_between_special_tokens",
        TEXT,
        "no tokenizer here writes such spaces",
    ),
    // Streams.
    honoured("stream", TEXT, ""),
    honoured(
        "stream_options.include_usage",
        TEXT,
        "only with stream; a streamed response always ends with its usage",
    ),
    honoured(
        "stream_options.continuous_usage_stats",
        CHOICES,
        "with include_usage",
    ),
    refused(
        "stream_options.include_obfuscation",
        TEXT,
        OFF,
        "events are not padded",
    ),
    refused(
        "stream_options.continuous_usage_stats",
        &[Responses],
        OFF,
        "",
    ),
    refused(
        "stream_interval",
        CHOICES,
        &[Number(1.0)],
        "every token is sent as soon as it is generated",
    ),
    refused("sse_ping_interval", TEXT, NEVER, ""),
    refused("background", &[Responses], OFF, ""),
    honoured("store", &[Responses], ""),
    accepted("store", &[Chat], "chat completions are not stored"),
    // Who sends the request.
    honoured(
        "user",
        &[Completions, Chat, Responses, Embeddings, Rerank, Score],
        "the user to whom fair scheduling attributes the request",
    ),
    honoured(
        "priority",
        &[Completions, Chat, Responses, Embeddings, Rerank, Score],
        "no more urgent than --max-priority",
    ),
    honoured("request_id", CHOICES, "part of the answer's id"),
    refused(
        "request_id",
        &[Responses],
        NEVER,
        "responses have ids of their own",
    ),
    accepted("request_id", &[Embeddings], "embeddings have no id"),
    accepted("request_id", SCORES, "the server chooses the id"),
    honoured(
        "session_id",
        CHOICES,
        "a session of /v1/sessions; in vLLM, a hint to its router",
    ),
    refused(
        "session_id",
        &[Responses],
        NEVER,
        "send previous_response_id",
    ),
    accepted("safety_identifier", &[Chat, Responses], ""),
    accepted(
        "prompt_cache_key",
        &[Chat, Responses],
        "cached prefixes are found by their tokens, so no key is needed",
    ),
    accepted(
        "prompt_cache_retention",
        &[Chat, Responses],
        "prefixes are kept while there is room",
    ),
    accepted(
        "prompt_cache_options",
        &[Chat, Responses],
        "prefixes are kept while there is room",
    ),
    accepted(
        "cache_prompt",
        TEXT,
        "a cached prefix gives the same tokens",
    ),
    honoured(
        "cache_salt",
        &[Completions, Chat, Responses, Embeddings, Rerank, Score],
        "only requests with the same salt share cached prefixes",
    ),
    accepted("id_slot", TEXT, "there are no slots"),
    accepted("service_tier", &[Chat, Responses], "there is one tier"),
    accepted("metadata", &[Chat], "chat completions are not stored"),
    honoured("metadata", &[Responses], "returned with the response"),
    refused("moderation", &[Chat, Responses], NEVER, ""),
    refused("kv_transfer_params", TEXT, &[EmptyObject], ""),
    refused("ec_transfer_params", TEXT, &[EmptyObject], ""),
    // Embeddings, scores and tokens.
    honoured("dimensions", &[Embeddings], ""),
    honoured(
        "prompt_name",
        &[Embeddings],
        "a text of the model's own that is put before texts, such as query",
    ),
    honoured("query", &[Rerank], ""),
    honoured("documents", &[Rerank], "texts, or objects with a text"),
    honoured("top_n", &[Rerank], ""),
    honoured("return_documents", &[Rerank], "true by default"),
    honoured("text_1", &[Score], "one text, or as many as text_2 has"),
    honoured("text_2", &[Score], ""),
    honoured(
        "max_tokens_per_doc",
        SCORES,
        "the rest of a document is left out",
    ),
    honoured(
        "instruction",
        SCORES,
        "what makes a document relevant; only with models that answer yes or no",
    ),
    refused("rank_fields", &[Rerank], NONE, "documents have one text"),
    refused(
        "truncate_prompt_tokens",
        SCORES,
        NEVER,
        "send max_tokens_per_doc",
    ),
    refused(
        "max_chunks_per_doc",
        &[Rerank],
        NEVER,
        "send max_tokens_per_doc",
    ),
    refused(
        "use_activation",
        SCORES,
        NEVER,
        "scores have the activation that the model's files name",
    ),
    refused("activation", SCORES, NEVER, "send nothing"),
    honoured("encoding_format", &[Embeddings], ""),
    refused("normalize", &[Embeddings], &[True], "vectors have length 1"),
    refused(
        "use_activation",
        &[Embeddings],
        &[True],
        "vectors have length 1",
    ),
    refused(
        "embd_normalize",
        &[Embeddings],
        &[Number(2.0)],
        "vectors have length 1",
    ),
    refused(
        "embed_dtype",
        &[Embeddings],
        &[Text("float32")],
        "vectors are float32",
    ),
    refused(
        "endianness",
        &[Embeddings],
        &[Text("native"), Text("little")],
        "vectors are little-endian",
    ),
    refused("additional_data", &[Embeddings], NEVER, ""),
    honoured("return_token_strs", &[Tokenize], ""),
    refused("with_pieces", &[Tokenize], OFF, "send return_token_strs"),
    refused("add_special", &[Tokenize], NEVER, "send add_special_tokens"),
    refused(
        "parse_special",
        &[Tokenize],
        &[True],
        "names of special tokens in the text are always parsed",
    ),
    refused(
        "mm_processor_kwargs",
        &[Embeddings, Rerank, Score, Tokenize],
        &[EmptyObject],
        "this server takes text only",
    ),
    refused(
        "media_io_kwargs",
        &[Embeddings, Rerank, Score, Tokenize],
        &[EmptyObject],
        "this server takes text only",
    ),
];
