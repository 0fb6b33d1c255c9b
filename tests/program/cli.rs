//! The command line program: its output for scripts, and its error messages.

use common::gguf_writer::GgufWriter;
use common::model::smollm2;
use quell::internals::weights::gguf::{Array, Value as Metadata};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(common::program::path());
    // Hide any GPU: these tests are about the program, not about the device.
    command.args(args).env("CUDA_VISIBLE_DEVICES", "");
    command
}

fn quell(args: &[&str]) -> Output {
    command(args).env("QUELL_LOG", "warn").output().unwrap()
}

fn tiny(name: &str) -> String {
    let root = common::root();
    root.join("tests/fixtures/golden/tiny")
        .join(name)
        .to_str()
        .unwrap()
        .to_owned()
}

fn smollm2_text() -> String {
    smollm2().to_str().unwrap().to_owned()
}

fn json(output: &Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Checks that the exit code is `code`, that stdout is empty, and that stderr is one line that
/// contains each of `parts`.
fn assert_refused(args: &[&str], code: i32, parts: &[&str]) {
    let output = quell(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(message.trim_end().lines().count(), 1, "{args:?}: {message}");
    for part in parts {
        assert!(
            message.contains(part),
            "{args:?}: '{part}' is not in: {message}"
        );
    }
}

#[test]
fn without_a_gpu_auto_uses_the_cpu_and_logs_it() {
    let model = tiny("llama");
    let generate = [
        "generate",
        "--model",
        &model,
        "--prompt-ids",
        "1",
        "--max-tokens",
        "1",
    ];
    let said = |device: &str| {
        let mut command = command(&generate);
        command.args(["--device", device]).env_remove("QUELL_LOG");
        let output = command.output().unwrap();
        assert!(output.status.success(), "--device {device}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said("auto").contains("running on the CPU: "));
    assert_eq!(said("cpu"), "");
}

#[test]
fn generate_prints_everything_a_script_needs_as_json() {
    let model = smollm2_text();
    let output = quell(&[
        "generate",
        "--model",
        &model,
        "--prompt",
        "The quick brown fox",
        "--temperature",
        "0",
        "--max-tokens",
        "6",
        "--logprobs",
        "3",
        "--format",
        "json",
    ]);
    let result = json(&output);
    assert_eq!(
        result["prompt_ids"],
        serde_json::json!([504, 2365, 6354, 16438])
    );
    assert_eq!(result["token_ids"].as_array().unwrap().len(), 6);
    assert!(!result["text"].as_str().unwrap().is_empty());
    assert_eq!(result["finish_reason"], "length");
    let step = &result["logprobs"][0];
    assert_eq!(step["token"], result["token_ids"][0]);
    assert_eq!(step["top"].as_array().unwrap().len(), 3);
    assert_eq!(step["top"][0][0], step["token"]);
    assert_eq!(step["top"][0][1], step["logprob"]);
    assert!(result["timing"]["total_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn chat_text_and_messages_render_the_same_prompt_and_stop_strings_cut_the_text() {
    let model = smollm2_text();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("messages.json");
    std::fs::write(&file, r#"[{"role": "user", "content": "Count to ten."}]"#).unwrap();
    let common = ["--max-tokens", "24", "--format", "json", "--stop", "3"];
    let run = |input: &[&str]| {
        json(&quell(
            &[&["generate", "--model", &model], input, &common].concat(),
        ))
    };
    let chat = run(&["--prompt", "Count to ten.", "--chat"]);
    let messages = run(&["--messages", file.to_str().unwrap()]);
    assert_eq!(chat["prompt_ids"], messages["prompt_ids"]);
    assert_eq!(chat["text"], messages["text"]);
    assert!(
        chat["prompt_ids"].as_array().unwrap().len() > 20,
        "the template was applied"
    );
    assert!(!chat["text"].as_str().unwrap().contains('3'));
    assert!(chat["logprobs"].is_null());
}

#[test]
fn a_folder_without_a_tokenizer_runs_on_token_ids_and_prints_no_text() {
    let output = quell(&[
        "generate",
        "--model",
        &tiny("llama"),
        "--prompt-ids",
        "1,2,3",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--format",
        "json",
    ]);
    let result = json(&output);
    assert_eq!(result["token_ids"].as_array().unwrap().len(), 4);
    assert!(result["text"].is_null());
    assert_refused(
        &["generate", "--model", &tiny("llama"), "--prompt", "hello"],
        1,
        &["no tokenizer"],
    );
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let run = |seed: &str| {
        let output = quell(&[
            "generate",
            "--model",
            &tiny("qwen3"),
            "--prompt-ids",
            "5,6",
            "--max-tokens",
            "12",
            "--temperature",
            "1",
            "--seed",
            seed,
            "--ignore-eos",
            "--format",
            "json",
        ]);
        json(&output)["token_ids"].clone()
    };
    assert_eq!(run("7"), run("7"));
    assert_ne!(run("7"), run("8"));
}

#[test]
fn tokenize_and_inspect_print_text_and_json() {
    let model = smollm2_text();
    let tokens = json(&quell(&[
        "tokenize",
        "--model",
        &model,
        "--text",
        "Hello <|im_end|>",
        "--format",
        "json",
    ]));
    assert_eq!(tokens["ids"], serde_json::json!([19556, 216, 2]));
    assert_eq!(tokens["text"], "Hello <|im_end|>");
    let inspect = json(&quell(&[
        "inspect",
        &model,
        "--format",
        "json",
        "--kv-cache-mib",
        "16",
    ]));
    assert_eq!(inspect["architecture"], "llama");
    assert_eq!(inspect["quantisation"], "Q4_1");
    assert_eq!(inspect["parameters"], 134_515_008);
    assert_eq!(inspect["memory"]["kv_bytes_per_token"], 23_040);
    assert_eq!(inspect["memory"]["kv_blocks"], 45);
    let groups = &inspect["memory"]["kv_groups"];
    assert_eq!(groups.as_array().map(Vec::len), Some(1));
    assert_eq!(groups[0]["keeps"], "all tokens");
    let text = quell(&["inspect", &model]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("KV per token  23040 bytes"));
}

#[test]
fn inspect_shows_which_layers_keep_which_tokens() {
    let model = tiny("gemma3");
    let inspect = json(&quell(&["inspect", &model, "--format", "json"]));
    let memory = &inspect["memory"];
    let groups = memory["kv_groups"].as_array().unwrap();
    assert_eq!(groups.len(), 6);
    let bytes = |name: &str| memory[name].as_u64().unwrap();
    let of_layer = bytes("kv_bytes_per_token") / 6;
    let full = serde_json::json!({
        "keeps": "all tokens", "window": null, "layers": [5],
        "bytes_per_token": of_layer, "bytes_per_sequence": 512 * of_layer,
    });
    assert_eq!(groups[0], full);
    let mut of_sequence = 512 * of_layer;
    for (layer, group) in groups[1..].iter().enumerate() {
        let held = group["bytes_per_sequence"].as_u64().unwrap();
        assert!(held < 512 * of_layer, "{group}");
        let own = serde_json::json!({
            "keeps": "window", "window": 24, "layers": [layer],
            "bytes_per_token": of_layer, "bytes_per_sequence": held,
        });
        assert_eq!(*group, own);
        of_sequence += held;
    }
    assert_eq!(bytes("kv_bytes_per_sequence"), of_sequence);
    assert_eq!(bytes("context_tokens"), 512);
    let whole = bytes("kv_bytes_per_sequence_without_windows");
    assert_eq!(whole, 512 * bytes("kv_bytes_per_token"));
    let held = bytes("kv_bytes_per_sequence");
    assert!(10 * held < 6 * whole, "{held} of {whole}");
    let text = quell(&["inspect", &model]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(
        text.contains("5 layers keep the last 24 tokens, in 5 groups"),
        "{text}"
    );
    assert!(text.contains("for 512 tokens, "), "{text}");
    let own = format!("1 layer keeps all tokens: {of_layer} bytes per token, ");
    assert!(text.contains(&own), "{text}");
}

#[test]
fn inspect_shows_the_state_of_a_sequence_beside_its_blocks() {
    let model = tiny("qwen3.5");
    let inspect = json(&quell(&["inspect", &model, "--format", "json"]));
    let memory = &inspect["memory"];
    let bytes = |name: &str| memory[name].as_u64().unwrap();
    let group = &memory["kv_groups"][0];
    let of_group = group["bytes_per_sequence"].as_u64().unwrap();
    let state = bytes("state_slot_bytes");
    assert!(state > 0, "{memory}");
    assert_eq!(bytes("kv_bytes_per_sequence"), of_group + state);
    let text = quell(&["inspect", &model]);
    let text = String::from_utf8_lossy(&text.stdout);
    let layers = bytes("state_layers");
    let expected = format!("{layers} layers keep a state: ");
    assert!(text.contains(&expected), "{text}");
}

#[test]
fn bench_measures_the_requested_workloads() {
    let output = quell(&[
        "bench",
        "--model",
        &tiny("llama"),
        "--prompt",
        "32",
        "--generate",
        "4",
        "--concurrency",
        "1,3",
        "--mixed",
        "--repetitions",
        "2",
        "--format",
        "json",
    ]);
    let result = json(&output);
    let streams: Vec<u64> = result["figures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|figure| {
            assert!(figure["tokens_per_s"].as_f64().unwrap() > 0.0);
            figure["streams"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(streams, [1, 1, 3, 1, 3]);
    assert_eq!(result["figures"][4]["name"], "mixed 32+4 × 3");
    assert!(result["machine"].as_str().unwrap().contains("threads"));
    assert!(result["load_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_runs_on_random_weights_of_a_models_size() {
    let config = format!("{}/config.json", tiny("llama"));
    let report = json(&quell(&[
        "bench",
        "--random-weights",
        &config,
        "--weights-format",
        "q8_0",
        "--device",
        "cpu",
        "--prompt",
        "8",
        "--generate",
        "4",
        "--concurrency",
        "2",
        "--repetitions",
        "1",
        "--format",
        "json",
    ]));
    assert_eq!(report["model"], config.as_str());
    assert_eq!(report["random_weights"], true);
    assert_eq!(report["weights_format"], "Q8_0");
    assert_eq!(report["figures"].as_array().unwrap().len(), 2);
    assert!(report["figures"][1]["tokens_per_s"].as_f64().unwrap() > 0.0);

    // The prompts of both streams together do not fit in one step.
    let report = json(&quell(&[
        "bench",
        "--random-weights",
        &config,
        "--device",
        "cpu",
        "--prompt",
        "0",
        "--generate",
        "200",
        "--decode-prompt",
        "16",
        "--concurrency",
        "2",
        "--repetitions",
        "1",
        "--max-batch-tokens",
        "16",
        "--format",
        "json",
    ]));
    assert!(report["figures"][0]["tokens_per_s"].as_f64().unwrap() > 0.0);

    // Prefill alone.
    let mut prefill = vec!["bench", "--random-weights", &config, "--device", "cpu"];
    prefill.extend(["--prompt", "8", "--generate", "0", "--concurrency", "1"]);
    prefill.extend(["--repetitions", "1", "--format", "json"]);
    let report = json(&quell(&prefill));
    assert_eq!(report["figures"].as_array().unwrap().len(), 1, "{report}");

    assert_refused(&["bench"], 2, &["--model"]);
    let both = ["bench", "--model", &config, "--random-weights", &config];
    assert_refused(&both, 2, &["--random-weights"]);
    let missing = ["bench", "--random-weights", "llama-9-1b"];
    assert_refused(&missing, 1, &["llama-9-1b"]);
    let weights = format!("{}/model.safetensors", tiny("llama"));
    assert_refused(&["bench", "--random-weights", &weights], 1, &[&weights]);
}

/// A small layer with the settings of Qwen3-30B-A3B, at as many streams as a GPU serves.
#[test]
fn bench_runs_the_built_in_mixture() {
    let path = common::root().join("src/cli/bench/qwen3-30b-a3b.json");
    let text = std::fs::read_to_string(path).unwrap();
    let mut settings: Value = serde_json::from_str(&text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    let name = config.to_str().unwrap();
    // Blocks of Q4_K have 256 weights.
    for (weights, streams, width) in [("q4_k", "1", 256), ("bf16", "1,16,64,256", 64)] {
        for (key, value) in [
            ("num_hidden_layers", 1),
            ("num_experts", 16),
            ("num_attention_heads", 2),
            ("num_key_value_heads", 1),
            ("head_dim", width / 2),
            ("hidden_size", width),
            ("moe_intermediate_size", width),
            ("vocab_size", 512),
        ] {
            settings[key] = value.into();
        }
        std::fs::write(&config, settings.to_string()).unwrap();
        let mut command = vec!["bench", "--random-weights", name, "--device", "cpu"];
        command.extend(["--weights-format", weights, "--concurrency", streams]);
        command.extend(["--prompt", "0", "--decode-prompt", "1", "--generate", "2"]);
        command.extend([
            "--repetitions",
            "1",
            "--context",
            "16",
            "--kv-cache-mib",
            "64",
        ]);
        command.extend(["--format", "json"]);
        let report = json(&quell(&command));
        let figures = report["figures"].as_array().unwrap();
        assert_eq!(figures.len(), streams.split(',').count(), "{report}");
        for figure in figures {
            assert!(figure["tokens_per_s"].as_f64().unwrap() > 0.0, "{figure}");
        }
    }
}

#[test]
fn inspect_requires_a_path_unless_a_gpu_is_named() {
    assert_refused(&["inspect"], 2, &["PATH", "--device cuda"]);
    assert_refused(&["inspect", "--device", "cpu"], 2, &["PATH"]);
    // No machine has this many GPUs.
    let missing = ["inspect", "--device", "cuda:4096"];
    assert_refused(&missing, 1, &["cuda:4096"]);
}

#[test]
fn invalid_command_lines_exit_with_one_line_and_code_2() {
    let model = tiny("llama");
    let generate = ["generate", "--model", &model, "--prompt-ids", "1"];
    let with = |flags: &[&'static str]| [&generate[..], flags].concat();
    assert_refused(&["generate", "--model", &model], 2, &["--prompt"]);
    assert_refused(&["generate", "--prompt", "x"], 2, &["--model"]);
    assert_refused(&["nonsense"], 2, &["nonsense"]);
    assert_refused(&with(&["--nonsense"]), 2, &["--nonsense"]);
    assert_refused(&with(&["--prompt", "x"]), 2, &["--prompt"]);
    assert_refused(&with(&["--chat"]), 2, &["--chat"]);
    assert_refused(&with(&["--temperature", "nan"]), 2, &["temperature is NaN"]);
    assert_refused(&with(&["--temperature", "-1"]), 2, &["temperature is -1"]);
    assert_refused(&with(&["--top-p", "0"]), 2, &["top_p is 0"]);
    assert_refused(&with(&["--max-tokens", "0"]), 2, &["--max-tokens is 0"]);
    assert_refused(&with(&["--max-tokens", "-3"]), 2, &["-3"]);
    assert_refused(&with(&["--threads", "0"]), 2, &["--threads is 0"]);
    assert_refused(&with(&["--kv-cache-mib", "0"]), 2, &["--kv-cache-mib is 0"]);
    assert_refused(&with(&["--device", "tpu"]), 2, &["tpu", "cuda:N"]);
    assert_refused(&with(&["--logit-bias", "x"]), 2, &["42=-1.5"]);
    assert_refused(&with(&["--logprobs", "5000"]), 2, &["logprobs is 5000"]);
    assert_refused(&with(&["--stop", ""]), 2, &["--stop must not be empty"]);
    assert_refused(
        &["generate", "--model", &model, "--prompt-ids", "1,x"],
        2,
        &["x"],
    );
    assert_refused(
        &["bench", "--model", &model, "--concurrency", "0"],
        2,
        &["--concurrency"],
    );
    for cores in ["", "x", "3-1", "0,,1", "0-99999999999"] {
        assert_refused(&with(&["--cores", cores]), 2, &["--cores", "0-7,16"]);
    }
}

#[test]
fn what_cannot_run_exits_with_one_line_and_code_1() {
    let model = tiny("llama");
    let generate = |model: &str, rest: &[&str]| {
        let args: Vec<String> = ["generate", "--model", model]
            .iter()
            .chain(rest)
            .map(|arg| (*arg).to_owned())
            .collect();
        args
    };
    let refused = |args: Vec<String>, parts: &[&str]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        assert_refused(&args, 1, parts);
    };
    refused(
        generate("no/such/file.gguf", &["--prompt", "x"]),
        &["no/such/file.gguf"],
    );
    refused(
        generate(&model, &["--prompt-ids", "1", "--device", "cuda"]),
        &["cuda:0"],
    );
    refused(
        generate(&model, &["--prompt-ids", "512"]),
        &["token 512", "vocabulary of 512"],
    );
    refused(
        generate(&model, &["--messages", "no/such.json"]),
        &["no/such.json"],
    );
    let long: Vec<String> = (0..600).map(|id| (id % 500).to_string()).collect();
    refused(
        generate(&model, &["--prompt-ids", &long.join(",")]),
        &["600 tokens", "512"],
    );
    refused(
        generate(&smollm2_text(), &["--prompt", ""]),
        &["the prompt is empty"],
    );

    let folder = tempfile::tempdir().unwrap();
    let broken = |name: &str, text: &str| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let messages = broken("messages.json", r#"{"role": "user"}"#);
    refused(
        generate(&model, &["--messages", messages.to_str().unwrap()]),
        &["messages.json"],
    );
    let gguf = broken("broken.gguf", "GGUFnonsense");
    refused(
        generate(gguf.to_str().unwrap(), &["--prompt", "x"]),
        &["broken.gguf"],
    );
    broken("config.json", r#"{"model_type": "t5"}"#);
    refused(
        generate(folder.path().to_str().unwrap(), &["--prompt-ids", "1"]),
        &[folder.path().to_str().unwrap()],
    );
}

#[test]
fn a_broken_tokenizer_or_template_is_refused_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(
            Path::new(&tiny("llama")).join(name),
            folder.path().join(name),
        )
        .unwrap();
    }
    let text = common::root().join("tests/fixtures/text/folder");
    for entry in std::fs::read_dir(text).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let refused = |parts: &[&str]| {
        assert_refused(&["generate", "--model", path, "--prompt", "x"], 1, parts);
    };
    let template = folder.path().join("chat_template.jinja");
    std::fs::write(&template, "{% for message in messages %}").unwrap();
    refused(&["template"]);
    std::fs::remove_file(template).unwrap();
    for broken in ["", "{}", "{\"model\": 5}"] {
        std::fs::write(folder.path().join("tokenizer.json"), broken).unwrap();
        refused(&["tokenizer.json"]);
    }
}

#[test]
fn tokenize_needs_only_the_tokenizer_and_renders_conversations() {
    let folder = common::root().join("tests/fixtures/text/folder");
    let model = folder.to_str().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let write = |name: &str, contents: &[u8]| {
        let path = scratch.path().join(name);
        std::fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let list = write("list.json", br#"[{"role": "user", "content": "hi"}]"#);
    let request = write(
        "request.json",
        br#"{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "yes, "}],
            "continue_final_message": true}"#,
    );
    let tokenize = |input: &[&str]| {
        let args = [
            &["tokenize", "--model", model],
            input,
            &["--format", "json"],
        ]
        .concat();
        json(&quell(&args))
    };
    let rendered = tokenize(&["--messages", &list]);
    let text = rendered["text"].as_str().unwrap();
    assert!(text.ends_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"));
    assert_eq!(rendered["ids"], tokenize(&["--text", text])["ids"]);
    let open = tokenize(&["--messages", &request]);
    assert_eq!(
        open["text"],
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\nyes, "
    );
    let shown = quell(&["tokenize", "--model", model, "--messages", &list]);
    assert!(String::from_utf8_lossy(&shown.stdout).starts_with(&format!("{text}\n\n")));

    let strings = |list: &[&str]| {
        Metadata::Array(Array::String(
            list.iter().map(|&text| text.into()).collect(),
        ))
    };
    let vocabulary = |kind: &str| {
        let file = GgufWriter::new()
            .string("general.architecture", "qwen2")
            .string("tokenizer.ggml.model", kind)
            .metadata("tokenizer.ggml.tokens", strings(&["a", "b", "ab"]))
            .metadata("tokenizer.ggml.merges", strings(&["a b"]));
        write(&format!("{kind}.gguf"), &file.build())
    };
    let only = [
        "tokenize",
        "--model",
        &vocabulary("gpt2"),
        "--text",
        "aab",
        "--format",
        "json",
    ];
    assert_eq!(json(&quell(&only))["ids"], serde_json::json!([0, 2]));
    let none = [
        "tokenize",
        "--model",
        &vocabulary("no_vocab"),
        "--text",
        "a",
    ];
    assert_refused(&none, 1, &["no_vocab.gguf", "no tokenizer"]);

    let both = [
        "tokenize",
        "--model",
        model,
        "--text",
        "a",
        "--messages",
        &list,
    ];
    assert_refused(&both, 2, &["--messages"]);
    assert_refused(&["tokenize", "--model", model], 2, &["--text"]);
    let missing = ["tokenize", "--model", model, "--messages", "no-such-file"];
    assert_refused(&missing, 1, &["no-such-file"]);
}

#[test]
fn unusable_files_in_a_model_folder_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let write = |name: &str, contents: &[u8]| {
        std::fs::write(folder.path().join(name), contents).unwrap();
    };
    let copy = |name: &str| {
        let from = Path::new(&tiny("llama")).join(name);
        std::fs::copy(from, folder.path().join(name)).unwrap();
    };
    copy("config.json");
    copy("model.safetensors");
    let generate = ["generate", "--model", path, "--prompt", "x"];
    let tokenize = ["tokenize", "--model", path, "--text", "x"];
    write("spiece.model", b"");
    for args in [&generate, &tokenize] {
        assert_refused(args, 1, &["spiece.model", "tokenizer.json"]);
    }
    write("tokenizer.model", b"\n\x0e\n\x05<unk>");
    for args in [&generate, &tokenize] {
        assert_refused(args, 1, &["tokenizer.model", "SentencePiece"]);
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    write("tokenizer.json", pointer);
    for args in [&generate, &tokenize] {
        assert_refused(args, 1, &["tokenizer.json", "Git LFS", "git lfs pull"]);
    }
    write("model.safetensors", pointer);
    assert_refused(&generate, 1, &["model.safetensors", "Git LFS"]);

    // A model of another kind, whose tokenizer is also of another kind.
    copy("model.safetensors");
    write(
        "config.json",
        br#"{"model_type": "t5", "architectures": ["T5Model"]}"#,
    );
    write("tokenizer.json", br#"{"version": "1.0", "added_tokens": [], "decoder": {"type": "WordPiece",
        "prefix": "\u0023\u0023", "cleanup": true}, "model": {"type": "WordPiece", "unk_token": "a",
        "continuing_subword_prefix": "\u0023\u0023", "max_input_chars_per_word": 9, "vocab": {"a": 0}}}"#);
    assert_refused(&generate, 1, &["architecture 't5' is not supported"]);
}

#[test]
fn a_folder_whose_settings_contradict_its_tensors_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        std::fs::copy(
            Path::new(&tiny("llama")).join(name),
            folder.path().join(name),
        )
        .unwrap()
    };
    copy("model.safetensors");
    let text = std::fs::read_to_string(Path::new(&tiny("llama")).join("config.json")).unwrap();
    let refused = |from: &str, to: &str, parts: &[&str]| {
        assert!(text.contains(from));
        std::fs::write(folder.path().join("config.json"), text.replace(from, to)).unwrap();
        let path = folder.path().to_str().unwrap();
        assert_refused(
            &["generate", "--model", path, "--prompt-ids", "1"],
            1,
            parts,
        );
    };
    refused("\"llama\"", "\"t5\"", &["'t5'", "qwen3"]);
    refused(
        "\"hidden_size\": 64",
        "\"hidden_size\": 96",
        &["has shape", "96"],
    );
    refused(
        "\"num_hidden_layers\": 2",
        "\"num_hidden_layers\": 3",
        &["model.layers.2", "missing"],
    );
    // A missing setting gets the default of transformers' configuration class.
    refused("\"hidden_size\": 64,", "", &["has shape", "4096"]);
    refused(
        "\"hidden_size\": 64",
        "\"hidden_size\": null",
        &["hidden_size is null"],
    );
    refused(
        "\"vocab_size\": 512",
        "\"vocab_size\": -1",
        &["vocab_size is -1"],
    );
    refused(
        "\"num_attention_heads\": 4",
        "\"num_attention_heads\": 0",
        &["num_attention_heads is 0"],
    );
    refused(
        "\"rope_type\": \"llama3\"",
        "\"rope_type\": \"spiral\"",
        &["spiral"],
    );
    refused(
        "\"hidden_act\": \"silu\"",
        "\"hidden_act\": \"relu\"",
        &["relu", "silu"],
    );
}

#[test]
fn generate_constrains_its_answer_to_a_json_schema() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let schema = write(
        "schema.json",
        r#"{"type": "object", "properties": {"sunny": {"type": "boolean"}},
            "required": ["sunny"], "additionalProperties": false}"#,
    );
    let model = smollm2_text();
    let prompt = "How is the weather?";
    let args = ["generate", "--model", &model, "--prompt", prompt, "--chat"];
    fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
        [args, more].concat()
    }
    let answer = quell(&with(&args, &["--json-schema", &schema]));
    assert!(json(&answer)["sunny"].is_boolean());
    let beginning = quell(&with(&args, &["--json-object", "--max-tokens", "5"]));
    assert!(beginning.status.success() && beginning.stdout.starts_with(b"{"));

    let broken = write("broken.json", "{");
    assert_refused(
        &with(&args, &["--json-schema", &broken]),
        1,
        &["broken.json", "not valid JSON"],
    );
    let wrong = write("wrong.json", r#"{"type": "strnig"}"#);
    assert_refused(
        &with(&args, &["--json-schema", &wrong]),
        1,
        &["JSON schema", "strnig"],
    );
    let tiny = tiny("llama");
    let ids = [
        "generate",
        "--model",
        &tiny,
        "--prompt-ids",
        "1",
        "--json-object",
    ];
    assert_refused(&ids, 1, &["no tokenizer files", "JSON schema"]);
}

/// Copies a tiny model and adds a `generation_config.json`.
fn with_generation_config(config: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(&tiny("llama")).join(name), copy.path().join(name)).unwrap();
    }
    std::fs::write(copy.path().join("generation_config.json"), config).unwrap();
    copy
}

#[test]
fn the_models_sampling_defaults_apply_unless_a_flag_overrides_them() {
    let model = with_generation_config(r#"{"do_sample": true, "temperature": 0.7, "top_k": 1}"#);
    let model = model.path().to_str().unwrap();
    let ids = |flags: &[&str]| {
        let generate = ["generate", "--model", model, "--prompt-ids", "126,36,304"];
        let format = ["--max-tokens", "24", "--ignore-eos", "--format", "json"];
        json(&quell(&[&generate, &format[..], flags].concat()))["token_ids"].clone()
    };
    let greedy = ids(&[]);
    let hot = ["--temperature", "8"];
    assert_eq!(ids(&hot), greedy, "top_k 1 is the model's");
    assert_ne!(ids(&[&hot[..], &["--top-k", "0"]].concat()), greedy);
    let none = ["--generation-config", "none"];
    assert_ne!(ids(&[&hot[..], &none].concat()), greedy);
    assert_eq!(ids(&none), greedy);

    let shown = |flags: &[&str]| {
        let inspect = ["inspect", model, "--format", "json"];
        json(&quell(&[&inspect[..], flags].concat()))["sampling_defaults"].clone()
    };
    assert_eq!(
        shown(&[]),
        serde_json::json!({"temperature": 0.7, "top_k": 1.0})
    );
    assert_eq!(shown(&none), serde_json::json!({}));
    let text = quell(&["inspect", model]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("temperature 0.7, top-k 1"), "{text}");
}

#[test]
fn the_models_limit_on_new_tokens_is_shown_and_its_total_length_ignored_by_name() {
    let inspect = |config: &str| {
        let model = with_generation_config(config);
        let output = quell(&[
            "inspect",
            model.path().to_str().unwrap(),
            "--format",
            "json",
        ]);
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (json(&output)["sampling_defaults"].clone(), log)
    };
    let ignored = "ignored an unsupported setting";
    let (shown, log) = inspect(r#"{"max_new_tokens": 512, "max_length": 4096}"#);
    assert_eq!(shown, serde_json::json!({"max_tokens": 512.0}));
    assert!(!log.contains(ignored), "{log}");
    let (shown, log) = inspect(r#"{"do_sample": false, "max_new_tokens": 7}"#);
    assert_eq!(
        shown,
        serde_json::json!({"temperature": 0.0, "max_tokens": 7.0}),
        "{log}"
    );
    let (shown, log) = inspect(r#"{"max_new_tokens": null, "max_length": 4096}"#);
    assert_eq!(shown, serde_json::json!({}));
    assert!(log.contains(ignored) && log.contains("max_length"), "{log}");
    for wrong in ["0", "-1", "1.5", "\"many\""] {
        let (shown, _) = inspect(&format!("{{\"max_new_tokens\": {wrong}}}"));
        let error = shown["error"].as_str().unwrap_or_default();
        assert!(error.contains("max_new_tokens is"), "{wrong}: {shown}");
    }
}

#[test]
fn invalid_sampling_defaults_of_a_model_are_reported_and_can_be_skipped() {
    let model = with_generation_config(r#"{"top_p": 1.5}"#);
    let model = model.path().to_str().unwrap();
    let generate = [
        "generate",
        "--model",
        model,
        "--prompt-ids",
        "1",
        "--max-tokens",
        "1",
    ];
    let parts = [
        "generation_config.json",
        "top_p is 1.5",
        "--generation-config none",
    ];
    assert_refused(&generate, 1, &parts);
    json(&quell(
        &[
            &generate[..],
            &["--generation-config", "none", "--format", "json"],
        ]
        .concat(),
    ));
}
